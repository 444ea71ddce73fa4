"""Supervised fine-tuning on written solutions: the baseline that the paper compares RL with. Same data format, same prompt,
same model code and same evaluation as train_rl.py; only the loss differs.

    python train_sft.py config/toy_sft.py
    torchrun --nproc_per_node=8 train_sft.py config/mm_math_sft.py

The loss is the mean of -log p over the solution tokens of the batch, EOS included, on all ranks: a sum over a global count.
The paper shipped results of its baseline, but no code; batch, learning rate and schedule are those of its appendix.
"""
import math
import time

import torch
from tqdm import tqdm

from batch import make_batch, microbatches, select
from checkpoint import (Stop, check_out_dir, check_room, find_checkpoint, leave, load_trainer, resumption,
                        save_checkpoint)
from checks import check_sft
from configurator import UserError, configure, save_config
from data import Dataset, load_processor, order, print_warnings
from distributed import all_max, all_sum, end, gather_rows, start
from evaluate import EVALS, evaluate, show_table, some
from logger import check_logger, shown, time_left
from logs import Logs, finite
from model import compute_dtype, encode, gather_weights, learning_rate_at, load_config, load_policy, local_folder, peak_gb
from rollout import banned_token_ids, eos_token_ids, open_engine
from watch import now_at

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out/sft"  # config.py, metrics.jsonl, eval.jsonl, samples.jsonl and checkpoints/ go here
seed = 0  # the data order follows from it
# model and data
model = ""  # folder or hub name of a Qwen2-VL or Qwen2.5-VL
train_data = ""  # rows with a solution, in the paper's jsonl; `python data.py` says how to get some
val_data = ""  # evaluated as split validation; '' leaves it out
test_data = ""  # evaluated as split test; '' leaves it out
min_pixels = 3136  # smaller images are enlarged
max_pixels = 1003520  # larger images are shrunk: 1280 * 28 * 28 = 1280 image tokens
max_prompt_tokens = 2048  # a longer prompt is an error at start
# length of the run
epochs = 30  # passes over the training rows (paper)
max_steps = 0  # updates of the run; 0 = all epochs
batch_size = 16  # rows of an update over all ranks (paper)
max_tokens_per_microbatch = 16384  # padded tokens of one forward and backward on a rank; less = less memory, same gradient
# optimizer
learning_rate = 1e-5  # AdamW's peak; cosine to 0 after the warm-up (paper)
warmup_ratio = 0.1  # fraction of the updates over which the learning rate rises
adam_beta1 = 0.9  # decay of the mean of gradients
adam_beta2 = 0.95  # decay of the mean of their squares
adam_eps = 1e-5  # added to the root of the latter
weight_decay = 0.01  # AdamW's, times the learning rate
clip_grad_norm = 1.0  # longer gradients are scaled to this norm; 0 turns it off
train_llm = True  # True trains the language model
train_connector = False  # True trains the merger between tower and language model
train_vit = False  # True trains the vision tower
dtype = "auto"  # compute: 'float32', 'bfloat16', or 'auto' (bfloat16 on GPU, float32 on CPU); master weights are float32
activation_checkpointing = True  # True recomputes each language layer in backward: less memory, a third more compute
# evaluation and what is written
rollout = "vllm"  # 'vllm' or 'hf': what samples the evaluation's responses
max_new_tokens = 2048  # tokens of an evaluation's response at most
gpu_memory_utilization = 0.8  # fraction of its GPU that vLLM takes
eval_every_epochs = 1  # evaluate after every so many epochs, before the first update and after the last; 0 = never
save_every_steps = 0  # checkpoint after every so many updates; 0 = only after the last
save_every_minutes = 0  # and after the first update that ends so many minutes after the last checkpoint; 0 = never
keep_checkpoints = 3  # the newest so many stay, and the best on validation; 0 = all
init_from = "pretrained"  # 'pretrained': start from model; 'resume': go on from out_dir's newest checkpoint, if there is one
overwrite = False  # True starts anew in an out_dir that holds a run, which is lost
save_dtype = "auto"  # of the checkpoint's tensors: 'float32', 'bfloat16', or 'auto': the compute dtype
save_samples = 16  # evaluation responses that go to samples.jsonl, of each split
logger = "none"  # 'none', 'tensorboard' (out_dir/tensorboard) or 'wandb' (offline: set WANDB_MODE=offline)
max_skipped_updates = 8  # stop when so many updates in a row were left out for a number that is not finite; 0 = never
timeout_minutes = 120.0  # no process gets any further for so long: the run ends and says who waits for whom
log_every = 1  # updates between two printed lines; metrics.jsonl gets every update
# ---------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    check_sft(config)
    check_logger(logger)
    check_out_dir(out_dir, init_from, overwrite, model)
    folder = local_folder(model)
    load_config(folder)
    tokenizer, image_processor = load_processor(folder)
    train = Dataset(train_data, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens, need_solution=True)
    datasets = {split: Dataset(path, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens)
                for split, path in (("validation", val_data), ("test", test_data)) if path and eval_every_epochs}
    steps_per_epoch = len(train) // batch_size
    if steps_per_epoch == 0:
        raise UserError(f"{train_data}: {len(train)} rows do not fill one batch, {batch_size=}")
    steps = max_steps or epochs * steps_per_epoch

    world = start(timeout_minutes)
    main, stop = world.rank == 0, Stop()
    if main:
        print_warnings({"train": train, **datasets})
    resumed = find_checkpoint(out_dir) if init_from == "resume" else None
    precision = compute_dtype(dtype, world.device)
    save_precision = precision if save_dtype == "auto" else compute_dtype(save_dtype, world.device)
    eos_ids, banned_ids = eos_token_ids(tokenizer, folder), banned_token_ids(tokenizer)
    engine = None
    if datasets:
        engine = open_engine(rollout, folder, precision, world, eos_ids, banned_ids, max_prompt_tokens + max_new_tokens,
                             gpu_memory_utilization, seed)
        stop.engine = engine
    policy, visual = load_policy(folder, world, precision, banned_ids, train_llm, train_connector, train_vit,
                                 activation_checkpointing=activation_checkpointing)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, (adam_beta1, adam_beta2), adam_eps, weight_decay, fused=True)
    state = {"step": 0, "skipped_in_a_row": 0, "evaluated": False, "best": None, "files": {}}  # how far the run is
    if resumed:
        state = load_trainer(resumed, policy, optimizer, world)
    first_step, skipped_in_a_row, t_saved = state["step"] + 1, state["skipped_in_a_row"], time.monotonic()
    logs = Logs(out_dir, logger, config, state["files"], first_step, main)
    room = check_room(out_dir, folder, policy, visual, save_precision, keep_checkpoints)
    if main:
        save_config(config, f"{out_dir}/config.py")
        for line in [*resumption(init_from, resumed, state, config, model), *room]:
            print(line)
        print(f"{len(train)} rows, {steps_per_epoch} updates of {batch_size} rows an epoch, {steps} updates; "
              f"{sum(p.numel() for p in trained):,} parameters trained on {world.world_size} processes")

    def save(step, **progress):
        """Leaves a checkpoint of the run after so many updates, from which it can go on."""
        now = {"skipped_in_a_row": skipped_in_a_row, "evaluated": True, "best": state["best"], "config": config,
               "files": logs.sizes()}
        save_checkpoint(out_dir, step, policy, visual, folder, save_precision, world, optimizer, now | progress,
                        keep_checkpoints)

    def evaluate_all(step):
        now_at(f"step {step}: evaluation")
        before = logs.sizes()
        epoch = step // steps_per_epoch if step % steps_per_epoch == 0 else step / steps_per_epoch
        engine.load_weights(gather_weights(policy, precision))
        for split, dataset in datasets.items():
            rows, samples = evaluate(engine, dataset, tokenizer, max_new_tokens, seed, world, EVALS)
            if number := stop.agreed():
                save(step, evaluated=False, files=before)
                leave(number, engine, logs, f"step {step}: evaluation")
            best = next(row["accuracy"] for row in rows if row["k"] == 1)
            if split == "validation" and (state["best"] is None or best > state["best"]["accuracy"]):
                state["best"] = {"step": step, "accuracy": best}
            logs.write("eval", [{"step": step, "epoch": epoch, "split": split, **row} for row in rows])
            logs.write("samples", [{"step": step, "split": split, **sample} for sample in some(samples, save_samples)])
            if main:
                with tqdm.external_write_mode():  # the bar out of the way
                    show_table(f"epoch {epoch:g} {split}", rows)

    if engine:
        engine.interrupted = lambda: stop.signal
        if not state["evaluated"]:
            evaluate_all(first_step - 1)
    if main and first_step > steps:
        print(f"nothing left to do: {first_step - 1} of {steps} updates are done; more by --epochs or --max_steps")
    t_loop = time.perf_counter()
    bar = tqdm(range(first_step, steps + 1), initial=first_step - 1, total=steps, smoothing=0, dynamic_ncols=True,
               disable=None if main else True)  # None: on a terminal
    for step in bar:
        t_start = time.perf_counter()
        now_at(f"step {step}: update")
        epoch = (step - 1) // steps_per_epoch  # passes over the data that are finished
        # 1) the batch: row p of it belongs to rank p % world_size
        first = (step - 1) % steps_per_epoch * batch_size
        mine = order(len(train), seed, epoch)[first:first + batch_size][world.rank::world.world_size]
        encoded = encode(visual, train, mine)
        queries = [encoded[i] for i in mine]
        solutions = [tokenizer.encode(train.samples[i].solution, add_special_tokens=False) + [tokenizer.eos_token_id]
                     for i in mine]
        batch, image_features = make_batch(policy, queries, solutions, tokenizer.pad_token_id, world.device)

        # 2) forward and backward, micro-batch by micro-batch
        tokens = all_sum([batch.response_mask.sum().item()]).item()  # solution tokens of the batch, all ranks
        total_loss = torch.zeros((), dtype=torch.float64, device=world.device)
        for rows, real in microbatches(batch.attention_mask.sum(1).tolist(), max_tokens_per_microbatch):
            part = select(batch, rows)
            logprobs, _ = policy(part.query_responses, part.position_ids, part.attention_mask,
                                 [image_features[i] for i in rows], part.response_mask, 1.0, with_entropy=False)
            loss = -logprobs.sum() / tokens * real  # 0 outside the response
            (loss * world.world_size).backward()  # FSDP averages gradients over ranks; the global count wants their sum
            total_loss += loss.detach()

        # 3) update
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step - 1, steps, learning_rate, warmup_ratio)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, clip_grad_norm or math.inf).full_tensor().item()
        mean_loss = all_sum(total_loss).item()
        sound = math.isfinite(mean_loss) and math.isfinite(grad_norm)  # both are of all ranks, so all take the same branch
        if sound:
            optimizer.step()
        else:
            rows = gather_rows([{"id": train.samples[i].id, "question": train.samples[i].question,
                                 "solution": train.samples[i].solution} for i in mine])
            logs.write("skipped", [{"step": step, "loss": mean_loss, "grad_norm": grad_norm, **row} for row in rows])
            if main:
                bar.write(f"step {step}: loss {mean_loss}, gradient norm {grad_norm}: update SKIPPED, the weights stay as "
                          "they were; its rows are in skipped.jsonl: " + ", ".join(row["id"] for row in rows))
        optimizer.zero_grad(set_to_none=True)
        skipped_in_a_row = 0 if sound else skipped_in_a_row + 1
        if skipped_in_a_row and skipped_in_a_row == max_skipped_updates:
            raise UserError(f"step {step}: {skipped_in_a_row} updates in a row were skipped, since loss or gradient was not "
                            f"finite; see {out_dir}/skipped.jsonl, lower learning_rate, or go on from the last checkpoint "
                            "with --init_from=resume")

        prompt_tokens = all_sum([sum(len(query.ids) for query in queries)]).item()
        seconds = time.perf_counter() - t_start
        metrics = finite({
            "step": step, "epoch": epoch, "samples": step * batch_size,
            "policy/loss": mean_loss, "policy/grad_norm": grad_norm, "policy/lr": optimizer.param_groups[0]["lr"],
            "policy/updates": int(sound), "policy/skipped": int(not sound),
            "response/length": tokens / batch_size, "tokens/prompt": int(prompt_tokens), "tokens/response": int(tokens),
            "time/step_s": seconds,
            "memory/peak_gb": peak_gb(world.device)})
        logs.write("metrics", [metrics])
        done = step == steps
        if main and (done or step % log_every == 0):
            with tqdm.external_write_mode():
                print(f"step {step}/{steps} | loss {shown(metrics['policy/loss'], '.4f')} | "
                      f"grad norm {shown(metrics['policy/grad_norm'], '.2f')} lr {metrics['policy/lr']:.1e} | "
                      f"{tokens / batch_size:.1f} tokens a solution | {seconds:.2f}s | "
                      f"left {time_left(time.perf_counter() - t_loop, step - first_step + 1, steps - first_step + 1)}",
                      flush=True)
        if engine and (done or step % (steps_per_epoch * eval_every_epochs) == 0):
            evaluate_all(step)
        number, minutes = stop.agreed(), all_max((time.monotonic() - t_saved) / 60)
        if (number or done or (save_every_steps and step % save_every_steps == 0)
                or (save_every_minutes and minutes >= save_every_minutes)):
            save(step)
            t_saved = time.monotonic()
        if number and not done:
            leave(number, engine, logs, f"step {step}")

    if engine:
        engine.close()
    logs.close()
    end()

"""Supervised fine-tuning on written solutions: the baseline that the paper compares RL with. Same data
format, same prompt, same model code and same evaluation as train_rl.py; only the loss differs.

    python train_sft.py config/toy_sft.py
    torchrun --nproc_per_node=8 train_sft.py config/mm_math_sft.py --rollout=hf

The loss is the mean of -log p over the batch's solution tokens, EOS included: a sum over a global count. The
paper shipped no code of its baseline; batch, learning rate and schedule are its appendix's.
"""
import math
import time

import torch

from checkpoint import Logs, Stop, check_trainer, load_trainer, save_checkpoint
from configurator import UserError, configure
from data import load_processor, open_datasets, order, special_token_ids
from distributed import all_sum, end, start
from evaluate import evaluate_all
from model import (compute_dtype, encode, gather_weights, learning_rate_at, load_policy, local_folder,
                   make_sequence, microbatches, peak_gb)
from rollout import open_engine

# ------------------------------------------------------------------------------------------------------------
out_dir = "out/sft"  # config.py, metrics.jsonl, eval.jsonl, samples.jsonl and checkpoints/ go here
seed = 0  # the data order follows from it
# model and data
model = ""  # folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL
train_data = ""  # rows with a solution, in the paper's jsonl; `python fetch.py` says how to get some
val_data = ""  # evaluated as split validation; '' leaves it out
test_data = ""  # evaluated as split test; '' leaves it out
min_pixels = 3136  # smaller pictures are enlarged
max_pixels = 1003520  # larger pictures are shrunk: 1280 * 28 * 28 = 1280 image tokens
max_prompt_tokens = 2048  # a longer prompt is an error at the start
# length of the run
epochs = 30  # passes over the training rows (paper)
max_steps = 0  # updates of the run; 0 = all epochs
batch_size = 16  # rows of an update, all ranks (paper)
max_tokens_per_microbatch = 16384  # of a forward and backward; less = less memory, the same gradient
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
dtype = "auto"  # of compute: 'float32', 'bfloat16', or 'auto' (bfloat16 on GPU, float32 on CPU)
activation_checkpointing = True  # True recomputes each layer in backward: less memory, a third more compute
lora_rank = 0  # > 0: LoRA, adapters of this rank are trained; wants a 5 to 10 times larger learning_rate
lora_alpha = 32  # adapters count lora_alpha / lora_rank times
# evaluation and what is written
rollout = "vllm"  # 'vllm' or 'hf': what samples the evaluation's responses
max_new_tokens = 2048  # tokens of an evaluation's response at most
gpu_memory_utilization = 0.8  # fraction of its GPU that vLLM takes
eval_every_epochs = 1.0  # evaluate after so many (0.25: 4 times in each), and before and after all; 0 = never
save_every_steps = 0  # checkpoint after every so many updates; 0 = only after the last
keep_checkpoints = 3  # the newest so many stay; 0 = all
init_from = "pretrained"  # 'pretrained': from model; 'resume': from out_dir's newest checkpoint, if any
save_dtype = "auto"  # of the checkpoint's tensors: 'float32', 'bfloat16', or 'auto': the compute dtype
save_samples = 16  # evaluation responses that go to samples.jsonl, of each split and setting
logger = "none"  # 'none', 'tensorboard' (out_dir/tensorboard) or 'wandb' (offline: set WANDB_MODE=offline)
# ------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    world = start()
    is_main, device, world_size = world.rank == 0, world.device, world.world_size
    check_trainer(config)  # and data before the model, so that a mistake costs seconds
    if batch_size % world_size:
        raise UserError(f"config: batch_size must be a multiple of {world_size} processes, got {batch_size}")
    folder = local_folder(model)
    tokenizer, image_processor = load_processor(folder)
    paths = {"train": train_data, "validation": val_data, "test": test_data}
    train, eval_sets = open_datasets(paths, tokenizer, image_processor, min_pixels, max_pixels,
                                     max_prompt_tokens, need_solution=True)
    steps_per_epoch = len(train) // batch_size
    if steps_per_epoch == 0:
        raise UserError(f"{train_data}: {len(train)} rows do not fill one batch, {batch_size=}")
    steps = max_steps or epochs * steps_per_epoch
    eval_every_steps = max(1, round(eval_every_epochs * steps_per_epoch))

    stop = Stop()
    precision = compute_dtype(dtype, device)
    stored = precision if save_dtype == "auto" else compute_dtype(save_dtype, device)
    eos_ids, banned_ids = special_token_ids(tokenizer, folder)
    engine = None
    if eval_sets and eval_every_epochs:
        engine = open_engine(rollout, folder, precision, world, eos_ids, banned_ids,
                             max_prompt_tokens + max_new_tokens, gpu_memory_utilization)
    policy, visual = load_policy(folder, world, precision, banned_ids, train_llm, train_connector, train_vit,
                                 activation_checkpointing=activation_checkpointing, lora_rank=lora_rank,
                                 lora_alpha=lora_alpha)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, (adam_beta1, adam_beta2), adam_eps, weight_decay,
                                  fused=True)
    first_step = 1 + (load_trainer(out_dir, policy, optimizer) if init_from == "resume" else 0)
    logs = Logs(config, first_step, is_main)
    if is_main:
        print(f"{len(train)} rows, {steps_per_epoch} updates of {batch_size} rows an epoch, {steps} updates; "
              f"{sum(p.numel() for p in trained):,} parameters trained on {world_size} processes; begins at "
              f"update {first_step}", flush=True)

    def evaluate_now(step):
        engine.load_weights(gather_weights(policy, precision))
        epoch = step / steps_per_epoch
        evaluate_all(engine, eval_sets, step, epoch, max_new_tokens, seed, world, logs, save_samples)

    if engine and first_step == 1:
        evaluate_now(0)
    for step in range(first_step, steps + 1):
        t_start = time.perf_counter()

        # 1) the batch: this rank's rows, each a sequence of query and solution
        epoch, batch = divmod(step - 1, steps_per_epoch)
        rows = order(len(train), seed, epoch)[batch * batch_size:][:batch_size][world.rank::world_size]
        queries = encode(visual, train, rows)
        solutions = [tokenizer.encode(train.samples[row].solution, add_special_tokens=False)
                     + [tokenizer.eos_token_id] for row in rows]
        sequences = [make_sequence(queries[row], solution) for row, solution in zip(rows, solutions)]

        # 2) forward and backward, micro-batch by micro-batch
        tokens, prompt_tokens = map(int, all_sum([  # of the batch, all ranks
            sum(map(len, solutions)), sum(len(queries[row].ids) for row in rows)]).tolist())
        loss_sum = torch.zeros((), device=device)
        for rows in microbatches(sequences, range(len(sequences)), max_tokens_per_microbatch):
            logprobs, _ = policy([sequences[i] for i in rows], temperature=1.0)  # (b, R), 0 behind a solution
            loss = -logprobs.sum() / tokens
            (loss * world_size).backward()  # FSDP averages over ranks; the global count wants the sum
            loss_sum += loss.detach()

        # 3) the update
        lr = learning_rate_at(step - 1, steps, learning_rate, warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(trained, clip_grad_norm or math.inf).full_tensor().item()
        if math.isfinite(norm):  # the norm over all ranks: all take the same branch
            optimizer.step()
        optimizer.zero_grad()

        m = {"step": step, "epoch": epoch, "samples": step * batch_size,
             "policy/loss": all_sum(loss_sum).item(), "policy/grad_norm": norm, "policy/lr": lr,
             "policy/updates": int(math.isfinite(norm)), "policy/skipped": int(not math.isfinite(norm)),
             "response/length": tokens / batch_size, "tokens/prompt": prompt_tokens,
             "tokens/response": tokens, "time/step_s": time.perf_counter() - t_start,
             "memory/peak_gb": peak_gb(device)}
        logs.write("metrics", [m])
        if is_main:
            print(f"step {step}/{steps} | loss {m['policy/loss']:.4f} | grad norm {norm:.2f} lr {lr:.1e} | "
                  f"{tokens / batch_size:.1f} tokens a solution | {m['time/step_s']:.2f}s", flush=True)
        if engine and (step == steps or step % eval_every_steps == 0):
            evaluate_now(step)
        if stop.agreed() or step == steps or (save_every_steps and step % save_every_steps == 0):
            save_checkpoint(out_dir, step, policy, visual, optimizer, folder, stored, keep_checkpoints)
        if stop.exit_status:
            break
    if engine:
        engine.close()
    logs.close()
    end(stop.exit_status)

"""Reinforcement learning of a vision-language model with rule-based rewards: one run, top to bottom.

    python train_rl.py config/toy.py                              # one process, CPU or GPU, no download
    torchrun --nproc_per_node=7 train_rl.py config/geo3k.py       # the paper: 7 GPUs train, the 8th samples

The four steps and the objective are MAYE's (arXiv 2504.02587). Departures from the paper, or from its code:
 1. Position ids are the model's M-RoPE; MAYE's code trains with one-dimensional ones.
 2. Returns are whitened over all ranks, to mean 0; MAYE's code: per rank, and the mean is added back.
 3. The loss is Eq. 1's mean over responses, by global counts; MAYE's code averages each micro-batch's tokens.
 4. Master weights and AdamW moments are float32: most steps of 5e-6 round away in bfloat16.
 5. The engine, which samples, is compared with the trainer by its log-probabilities, before and in each step.
 6. The language reward counts letters neither Latin nor Greek, not Chinese, Japanese and Korean ones alone.
"""
import collections
import math
import time

import torch
from torch.nn.utils.rnn import pad_sequence

from checkpoint import Logs, Stop, check_trainer, load_trainer, save_checkpoint
from configurator import UserError, check_at_least, configure, one_of
from data import Sampling, load_processor, open_datasets, special_token_ids, step_requests
from distributed import all_sum, end, gather_json, start
from evaluate import evaluate_all
from model import (compute_dtype, encode, gather_weights, learning_rate_at, load_policy, local_folder,
                   make_sequence, microbatches, peak_gb, response_logprobs)
from objective import compute_advantages, correct, estimate_kl, loss_weights, policy_loss
from reflection import metrics as reflection_metrics
from reward import format_reward, judge_batch, language_reward
from rollout import check_parity, open_engine

# ------------------------------------------------------------------------------------------------------------
out_dir = "out/rl"  # config.py, metrics.jsonl, eval.jsonl, samples.jsonl and checkpoints/ go here
seed = 0  # data order and sampling follow from it, whatever the number of processes
# model and data
model = ""  # folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL
train_data = ""  # problems in the paper's jsonl; `python fetch.py` says how to get some
val_data = ""  # evaluated as split validation; '' leaves it out
test_data = ""  # evaluated as split test; '' leaves it out
min_pixels = 3136  # smaller pictures are enlarged: 56 * 56 = 4 image tokens
max_pixels = 1003520  # larger pictures are shrunk: 1280 * 28 * 28 = 1280 image tokens
max_prompt_tokens = 2048  # a longer prompt is an error at the start; prompts are never cut
# sampling
rollout = "vllm"  # 'vllm', on the GPU after the training ones or on the only one; 'hf', in each process
samples_per_query = 1  # responses to each query, its group (paper: 1)
temperature = 1.0  # divides the logits in the sampler and in the loss alike
max_new_tokens = 2048  # tokens of a response at most; a longer one ends without EOS
gpu_memory_utilization = 0.8  # fraction of its GPU that vLLM takes (paper); 0.3 to 0.5 of a shared one
rollout_ahead = 0  # 1: sample the next batch while training on this one, by weights a step old
# length of the run
epochs = 30  # passes over the training queries
max_steps = 0  # steps of the run; 0 = all epochs
batch_size = 896  # queries of a step, all ranks (paper: 128 x 7)
minibatch_size = 28  # responses (not queries) of an update, all ranks (paper: 4 x 7)
ppo_epochs = 1  # uses of a step's responses
max_tokens_per_microbatch = 16384  # of a forward and backward; less = less memory, the same gradient
# objective (objective.py; the README's table of methods)
advantage = "reinforce++"  # paper; of a group: 'reinforce++_baseline', 'grpo', 'dr_grpo', 'rloo'
gamma = 1.0  # discount per token
ratio = "token"  # 'token': PPO's; 'sequence': GSPO's, of whole responses; 'cispo': a bounded weight
clip_low = 0.2  # negative advantages: no gradient below a ratio of 1 - clip_low (cispo: its weight's least)
clip_high = 0.2  # positive advantages: no gradient above 1 + clip_high (cispo: its weight's most)
loss_agg = "seq_mean"  # mean over a response, then over responses (Eq. 1); 'token_mean'; 'constant' (Dr.GRPO)
kl_loss_coeff = 0.001  # weight in the loss of the k3 KL to the untrained model (paper, appendix A); 0 = off
kl_reward_coeff = 0.0  # weight of that KL as a penalty in the token rewards; 0 turns it off (paper: 0)
kl_estimator = "k3"  # of the KL in the rewards: 'k1' (an unbiased gradient), 'k2', 'k3' (paper)
old_logprobs_from = "trainer"  # the ratio's denominator: 'trainer', by a forward; 'engine', the engine's own
correction = "none"  # for p(trainer) / p(engine): 'truncate': it weighs tokens; 'mask': drops sequences
correction_cap = 2.0  # weights are at most this, or sequences beyond it leave the loss
# reward
language_reward_coeff = 0.1  # times minus the fraction of letters neither Latin nor Greek; 0 turns it off
format_reward_coeff = 0.0  # times 1 for a response with one well-formed box at its end; 0 = off (paper)
no_eos_score = -0.1  # score of a response that never ended; 0 = score it like any other
mask_unfinished = False  # True leaves such a response out of the loss; its group's mean still has its score
# optimizer
learning_rate = 5e-6  # AdamW's peak; cosine to 0 after the warm-up
warmup_ratio = 0.1  # fraction of the updates over which the learning rate rises
adam_beta1 = 0.9  # decay of the mean of gradients
adam_beta2 = 0.95  # decay of the mean of their squares
adam_eps = 1e-5  # added to the denominator, the root of that
weight_decay = 0.01  # AdamW's, times the learning rate
clip_grad_norm = 1.0  # longer gradients are scaled to this norm; 0 turns it off
train_llm = True  # True trains the language model
train_connector = False  # True trains the merger between tower and language model
train_vit = False  # True trains the vision tower
dtype = "auto"  # of compute: 'float32', 'bfloat16', or 'auto' (bfloat16 on GPU, float32 on CPU)
activation_checkpointing = True  # True recomputes each layer in backward: less memory, a third more compute
lora_rank = 0  # > 0: LoRA, adapters of this rank are trained; wants a 5 to 10 times larger learning_rate
lora_alpha = 32  # adapters count lora_alpha / lora_rank times
# what is written
eval_every_epochs = 1.0  # evaluate after so many (0.25: 4 times in each), and before and after all; 0 = never
save_every_steps = 0  # checkpoint after every so many steps; 0 = only after the last
keep_checkpoints = 3  # the newest so many stay; 0 = all
init_from = "pretrained"  # 'pretrained': from model; 'resume': from out_dir's newest checkpoint, if any
save_samples = 16  # responses of a step that go to samples.jsonl
logger = "none"  # 'none', 'tensorboard' (out_dir/tensorboard) or 'wandb' (offline: set WANDB_MODE=offline)
# ------------------------------------------------------------------------------------------------------------
# pure functions: what is said of a step

def response_metrics(records):
    """Means over the records of a step, all ranks. A new key of their "rewards" shows up by itself."""
    def mean(values):
        return sum(values) / len(records)
    groups = collections.defaultdict(list)  # scores of a query's responses
    for record in records:
        groups[record["id"]].append(record["score"])
    equal = sum(len(set(scores)) == 1 for scores in groups.values())
    return {
        "train/accuracy": mean(r["correct"] for r in records),
        "train/score": mean(r["score"] for r in records),
        "train/groups_without_signal": equal if len(groups) < len(records) else math.nan,  # nan: no groups
        **{f"reward/{name}": mean(r["rewards"][name] for r in records) for name in records[0]["rewards"]},
        "response/length": mean(r["length"] for r in records),
        "response/clip_ratio": mean(r["finish_reason"] != "stop" for r in records),
        **reflection_metrics([r["response"] for r in records], [r["correct"] for r in records]),
        "judge/errors": sum(bool(r["error"]) for r in records),
        "judge/timeouts": sum(r["error"] == "timeout" for r in records),
        "tokens/prompt": sum(r["query_length"] for r in records),
        "tokens/response": sum(r["length"] for r in records)}


def update_metrics(updates, reference):
    """Means over the updates of a step (losses, norms) or over their tokens, without those that were skipped.
    logprob_diff is the first update's: its forward is by the policy that the step began with."""
    made = [update for update in updates if math.isfinite(update["grad_norm"])]
    total = {name: sum(update[name] for update in made) for name in updates[0]}
    count, tokens = len(made) or math.nan, total["tokens"] or math.nan  # no update made: nan, written as null
    return {
        **{f"policy/{name}": total[name] / count for name in ("loss", "pg_loss", "grad_norm")},
        "policy/kl_loss": math.nan if reference is None else total["kl_loss"] / count,
        **{f"policy/{name}": total[name] / tokens for name in ("entropy", "ratio", "clipfrac", "approx_kl")},
        "policy/lr": updates[-1]["lr"],
        "policy/updates": len(made), "policy/skipped": len(updates) - len(made),
        "rollout/logprob_diff": updates[0]["logprob_diff"] / updates[0]["tokens"],
        "rollout/kl": math.nan if reference is None else total["kl"] / tokens}


def step_line(m, steps):
    """The line of a step: the metrics that one looks at first."""
    return (f"step {m['step']}/{steps} | score {m['train/score']:.2f} acc {m['train/accuracy']:.2f} | len "
            f"{m['response/length']:.1f} clipped {m['response/clip_ratio']:.0%} | kl {m['rollout/kl']:.1e} "
            f"clipfrac {m['policy/clipfrac']:.2f} ent {m['policy/entropy']:.2f} | "
            f"logp diff {m['rollout/logprob_diff']:.0e} | gen {m['time/rollout_s']:.1f}s "
            f"traj {m['time/trajectory_s']:.1f}s upd {m['time/update_s']:.1f}s")


# ------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())  # config files and flags over the knobs above
    world = start()  # before the checks: then what is wrong on one node alone ends the others too
    is_main, device, world_size = world.rank == 0, world.device, world.world_size
    # --- checks and data before the model, so that a mistake costs seconds
    check_trainer(config)  # what both trainers check
    check_at_least(config, 1, "minibatch_size", "samples_per_query", "ppo_epochs")
    check_at_least(config, 0.01, "temperature")
    one_of(config, "advantage", "reinforce++", "reinforce++_baseline", "grpo", "dr_grpo", "rloo")
    one_of(config, "ratio", "token", "sequence", "cispo")
    one_of(config, "loss_agg", "seq_mean", "token_mean", "constant")
    one_of(config, "kl_estimator", "k1", "k2", "k3")
    one_of(config, "old_logprobs_from", "trainer", "engine")
    one_of(config, "correction", "none", "truncate", "mask")
    responses_per_step = batch_size * samples_per_query  # each rank gets whole queries in whole minibatches
    if responses_per_step % minibatch_size or minibatch_size % (samples_per_query * world_size):
        raise UserError(f"config: {minibatch_size=} must divide batch_size * samples_per_query, "
                        f"{responses_per_step}, and be a multiple of {samples_per_query=} * {world_size=}")
    if advantage != "reinforce++" and samples_per_query == 1:
        raise UserError(f"config: {advantage=} compares a query's responses, so set samples_per_query=8")
    if correction != "none" and old_logprobs_from == "engine":
        raise UserError(f"config: {correction=} does nothing with old_logprobs_from='engine': ratios are 1")
    if rollout_ahead and old_logprobs_from == "trainer" and correction == "none":
        raise UserError("config: the responses of rollout_ahead=1 are an older policy's, so set "
                        "correction='truncate' or old_logprobs_from='engine'")
    folder = local_folder(model)
    tokenizer, image_processor = load_processor(folder)
    paths = {"train": train_data, "validation": val_data, "test": test_data}
    train, eval_sets = open_datasets(
        paths, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens)
    steps_per_epoch = len(train) // batch_size  # an epoch's remainder is left out, as in the paper
    if steps_per_epoch == 0:
        raise UserError(f"{train_data}: {len(train)} rows do not fill one batch, {batch_size=}")
    steps = max_steps or epochs * steps_per_epoch
    eval_every_steps = max(1, round(eval_every_epochs * steps_per_epoch))
    updates_per_step = responses_per_step // minibatch_size * ppo_epochs
    minibatch_per_rank = minibatch_size // world_size

    # --- engine, policy, reference, optimizer
    stop = Stop()
    precision = compute_dtype(dtype, device)
    # banned: vision tokens, which neither engine samples, and which are outside the policy's distribution too
    eos_ids, banned_ids = special_token_ids(tokenizer, folder)
    engine = open_engine(rollout, folder, precision, world, eos_ids, banned_ids,
                         max_prompt_tokens + max_new_tokens, gpu_memory_utilization)
    sampling = Sampling(temperature, 1.0, max_new_tokens)  # top_p 1: what it cuts off would bias the ratio
    # policy: sharded by FSDP, by one process too. visual: the frozen tower, which makes the features for all;
    # None while it is trained, as part of the policy
    flags = train_llm, train_connector, train_vit
    policy, visual = load_policy(
        folder, world, precision, banned_ids, *flags, activation_checkpointing=activation_checkpointing,
        lora_rank=lora_rank, lora_alpha=lora_alpha)
    reference = None  # what the KL is to: the policy with its adapters off, or a second model, not trained
    if kl_loss_coeff or kl_reward_coeff:
        reference = policy if lora_rank else load_policy(
            folder, world, precision, banned_ids, *flags, master=False)[0]  # owns a tower if policy does
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, (adam_beta1, adam_beta2), adam_eps, weight_decay,
                                  fused=True)
    # --- a run that goes on takes weights, moments and step from out_dir's newest checkpoint
    first_step = 1 + (load_trainer(out_dir, policy, optimizer) if init_from == "resume" else 0)
    logs = Logs(config, first_step, is_main)
    if is_main:
        print(f"{len(train)} queries, {steps_per_epoch} steps an epoch; steps {first_step} to {steps}, each "
              f"{responses_per_step} responses and {updates_per_step} updates; "
              f"{sum(p.numel() for p in trained):,} parameters trained on {world_size} processes")
    # the weights go to the engine as after each step; then both must give the same log-probabilities
    engine.load_weights(gather_weights(policy, precision))
    check_parity(engine, policy, visual, train, world, sampling, max_tokens_per_microbatch)
    if eval_every_epochs and first_step == 1:
        evaluate_all(engine, eval_sets, 0, 0, max_new_tokens, seed, world, logs, save_samples)

    in_flight = False  # whether the engine is sampling the next step's batch already (rollout_ahead)
    for step in range(first_step, steps + 1):
        eval_due = eval_every_epochs and (step == steps or step % eval_every_steps == 0)
        save_due = step == steps or (save_every_steps and step % save_every_steps == 0)
        t_start = time.perf_counter()

        # 1) Data Flow ---------------------------------------------------------------------------------------
        # in: seed and step. out: rows, indices into train, one for each of this rank's responses; seeds, one
        # a row; queries, {row: Query}: token ids with image placeholders, M-RoPE positions, and image
        # features, made here once for every forward to come (while tower or merger are trained: the pixels
        # instead).
        rows, seeds = step_requests(step, train, seed, batch_size, samples_per_query, world)
        queries = encode(visual, train, rows)

        # 2) Response Collection -----------------------------------------------------------------------------
        # in: rows and seeds. out: completions, one a row: token ids with the engine's log-probabilities. The
        # ids go into training as they are: decoded and tokenised again they could be others.
        if not in_flight:  # else it was started during the step before
            engine.start(train, rows, seeds, sampling, queries)
        completions = engine.collect()
        # an evaluation needs the engine idle; a run that goes on from a checkpoint begins with an idle one
        in_flight = bool(rollout_ahead and not eval_due and not save_due)
        if in_flight:  # the next batch, by the weights that this step begins with
            engine.load_weights(gather_weights(policy, precision))
            next_rows, next_seeds = step_requests(step + 1, train, seed, batch_size, samples_per_query, world)
            engine.start(train, next_rows, next_seeds, sampling)  # without queries: it encodes the pictures
        responses = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        t_rollout = time.perf_counter()

        # 3) Trajectory Generation ---------------------------------------------------------------------------
        # in: queries and completions. out: the trajectory of B responses, R tokens in the longest: sequences,
        # response_mask, three (B, R) log-probabilities, 0 on padding, and scores; records, for people.
        sequences = [make_sequence(queries[row], c.token_ids) for row, c in zip(rows, completions)]
        response_mask = pad_sequence([torch.ones(len(c.token_ids), dtype=torch.bool) for c in completions],
                                     batch_first=True).to(device)  # (B, R), True on tokens, EOS included
        engine_logprobs = [torch.tensor(c.logprobs) for c in completions]
        rollout_logprobs = pad_sequence(engine_logprobs, batch_first=True).to(device)  # (B, R), the engine's
        old_logprobs = rollout_logprobs  # (B, R), what ratios divide by: the engine's or, by a forward, ours
        if old_logprobs_from == "trainer":
            old_logprobs = response_logprobs(policy, sequences, max_tokens_per_microbatch, temperature)
        ref_logprobs = old_logprobs  # (B, R), of the model as loaded; without a KL term it only fills a place
        if reference is not None:
            ref_logprobs = response_logprobs(reference, sequences, max_tokens_per_microbatch, temperature,
                                             adapters=False)
        records = []
        verdicts = judge_batch(list(zip(responses, [train.samples[row].answer for row in rows])))
        for row, completion, response, verdict in zip(rows, completions, responses, verdicts):
            # a part for each reward, which the metrics show by itself; the score is what trains
            parts = {"accuracy": float(verdict.correct), "language": language_reward(response),
                     "format": format_reward(response)}
            score = (parts["accuracy"] + language_reward_coeff * parts["language"]
                     + format_reward_coeff * parts["format"])
            if no_eos_score and completion.finish_reason != "stop":
                score = no_eos_score
            records.append({
                **train.samples[row].fields(),  # id, image, images, question, answer
                "response": response, "correct": verdict.correct, "error": verdict.error, "score": score,
                "rewards": parts, "length": len(completion.token_ids), "query_length": len(queries[row].ids),
                "finish_reason": completion.finish_reason})
        scores = torch.tensor([r["score"] for r in records], dtype=torch.float32, device=device)  # (B,)
        t_trajectory = time.perf_counter()

        # 4) Policy Update -----------------------------------------------------------------------------------
        # in: the trajectory. out: responses_per_step / minibatch_size * ppo_epochs optimizer steps; updates,
        # what each of them met on all ranks; and, unless it is sampling, an engine with the new weights.
        kl = estimate_kl(old_logprobs, ref_logprobs, kl_estimator)  # (B, R), as the rest here
        corrections, correction_metrics = correct(
            old_logprobs, rollout_logprobs, response_mask, correction, correction_cap)
        loss_mask = response_mask & (corrections > 0)  # True on tokens that train
        if mask_unfinished:
            loss_mask &= torch.tensor([[c.finish_reason == "stop"] for c in completions], device=device)
        advantages = compute_advantages(
            scores, kl, loss_mask, advantage, samples_per_query, gamma, kl_reward_coeff)
        advantages = advantages * corrections  # weights w >= 0: max(w * a, w * b) = w * max(a, b)
        weights = loss_weights(loss_mask, loss_agg, minibatch_per_rank, max_new_tokens)
        updates = []
        for _ in range(ppo_epochs):
            for first in range(0, len(rows), minibatch_per_rank):  # in order: the step's queries are shuffled
                minibatch = list(range(first, first + minibatch_per_rank))
                sums = collections.defaultdict(float)
                # as many micro-batches on every rank, since FSDP's layers gather their weights together
                for micro in microbatches(sequences, minibatch, max_tokens_per_microbatch):
                    new_logprobs, entropy = policy([sequences[i] for i in micro], temperature)
                    at = micro, slice(new_logprobs.shape[1])  # its rows, cut to the longest of its responses
                    mask = response_mask[at]  # all tokens, to measure; loss_mask is in advantages and weights
                    # Eq. 1: clipped loss and KL, each weighed as loss_agg says; entropy carries no gradient
                    pg_loss, policy_ratio, clipped = policy_loss(
                        new_logprobs, old_logprobs[at], advantages[at], mask, ratio, clip_low, clip_high)
                    kl_loss = estimate_kl(new_logprobs, ref_logprobs[at])
                    loss = (weights[at] * (pg_loss + kl_loss_coeff * kl_loss)).sum()
                    (loss * world_size).backward()  # FSDP averages over ranks; the weights want the sum
                    measured = dict(
                        tokens=mask, loss=loss, pg_loss=weights[at] * pg_loss, kl_loss=weights[at] * kl_loss,
                        entropy=entropy, kl=kl[at], approx_kl=estimate_kl(old_logprobs[at], new_logprobs),
                        logprob_diff=(new_logprobs - rollout_logprobs[at]).abs(),
                        ratio=policy_ratio * mask, clipfrac=clipped * mask)
                    for name, values in measured.items():  # (b, r) but for loss, 0 on padding
                        sums[name] += values.detach().double().sum()
                update = (step - 1) * updates_per_step + len(updates)  # of the run, from 0
                lr = learning_rate_at(update, steps * updates_per_step, learning_rate, warmup_ratio)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                norm = torch.nn.utils.clip_grad_norm_(trained, clip_grad_norm or math.inf)
                norm = norm.full_tensor().item()  # over all ranks
                if math.isfinite(norm):  # else the update is skipped, on all ranks
                    optimizer.step()
                optimizer.zero_grad()
                totals = all_sum(torch.stack(list(sums.values()))).tolist()
                updates.append({**dict(zip(sums, totals)), "grad_norm": norm, "lr": lr})
        t_update = time.perf_counter()
        del queries, sequences  # their features: on a shared GPU the engine needs the memory
        if not in_flight:
            engine.load_weights(gather_weights(policy, precision))
        t_sync = time.perf_counter()

        # metrics: over all responses and tokens of the step, all ranks --------------------------------------
        step_records = sorted(sum(gather_json(records), []), key=lambda r: r["id"])  # whatever the ranks
        m = {"step": step, "epoch": (step - 1) // steps_per_epoch, "samples": step * responses_per_step,
             **response_metrics(step_records), **correction_metrics,
             **update_metrics(updates, reference),
             "time/rollout_s": t_rollout - t_start, "time/trajectory_s": t_trajectory - t_rollout,
             "time/update_s": t_update - t_trajectory, "time/sync_s": t_sync - t_update,
             "time/step_s": time.perf_counter() - t_start, "memory/peak_gb": peak_gb(device)}
        logs.write("metrics", [m])
        logs.write("samples", [{"step": step, "split": "train", **r} for r in step_records[:save_samples]])
        if is_main:
            print(step_line(m, steps), flush=True)
        if eval_due:
            epoch = step / steps_per_epoch
            evaluate_all(engine, eval_sets, step, epoch, max_new_tokens, seed, world, logs, save_samples)
        if stop.agreed() or save_due:
            save_checkpoint(out_dir, step, policy, visual, optimizer, folder, precision, keep_checkpoints)
        if stop.exit_status:
            break
    engine.close()
    logs.close()
    end(stop.exit_status)

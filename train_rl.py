"""Reinforcement learning of a vision-language model with rule-based rewards: one run, top to bottom.

    python train_rl.py config/toy.py                              # one process, CPU or GPU, no download
    torchrun --nproc_per_node=7 train_rl.py config/geo3k.py       # the paper: 7 training GPUs, the 8th samples
    torchrun --nproc_per_node=7 train_rl.py config/geo3k.py --dry_run=True   # what it would need; trains nothing

The four steps and the objective are those of MAYE (arXiv 2504.02587). Where we depart from it, or from its code:
 1. Position ids are the model's own M-RoPE. The released code trains with one-dimensional ones that its sampler never saw.
 2. Returns are whitened over the whole step, all ranks, to mean 0. The released code whitens per rank and adds the mean back.
 3. The loss is Eq. 1's mean over responses (loss_agg='seq_mean'), every mean a sum divided by a global count. The released
    code averages the tokens of each micro-batch, so its gradient depends on the micro-batch size.
 4. Master weights and AdamW moments are float32: at a learning rate of 5e-6 most steps round away in bfloat16.
 5. The engine's log-probabilities are compared with the trainer's before step 1 and at every step.
 6. The language reward counts letters that are neither Latin nor Greek, not Chinese, Japanese and Korean ones alone.
"""
import math
import os
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from batch import make_batch, microbatches, padded, parity, response_logprobs, select
from checkpoint import (Stop, check_out_dir, check_room, find_checkpoint, leave, load_trainer, mine_of, pack_step, resumption,
                        save_checkpoint, unpack_updates)
from checks import check_rl
from configurator import UserError, configure, save_config
from data import Dataset, load_processor, open_readers, order, print_warnings
from distributed import all_max, all_sum, end, gather_rows, start
from dryrun import show_plan
from evaluate import EVALS, evaluate, show_table, some
from health import Health
from logger import check_logger, shown, time_left
from logs import Logs, finite
from model import (compute_dtype, encode, gather_weights, keep_all, learning_rate_at, load_config, load_policy, local_folder,
                   peak_gb)
from reflection import metrics as reflection_metrics
from reflection import tally
from reward import format_reward, judge_batch, language_reward
from rollout import Completion, Sampling, banned_token_ids, eos_token_ids, open_engine, request_seed
from watch import now_at

# ---------------------------------------------------------------------------------------------------------------------
out_dir = "out/rl"  # config.py, metrics.jsonl, eval.jsonl, samples.jsonl and checkpoints/ go here
seed = 0  # data order and sampling follow from it, whatever the number of processes
# model and data
model = ""  # folder or hub name of a Qwen2-VL or Qwen2.5-VL
train_data = ""  # problems in the paper's jsonl; `python data.py` says how to get some
val_data = ""  # evaluated as split validation; '' leaves it out
test_data = ""  # evaluated as split test; '' leaves it out
min_pixels = 3136  # smaller images are enlarged: 56 * 56 = 4 image tokens
max_pixels = 1003520  # larger images are shrunk: 1280 * 28 * 28 = 1280 image tokens
max_prompt_tokens = 2048  # a longer prompt is an error at start; prompts are never cut
# sampling
rollout = "vllm"  # 'vllm' (the GPU after the training ones, or its CPU build) or 'hf' (each process samples its share)
temperature = 1.0  # divides the logits in the sampler and in the loss alike
max_new_tokens = 2048  # tokens of a response at most; a longer one ends without EOS
gpu_memory_utilization = 0.8  # fraction of its GPU that vLLM takes (paper)
rollout_ahead = 0  # 1: vLLM samples the next batch while this one is trained on, with weights one step old (see tis_clip)
tis_clip = 2.0  # rollout_ahead: bound of the weights p(policy) / p(sampler) that correct for the old sampler
# length of the run
epochs = 30  # passes over the training queries
max_steps = 0  # generation steps of the run; 0 = all epochs
batch_size = 896  # queries of a step over all ranks, one response each (paper: 128 x 7)
minibatch_size = 28  # responses of an update over all ranks (paper: 4 x 7)
ppo_epochs = 1  # uses of a step's responses
max_tokens_per_microbatch = 16384  # padded tokens of one forward and backward on a rank; less = less memory, same gradient
# objective
clip_low = 0.2  # the ratio's gradient ends below 1 - clip_low (for negative advantages)
clip_high = 0.2  # and above 1 + clip_high (for positive ones)
gamma = 1.0  # discount per token
kl_loss_coeff = 0.001  # weight of the k3 KL to the reference in the loss; 0 turns it off (paper, appendix A)
kl_reward_coeff = 0.0  # weight of the same KL as a penalty in the token rewards; 0 turns it off (paper: 0)
loss_agg = "seq_mean"  # 'seq_mean': tokens of a response, then responses (Eq. 1); 'token_mean': all tokens of the minibatch
old_logprobs = "trainer"  # of the policy that sampled: 'trainer', a forward; 'engine', as it gave them with the responses
# reward
language_reward_coeff = 0.1  # times minus the fraction of letters neither Latin nor Greek; 0 turns it off
format_reward_coeff = 0.0  # times 1 for a response with one well-formed box at its end; 0 turns it off (paper)
no_eos_score = -0.1  # score of a response that never ended; 0 = score it like any other
# optimizer
learning_rate = 5e-6  # AdamW's peak; cosine to 0 after the warm-up
warmup_ratio = 0.1  # fraction of the updates over which the learning rate rises
adam_beta1 = 0.9  # decay of the mean of gradients
adam_beta2 = 0.95  # decay of the mean of their squares
adam_eps = 1e-5  # added to the root of the latter
weight_decay = 0.01  # AdamW's, times the learning rate
clip_grad_norm = 1.0  # longer gradients are scaled to this norm; 0 turns it off
train_llm = True  # True trains the language model
train_connector = False  # True trains the merger between tower and language model
train_vit = False  # True trains the vision tower; while it and the merger are frozen, see keep_features
dtype = "auto"  # compute: 'float32', 'bfloat16', or 'auto' (bfloat16 on GPU, float32 on CPU); master weights are float32
keep_features = False  # True makes a frozen tower's features of all images at the start, and keeps them in CPU memory
activation_checkpointing = True  # True recomputes each language layer in backward: less memory, a third more compute
# what is written
eval_every_epochs = 1  # evaluate after every so many epochs, before the first step and after the last; 0 = never
save_every_steps = 0  # checkpoint after every so many steps; 0 = only after the last
save_every_minutes = 0  # and after the first step that ends so many minutes after the last checkpoint; 0 = never
keep_checkpoints = 3  # the newest so many stay, and the best on validation; 0 = all
init_from = "pretrained"  # 'pretrained': start from model; 'resume': go on from out_dir's newest checkpoint, if there is one
overwrite = False  # True starts anew in an out_dir that holds a run, which is lost
save_samples = 16  # responses of a step that go to samples.jsonl
logger = "none"  # 'none', 'tensorboard' (out_dir/tensorboard) or 'wandb' (offline: set WANDB_MODE=offline)
max_skipped_updates = 8  # stop when so many updates in a row were left out for a number that is not finite; 0 = never
timeout_minutes = 120.0  # no process gets any further for so long: the run ends and says who waits for whom
max_logprob_diff = 0.1  # stop before step 1 when trainer and engine differ by more, nats per token on average
dry_run = False  # True prints what the run would do and need, and exits
# ---------------------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """B responses of this rank, Q the longest query, R the longest response; queries left-padded, responses right-padded."""
    query_responses: torch.Tensor  # (B, Q+R) int64
    attention_mask: torch.Tensor  # (B, Q+R) int64
    position_ids: torch.Tensor  # (3, B, Q+R) int64
    response_mask: torch.Tensor  # (B, R) bool, True on tokens that count, EOS included
    logprobs: torch.Tensor  # (B, R) float32, of the policy that the step began with; see old_logprobs
    ref_logprobs: torch.Tensor  # (B, R) float32, of the untrained model; without a KL term logprobs again
    rollout_logprobs: torch.Tensor  # (B, R) float32, what the engine said
    entropy: torch.Tensor  # (B, R) float32, nats
    accuracy_rewards: torch.Tensor  # (B,) 1 or 0
    language_rewards: torch.Tensor  # (B,) -1 .. 0
    format_rewards: torch.Tensor  # (B,) 1 or 0
    scores: torch.Tensor  # (B,) their weighted sum, or no_eos_score
    lengths: torch.Tensor  # (B,) int64, response tokens
    image_features: list  # B tensors (image tokens, H), or B ImageInputs when the tower is trained


# ---------------------------------------------------------------------------------------------------------------------
# the objective, as pure functions of (B, R) tensors

def k3(logprobs, ref_logprobs):
    """Schulman's k3 estimate of KL(policy || reference) at each token, >= 0: exp(ref - new) - (ref - new) - 1.
    Paper, Eq. 1; http://joschu.net/blog/kl-approx.html. Any shape."""
    difference = ref_logprobs - logprobs
    return difference.expm1() - difference  # exp(x) - 1 - x would round to below 0 for small x


def token_rewards(scores, kl, response_mask, kl_reward_coeff):
    """(B, R): -kl_reward_coeff * kl at each token, and the score (B,) at the last token that counts."""
    rewards = -kl_reward_coeff * kl * response_mask
    last = response_mask.sum(1) - 1  # (B,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def discounted_returns(rewards, gamma):
    """(B, R): at each token the sum of its own and all later rewards, discounted by gamma per token."""
    returns, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
    return returns


def whiten(values, mask):
    """values with mean 0 and variance 1 over the True entries of mask on all ranks, 0 elsewhere. Both (B, R).
    A collective, safe for a rank with no True entry. The paper's code adds the mean back; we do not (departure 2)."""
    x = values.double().masked_fill(~mask, 0)  # not a product: it would keep a nan
    count, total = all_sum(torch.stack([mask.sum().double(), x.sum()]))
    mean = total / count
    variance = all_sum((((x - mean) * mask) ** 2).sum()) / count  # two passes: a difference of squares loses digits
    return ((x - mean) * (variance + 1e-8).rsqrt() * mask).float()


def importance_weights(logprobs, rollout_logprobs, tis_clip):
    """(B, R): p(policy that the step began with) / p(policy that sampled) of each token, at most tis_clip (truncated
    importance sampling). Positive, so advantages can carry them into the clipped loss. 1 outside of the responses."""
    return (logprobs - rollout_logprobs).exp().clamp(max=tis_clip)


def loss_weights(response_mask, loss_agg, responses, tokens):
    """(B, R) weights that sum to 1 over the whole minibatch (all ranks, all micro-batches), which holds so many responses
    and tokens: a token's loss times its weight, summed, is the mean that loss_agg names."""
    if loss_agg == "token_mean":
        return response_mask / tokens
    return response_mask / (response_mask.sum(1, keepdim=True).clamp(min=1) * responses)


def policy_loss(new_logprobs, logprobs, ref_logprobs, advantages, clip_low, clip_high):
    """pg_loss, kl_loss, ratio and clipped, (B, R) each: PPO's clipped loss (to be minimised), the k3 KL to the reference, the
    probability ratio, and whether clipping took the token's gradient away. All inputs (B, R)."""
    ratio = (new_logprobs - logprobs).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(unclipped, clipped), k3(new_logprobs, ref_logprobs), ratio, clipped > unclipped


def minibatch_gradient(policy, trajectory, advantages, minibatch, responses, tokens, loss_agg, clip_low, clip_high,
                       kl_loss_coeff, temperature, max_tokens, fill=False):
    """Adds to the policy's gradients that of the loss over one minibatch, micro-batch by micro-batch. minibatch: int64 rows
    of this rank's trajectory; responses, tokens: how many the minibatch has over all ranks. Returns sums over all ranks:
    of the weighted losses, and of what metrics need of each token. A collective.
    fill: the policy is still the one that sampled, so that this forward gives the trajectory its logprobs and entropy."""
    names = ("pg_loss", "kl_loss", "tokens", "ratio", "clipfrac", "approx_kl")
    sums = torch.zeros(len(names), dtype=torch.float64, device=advantages.device)
    for rows, real in microbatches(trajectory.attention_mask[minibatch].sum(1).tolist(), max_tokens):
        rows = minibatch[rows]
        part = select(trajectory, rows)
        R = part.response_mask.shape[1]
        new_logprobs, entropy = policy(part.query_responses, part.position_ids, part.attention_mask,
                                 [trajectory.image_features[i] for i in rows], part.response_mask, temperature,
                                 with_entropy=fill)
        if fill and real:
            trajectory.logprobs[rows, :R], trajectory.entropy[rows, :R] = new_logprobs.detach(), entropy
        logprobs = trajectory.logprobs[rows, :R]
        pg_loss, kl_loss, ratio, clipped = policy_loss(new_logprobs, logprobs, trajectory.ref_logprobs[rows, :R],
                                                       advantages[rows, :R], clip_low, clip_high)
        weights = loss_weights(part.response_mask, loss_agg, responses, tokens) * real
        loss = (weights * (pg_loss + kl_loss_coeff * kl_loss)).sum()
        (loss * dist.get_world_size()).backward()  # FSDP averages gradients over ranks; the weights want their sum
        counted = part.response_mask * real
        approx_kl = k3(logprobs, new_logprobs.detach())  # of the policy that sampled to the policy now
        sums += torch.stack([values.detach().double().sum() for values in (
            weights * pg_loss, weights * kl_loss, counted, ratio * counted, clipped * counted, approx_kl * counted)])
    return dict(zip(names, all_sum(sums).tolist()))


def unusable(trajectory):
    """For each of this rank's B responses the names of its numbers that are not finite; [] for a sound one."""
    names = ("logprobs", "ref_logprobs", "rollout_logprobs", "scores")
    bad = torch.stack([~getattr(trajectory, name).reshape(len(trajectory.scores), -1).isfinite().all(1) for name in names])
    return [[name for name, is_bad in zip(names, row) if is_bad] for row in bad.T.tolist()]


# ---------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    check_rl(config)
    updates_per_step = batch_size // minibatch_size * ppo_epochs
    # a step's first update is made by the policy that sampled: its own forward gives the old log-probabilities of its rows,
    # and their ratio is 1. not where the advantages need them before it
    fill = not (kl_reward_coeff or rollout_ahead)
    if dry_run:
        show_plan(config, int(os.environ.get("WORLD_SIZE", 1)))
        raise SystemExit

    # --- set-up: data before model, so that a bad row costs seconds
    check_logger(logger)
    check_out_dir(out_dir, init_from, overwrite, model)
    folder = local_folder(model)
    load_config(folder)  # another architecture is refused here
    tokenizer, image_processor = load_processor(folder)
    datasets = {split: Dataset(path, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens)
                for split, path in (("train", train_data), ("validation", val_data), ("test", test_data)) if path}
    train = datasets.pop("train")
    steps_per_epoch = len(train) // batch_size  # an epoch's remainder is left out, as in the paper
    if steps_per_epoch == 0:
        raise UserError(f"{train_data}: {len(train)} rows do not fill one batch, {batch_size=}")
    steps = max_steps or epochs * steps_per_epoch

    world = start(timeout_minutes)
    main, stop, local_minibatch = world.rank == 0, Stop(), minibatch_size // world.world_size
    if main:
        print_warnings({"train": train, **datasets})
    resumed = find_checkpoint(out_dir) if init_from == "resume" else None
    precision = compute_dtype(dtype, world.device)
    eos_ids, banned_ids = eos_token_ids(tokenizer, folder), banned_token_ids(tokenizer)
    engine = open_engine(rollout, folder, precision, world, eos_ids, banned_ids, max_prompt_tokens + max_new_tokens,
                         gpu_memory_utilization, seed)  # first: what is wrong with it shows before the models are loaded
    stop.engine = engine
    sampling = Sampling(temperature, 1.0, max_new_tokens)  # top_p 1: the ratio would be biased by what top_p cuts off
    policy, visual = load_policy(folder, world, precision, banned_ids, train_llm, train_connector, train_vit,
                                 activation_checkpointing=activation_checkpointing)
    reference = None
    if kl_loss_coeff or kl_reward_coeff:
        reference, _ = load_policy(folder, world, precision, banned_ids, train_llm, train_connector, train_vit,
                                   master=False, with_tower=False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, (adam_beta1, adam_beta2), adam_eps, weight_decay, fused=True)

    # how far the run is; within: the responses of a step that it was stopped within, between two updates
    state = {"step": 0, "update": 0, "skipped_in_a_row": 0, "evaluated": False, "best": None, "files": {},
             "within": None, "early": None}
    if resumed:
        state = load_trainer(resumed, policy, optimizer, world)
    first_step, update, skipped_in_a_row, t_saved = (state["step"] + 1, state["update"], state["skipped_in_a_row"],
                                                     time.monotonic())
    logs = Logs(out_dir, logger, config, state["files"], first_step, main)
    health = Health(logs.read("metrics"), on_policy=not rollout_ahead)
    room = check_room(out_dir, folder, policy, visual, precision, keep_checkpoints)
    if main:
        save_config(config, f"{out_dir}/config.py")
        for line in [*resumption(init_from, resumed, state, config, model), *room]:
            print(line)
        print(f"{len(train)} queries, {steps_per_epoch} steps an epoch, {steps} steps of {batch_size} responses and "
              f"{updates_per_step} updates; {sum(p.numel() for p in trained):,} parameters trained on "
              f"{world.world_size} processes")

    def rows_of(step):
        """The rows of the step that are this rank's, a function of (seed, epoch). Row p of the step belongs to rank
        p % world_size: no minibatch depends on the ranks."""
        epoch, batch = divmod(step - 1, steps_per_epoch)
        return mine_of(order(len(train), seed, epoch)[batch * batch_size:][:batch_size], world)

    def queries(step):
        """Those rows and the seeds of their requests."""
        return rows_of(step), [request_seed(seed, step, train.samples[i].id, 0) for i in rows_of(step)]

    readers, reading = open_readers(), {}  # row -> the Future of its Inputs, pixels included

    def read_ahead(rows):
        """Begins to read the images of rows, in threads, but for those whose features are kept. Their pixels wait in memory,
        24 MB each at the largest size."""
        for i in rows:
            if i not in reading and i not in train.kept:
                reading[i] = readers.submit(train.inputs, i)

    def land():
        """Brings in the batch that is being sampled ahead: then the engine is free, and a checkpoint can hold the batch."""
        global early
        if engine.busy:
            early = engine.collect(whole=True)

    def save(step, **progress):
        """Leaves a checkpoint of the run after so many steps, from which it can go on."""
        land()
        now = {"update": update, "skipped_in_a_row": skipped_in_a_row, "evaluated": True, "best": state["best"],
               "files": logs.sizes(), "config": config, "within": None, "early": None}
        if early and not all_max(bool(engine.died)):
            now["early"] = gather_rows([list(completion) for completion in early])
        save_checkpoint(out_dir, step, policy, visual, folder, precision, world, optimizer, now | progress, keep_checkpoints)

    def evaluate_all(step):
        now_at(f"step {step}: evaluation")
        before = logs.sizes()
        if rollout_ahead:
            land()
            engine.load_weights(gather_weights(policy, precision))
        epoch = step // steps_per_epoch if step % steps_per_epoch == 0 else step / steps_per_epoch
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

    within, early = state.pop("within"), state.pop("early")  # early: the responses of the step to come, if sampled ahead
    early = [Completion(*row) for row in mine_of(early, world)] if early and rollout_ahead else None

    # the same weights by way of the sync as by way of the disk, and the same log-probabilities in engine and trainer
    engine.load_weights(gather_weights(policy, precision))
    probe = [(world.rank + i * world.world_size) % len(train) for i in range(4)]
    difference = parity(engine, policy, visual, train, probe, sampling, tokenizer.pad_token_id,
                        max_tokens_per_microbatch, world.device)
    if main:
        print(f"before step {first_step}: rollout/logprob_diff {difference:.1e} nats a token (mean, trainer against engine)")
    if not difference <= max_logprob_diff:
        engine.close()
        raise UserError(f"trainer and engine disagree: mean |logprob difference| {difference:.3g} > {max_logprob_diff=}; "
                        "check that both read the same model folder, the engine's dtype, and the versions in "
                        "requirements.txt (M-RoPE)")
    if keep_features and visual is not None:
        now_at("features of all images")
        keep_all(visual, train, range(len(train)))
        for dataset in datasets.values() if rollout == "hf" else ():  # of these this process samples its own rows alone
            keep_all(visual, dataset, range(world.rank, len(dataset), world.world_size))
    engine.interrupted = lambda: stop.signal
    if eval_every_epochs and not state["evaluated"]:
        evaluate_all(first_step - 1)
    if main and first_step > steps:
        print(f"nothing left to do: {first_step - 1} of {steps} steps are done; more by --epochs or --max_steps")

    t_loop = time.perf_counter()
    bar = tqdm(range(first_step, steps + 1), initial=first_step - 1, total=steps, smoothing=0, dynamic_ncols=True,
               disable=None if main else True)  # None: on a terminal
    for step in bar:
        t_start = time.perf_counter()
        epoch = (step - 1) // steps_per_epoch  # passes over the data that are finished

        # 1) Data Flow ------------------------------------------------------------------------------------------------
        # in: the step's queries. out: of this rank's rows the token ids with image placeholders, and the image features,
        # made here once for every forward to come (or pixels, where the tower is trained).
        bar.set_description(now_at(f"step {step}: 1) Data Flow"))
        mine, seeds = queries(step)
        if not (within or early or engine.busy):
            engine.start(train, mine, seeds, sampling)  # vLLM samples in its own process while images are encoded here
        read_ahead(mine)
        encoded = encode(visual, train, mine, read=lambda i: reading.pop(i).result())

        # 2) Response Collection --------------------------------------------------------------------------------------
        # in: this rank's rows. out: one response to each, as token ids with the engine's log-probabilities.
        # ids go into training as they are: decoded and tokenised again they could be others.
        bar.set_description(now_at(f"step {step}: 2) Response Collection"))
        t_wait = time.perf_counter()
        if within:
            completions = [Completion(*row) for row in mine_of(within["completions"], world)]
        else:
            if rollout_ahead:
                land()
            ahead, early = early, None
            completions = ahead or engine.collect(encoded)
            if number := stop.agreed():  # a batch that was cut short is sampled again: the run after the step before counts
                early = ahead
                save(step - 1)
                leave(number, engine, logs, f"step {step}: 2) Response Collection")
        t_wait = time.perf_counter() - t_wait
        if rollout_ahead and step < steps and not early:
            # the engine samples the next batch while this one is trained on, with the weights that it gets here: those that
            # this step begins with. what it samples is one step's updates old when it is trained on, and corrected for
            engine.load_weights(gather_weights(policy, precision))
            engine.start(train, *queries(step + 1), sampling)
        if step < steps and visual is not None:  # else this step's pixels are still there
            read_ahead(rows_of(step + 1))  # while this step is trained on
        responses = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        t_rollout = time.perf_counter()

        # 3) Trajectory Generation ------------------------------------------------------------------------------------
        # in: queries and responses. out: a Trajectory: one padded batch, log-probabilities of policy and reference, and
        # rewards; and a record of each response for people to read.
        bar.set_description(now_at(f"step {step}: 3) Trajectory Generation"))
        batch, image_features = make_batch(policy, [encoded[i] for i in mine], [c.token_ids for c in completions],
                                           tokenizer.pad_token_id, world.device)
        rollout_logprobs = padded([c.logprobs for c in completions], batch.response_mask)
        if within:  # of the policy that sampled, which is gone
            logprobs, ref_logprobs, entropy = (padded(mine_of(within[name], world), batch.response_mask)
                                               for name in ("logprobs", "ref_logprobs", "entropy"))
        else:
            logprobs, entropy = rollout_logprobs.clone(), torch.zeros_like(rollout_logprobs)
            if old_logprobs == "trainer":  # of all rows but the first update's, see fill
                logprobs, entropy = response_logprobs(policy, batch, image_features, max_tokens_per_microbatch, temperature,
                                                      first=local_minibatch * fill)
            ref_logprobs = logprobs  # without a reference: no distance to it
            if reference is not None:
                ref_logprobs, _ = response_logprobs(reference, batch, image_features, max_tokens_per_microbatch, temperature,
                                                    with_entropy=False)

        records = []
        verdicts = judge_batch([(response, train.samples[i].answer) for response, i in zip(responses, mine)])
        for i, completion, response, verdict in zip(mine, completions, responses, verdicts):
            sample = train.samples[i]
            earned = {"accuracy": float(verdict.correct), "language": language_reward(response),
                      "format": format_reward(response)}
            score = (earned["accuracy"] + language_reward_coeff * earned["language"]
                     + format_reward_coeff * earned["format"])
            if no_eos_score and completion.finish_reason != "stop":
                score = no_eos_score
            records.append({"id": sample.id, "image": sample.image, "question": sample.question, "answer": sample.answer,
                            "response": response, "correct": verdict.correct, "error": verdict.error, "score": score,
                            "rewards": earned, "length": len(completion.token_ids), "query_length": len(encoded[i].ids),
                            "finish_reason": completion.finish_reason})

        def column(values):
            return torch.tensor(list(values), dtype=torch.float32, device=world.device)  # (B,)

        trajectory = Trajectory(
            *batch, logprobs, ref_logprobs, rollout_logprobs, entropy,
            column(r["rewards"]["accuracy"] for r in records), column(r["rewards"]["language"] for r in records),
            column(r["rewards"]["format"] for r in records), column(r["score"] for r in records),
            batch.response_mask.sum(1), image_features)
        t_trajectory = time.perf_counter()

        # 4) Policy Update --------------------------------------------------------------------------------------------
        # in: the Trajectory. out: batch_size / minibatch_size * ppo_epochs optimizer steps, and the engine up to date.
        bar.set_description(now_at(f"step {step}: 4) Policy Update"))
        mask = trajectory.response_mask
        broken = unusable(trajectory)
        usable = mask & torch.tensor([not names for names in broken], device=world.device)[:, None]  # (B, R)
        kl = k3(trajectory.logprobs, trajectory.ref_logprobs) * mask  # (B, R); 0 without a reference, see above
        rewards = token_rewards(trajectory.scores, kl, mask, kl_reward_coeff)  # (B, R)
        # (B, R); no critic: the baseline is the step's mean. what is not finite spoils its own minibatch and no other
        advantages = whiten(discounted_returns(rewards, gamma), usable)
        if rollout_ahead:  # of the policy that the step began with to the one that sampled: truncated importance weights
            advantages = advantages * importance_weights(trajectory.logprobs, trajectory.rollout_logprobs, tis_clip)

        sums, grad_norms, skipped, done_updates = {}, [], 0, 0  # of the step's updates, for metrics
        if within:
            sums, grad_norms, skipped, done_updates, within = *unpack_updates(within), None
        for start_row in (list(range(0, len(mine), local_minibatch)) * ppo_epochs)[done_updates:]:
            minibatch = torch.arange(start_row, start_row + local_minibatch)
            tokens = all_sum([mask[minibatch].sum().item()]).item()  # response tokens of the minibatch, all ranks
            update_sums = minibatch_gradient(
                policy, trajectory, advantages, minibatch, minibatch_size, tokens, loss_agg, clip_low, clip_high,
                kl_loss_coeff, temperature, max_tokens_per_microbatch, fill and done_updates == 0)
            if fill and done_updates == 0:
                broken = unusable(trajectory)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(update, steps * updates_per_step, learning_rate, warmup_ratio)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, clip_grad_norm or math.inf)
            grad_norm = grad_norm.full_tensor().item()  # over all ranks, so all take the same branch
            loss = update_sums["pg_loss"] + kl_loss_coeff * update_sums["kl_loss"]
            sound = not any(broken[i] for i in minibatch.tolist())
            if all_max(not (sound and math.isfinite(loss) and math.isfinite(grad_norm))) == 0:
                optimizer.step()
                grad_norms.append(grad_norm)
                sums = {name: sums.get(name, 0) + value for name, value in update_sums.items()}
                skipped_in_a_row = 0
            else:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                rows = gather_rows([records[i] | {"not_finite": broken[i]} for i in minibatch.tolist()])
                logs.write("skipped", [{"step": step, "update": done_updates + 1, "loss": finite(loss),
                                        "grad_norm": finite(grad_norm), **row} for row in rows])
                if main:
                    bar.write(f"step {step}: loss {loss}, gradient norm {grad_norm}: update SKIPPED, the weights stay as "
                              "they were; its samples are in skipped.jsonl: " + ", ".join(row["id"] for row in rows))
                if skipped_in_a_row == max_skipped_updates:
                    raise UserError(
                        f"step {step}: {skipped_in_a_row} updates in a row were skipped, since a loss, gradient, reward or "
                        f"log-probability was not finite; see not_finite, loss and response of {out_dir}/skipped.jsonl, "
                        "lower learning_rate, or go on from the last checkpoint with --init_from=resume")
            optimizer.zero_grad(set_to_none=True)
            update, done_updates = update + 1, done_updates + 1
            if done_updates < updates_per_step and (number := stop.agreed()):
                save(step - 1, within=pack_step(completions, trajectory, sums, grad_norms, skipped, done_updates))
                leave(number, engine, logs, f"step {step}: 4) Policy Update")
        t_update = time.perf_counter()
        if not rollout_ahead:
            engine.load_weights(gather_weights(policy, precision))  # from here on the engine is the new policy
        t_sync = time.perf_counter()

        # log: every number is over all responses and tokens of the step, on all ranks ----------------------------------
        usable = mask & torch.tensor([not names for names in broken], device=world.device)[:, None]
        own = usable.clone()  # tokens whose log-probabilities are the trainer's
        if old_logprobs == "engine":
            own[local_minibatch * fill:] = False
        difference = (trajectory.logprobs - trajectory.rollout_logprobs).abs()
        kl = k3(trajectory.logprobs, trajectory.ref_logprobs)
        tokens, usable_tokens, own_tokens, difference, entropy, kl = all_sum([x.double().sum().item() for x in (
            mask, usable, own, difference[own], trajectory.entropy[own], kl[usable])]).tolist()
        records = gather_rows(records)

        def mean(values):
            return sum(values) / batch_size

        # of the updates that were made: losses by update, the rest by token
        made = {name: value / (len(grad_norms) if name.endswith("loss") else sums["tokens"]) for name, value in sums.items()}
        metrics = finite({
            "step": step, "epoch": epoch, "samples": step * batch_size,
            "train/accuracy": mean(r["correct"] for r in records), "train/score": mean(r["score"] for r in records),
            **{f"reward/{name}": mean(r["rewards"][name] for r in records) for name in ("accuracy", "language", "format")},
            "response/length": mean(r["length"] for r in records),
            "response/clip_ratio": mean(r["finish_reason"] != "stop" for r in records),
            **reflection_metrics(tally([r["response"] for r in records], [r["correct"] for r in records])),
            "policy/loss": made["pg_loss"] + kl_loss_coeff * made["kl_loss"] if made else None,
            "policy/pg_loss": made.get("pg_loss"), "policy/kl_loss": made.get("kl_loss") if reference is not None else None,
            "policy/entropy": entropy / own_tokens if own_tokens else None,
            **{f"policy/{name}": made.get(name) for name in ("ratio", "clipfrac", "approx_kl")},
            "policy/grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else None,
            "policy/lr": optimizer.param_groups[0]["lr"], "policy/updates": len(grad_norms), "policy/skipped": skipped,
            "rollout/logprob_diff": difference / own_tokens if own_tokens else None,
            "rollout/kl": kl / usable_tokens if reference is not None and usable_tokens else None,
            "judge/errors": sum(bool(r["error"]) for r in records),
            **{f"judge/{name}": sum(r["error"] == error for r in records)
               for name, error in (("timeouts", "timeout"), ("unreadable", "unreadable"))},
            "time/wait_s": t_wait, "time/rollout_s": t_rollout - t_start, "time/trajectory_s": t_trajectory - t_rollout,
            "time/update_s": t_update - t_trajectory, "time/sync_s": t_sync - t_update,
            "time/step_s": time.perf_counter() - t_start,
            "tokens/prompt": sum(r["query_length"] for r in records), "tokens/response": int(tokens),
            "memory/peak_gb": peak_gb(world.device)})
        logs.write("metrics", [metrics])
        warnings = health.check(metrics)
        logs.write("samples", [{"step": step, "split": "train", **r} for r in records[:save_samples]])
        if main:
            m = metrics
            left = time_left(time.perf_counter() - t_loop, step - first_step + 1, steps - first_step + 1)
            with tqdm.external_write_mode():
                print(f"step {step}/{steps} | score {shown(m['train/score'], '.2f')} acc {m['train/accuracy']:.2f} | "
                      f"len {m['response/length']:.1f} clipped {m['response/clip_ratio']:.0%} | "
                      f"kl {shown(m['rollout/kl'], '.1e')} clipfrac {shown(m['policy/clipfrac'], '.2f')} "
                      f"ent {shown(m['policy/entropy'], '.2f')} | logp diff {shown(m['rollout/logprob_diff'], '.0e')} | "
                      f"gen {m['time/rollout_s']:.1f}s traj {m['time/trajectory_s']:.1f}s upd {m['time/update_s']:.1f}s | "
                      f"left {left}", *warnings, sep="\n", flush=True)
        done = step == steps
        if eval_every_epochs and (done or step % (steps_per_epoch * eval_every_epochs) == 0):
            bar.set_description(f"step {step}: evaluation")
            evaluate_all(step)
        del trajectory, batch, image_features, encoded, advantages  # features of two steps would not fit beside each other
        number, minutes = stop.agreed(), all_max((time.monotonic() - t_saved) / 60)
        if (number or done or (save_every_steps and step % save_every_steps == 0)
                or (save_every_minutes and minutes >= save_every_minutes)):
            save(step)
            t_saved = time.monotonic()
        if number and not done:
            leave(number, engine, logs, f"step {step}")

    engine.close()
    logs.close()
    end()

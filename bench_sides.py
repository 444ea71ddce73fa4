"""The sides that bench.py times, each in a process of its own: train_rl.py's way (Ours), and the textbook's (Plain).

A side prints a JSON line for each step that it is given a turn for: seconds, CPU seconds and peak memory of each part.
"""
import contextlib
import json
import pathlib
import platform
import re
import sys
import time
from typing import NamedTuple

import torch
from transformers import AutoModelForImageTextToText

import train_rl
from batch import make_batch, padded, response_logprobs
from configurator import UserError, version
from data import Dataset, load_processor, order
from distributed import end, start
from evaluate import EVALS, evaluate
from model import compute_dtype, encode, gather_weights, hub_name, keep_all, load_config, load_policy, local_folder, on_meta
from reward import format_reward, judge_batch, language_reward
from rollout import Sampling, banned_token_ids, eos_token_ids, open_engine, request_seed

MARK = "BENCH "  # before the JSON lines of a child; what else it prints is dropped


# ---------------------------------------------------------------------------------------------------------------------
# measuring

class Meter:
    """with meter("update"): ... adds to meter.parts["update"] its seconds and the peak memory while it ran, in GB."""

    def __init__(self, device):
        self.device, self.parts, self.gpu = device, {}, device.type == "cuda"

    def reset(self):
        if self.gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew at the present size

    def peak(self):
        if self.gpu:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024 / 1e9

    @contextlib.contextmanager
    def __call__(self, name):
        self.reset()
        begin = now()
        yield
        peak, (spent, cpu) = self.peak(), (now() - begin).tolist()  # on a GPU peak() waits for it
        self.parts[name] = {"s": spent, "cpu_s": cpu, "peak_gb": peak}


def now():
    """(2,) float64: seconds on the wall's clock, and of this process's CPU time."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def matrix_rate(device, dtype, rows, inner, columns):
    """FLOPs a second of a (rows, inner) by (inner, columns) product: the best of some tries over a fifth of a second."""
    a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() < begin + 0.2:
        t = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - t) / 4)
    return 2 * rows * inner * columns / best


def matrices(module):
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def model_flops(hf, queries, lengths):
    """{part: FLOPs} of a step, by the docstring's formulas, of queries with responses of those lengths. hf may be on meta."""
    text, vision = hf.config.text_config, hf.config.vision_config
    layers, visual = matrices(hf.model.language_model.layers), hf.model.visual
    width = visual.patch_embed.proj.weight.shape[0]
    per_patch = 2 * (matrices(visual.blocks) + matrices(visual.patch_embed)) + 2 * matrices(visual.merger) / 4
    full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    language = tower = 0
    for x, r in zip(queries, lengths):
        n, p = len(x.ids) + r, int(x.grid_thw.prod())
        language += (2 * layers * n + 2 * text.num_hidden_layers * text.hidden_size * n * (n + 1)
                     + 2 * text.hidden_size * text.vocab_size * r)
        tower += per_patch * p + 4 * width * p * (full * p + (vision.depth - full) * min(window, p))
    return {"rollout": language, "vision": tower, "old_logprobs": language, "ref_logprobs": language,
            "update": 3 * language}


def turns(info):
    """Says that this process is ready, then yields 0, 1, ... whenever its parent gives it a turn."""
    print(MARK + json.dumps(info), flush=True)
    step = 0
    while sys.stdin.readline():
        yield step
        step += 1


def report(record):
    print(MARK + json.dumps(record), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the plain way of Steps III and IV

class Plain:
    """What Ours is, by a transformers model as it comes."""

    def __init__(self, c, folder, world, dtype, banned_ids):
        def load(dtype):
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
            return model.to(world.device)
        self.c, self.dtype, self.banned_ids, self.world, self.hf = c, dtype, banned_ids, world, load(torch.float32)
        self.hf.model.visual.requires_grad_(False)
        self.reference = load(dtype).requires_grad_(False) if c.kl_loss_coeff or c.kl_reward_coeff else None
        self.trained = [p for p in self.hf.parameters() if p.requires_grad]
        if c.activation_checkpointing:
            self.hf.model.language_model.gradient_checkpointing_enable(dict(use_reentrant=False))
            self.hf.train()
        self.image_token_id, self.rope_index = self.hf.config.image_token_id, self.hf.model.get_rope_index

    def batch(self, queries, completions, pad_id):
        batch, self.images = make_batch(self, queries, [x.token_ids for x in completions], pad_id, self.world.device)
        return batch

    def parts(self, batch, rows):
        """rows as they come, so many at once as max_tokens_per_microbatch allows at the padded width of the step."""
        return rows.split(max(1, self.c.max_tokens_per_microbatch // batch.attention_mask.shape[1]))

    def forward(self, model, batch, rows):
        """logprobs and entropy, (rows, R), of those rows of a Batch: tower, language model and all logits in one forward."""
        device, R = batch.attention_mask.device, batch.response_mask.shape[1]
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = model(
                input_ids=batch.query_responses[rows], attention_mask=batch.attention_mask[rows],
                position_ids=batch.position_ids[:, rows], use_cache=False,
                pixel_values=torch.cat([self.images[i].pixel_values for i in rows]).to(device),
                image_grid_thw=torch.cat([self.images[i].grid_thw for i in rows]).to(device)).logits
        logits = logits[:, -R - 1:-1].float() / self.c.temperature  # (rows, R, V)
        logits[..., self.banned_ids] = torch.finfo(torch.float32).min
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return logprobs.gather(-1, batch.query_responses[rows, -R:, None])[..., 0], entropy

    @torch.no_grad()
    def logprobs(self, batch, reference, first=0):
        model = self.reference if reference else self.hf  # first: it makes those of all rows
        rows = self.parts(batch, torch.arange(len(batch.attention_mask)))
        made = [self.forward(model, batch, r) for r in rows]
        return torch.cat([x for x, _ in made]), torch.cat([x for _, x in made])

    def gradient(self, batch, minibatch, logprobs, ref_logprobs, entropy, advantages, fill):
        total, tokens = 0.0, batch.response_mask[minibatch].sum()
        for rows in self.parts(batch, minibatch):
            new_logprobs, _ = self.forward(self.hf, batch, rows)
            pg_loss, kl_loss, _, _ = train_rl.policy_loss(new_logprobs, logprobs[rows], ref_logprobs[rows], advantages[rows],
                                                          self.c.clip_low, self.c.clip_high)
            weights = train_rl.loss_weights(batch.response_mask[rows], self.c.loss_agg, self.c.minibatch_size, tokens)
            loss = (weights * (pg_loss + self.c.kl_loss_coeff * kl_loss)).sum()
            loss.backward()
            total += loss.item()
        return total

    def weights(self):
        for name, parameter in self.hf.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                yield hub_name(name), parameter.detach().to(self.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# train_rl.py's way: all calls of its functions that Plain has another way for

class Rows(NamedTuple):
    """What minibatch_gradient needs of a Trajectory."""
    query_responses: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    image_features: list


class Ours:
    def __init__(self, c, folder, world, dtype, banned_ids):
        self.c, self.dtype, self.world = c, dtype, world
        flags = c.train_llm, c.train_connector, c.train_vit
        self.policy, self.visual = load_policy(folder, world, dtype, banned_ids, *flags,
                                               activation_checkpointing=c.activation_checkpointing)
        self.reference = None
        if c.kl_loss_coeff or c.kl_reward_coeff:
            self.reference, _ = load_policy(folder, world, dtype, banned_ids, *flags, master=False, with_tower=False)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]

    def batch(self, queries, completions, pad_id):
        batch, self.features = make_batch(self.policy, queries, [x.token_ids for x in completions], pad_id,
                                          self.world.device)
        return batch

    def logprobs(self, batch, reference, first=0):
        return response_logprobs(self.reference if reference else self.policy, batch, self.features,
                                 self.c.max_tokens_per_microbatch, self.c.temperature, not reference, first)

    def gradient(self, batch, minibatch, logprobs, ref_logprobs, entropy, advantages, fill):
        c, trajectory = self.c, Rows(*batch, logprobs, ref_logprobs, entropy, self.features)
        tokens = batch.response_mask[minibatch].sum().item()
        sums = train_rl.minibatch_gradient(self.policy, trajectory, advantages, minibatch, c.minibatch_size, tokens,
                                           c.loss_agg, c.clip_low, c.clip_high, c.kl_loss_coeff, c.temperature,
                                           c.max_tokens_per_microbatch, fill)
        return sums["pg_loss"] + c.kl_loss_coeff * sums["kl_loss"]

    def weights(self):
        return gather_weights(self.policy, self.dtype)


def open_data(c, folder):
    tokenizer, image_processor = load_processor(folder)
    train, validation = (path and Dataset(path, tokenizer, image_processor, c.min_pixels, c.max_pixels, c.max_prompt_tokens)
                         for path in (c.train_data, c.val_data))
    if len(train) < c.batch_size:
        raise UserError(f"{c.train_data}: {len(train)} rows do not fill one batch, batch_size={c.batch_size}")
    return tokenizer, train, validation


def our_steps(c, Way, fixed_length, eval_problems):
    """The loop of train_rl.py with a meter, one step a turn; Way: Ours or Plain."""
    folder = local_folder(c.model)
    tokenizer, train, validation = open_data(c, folder)
    world = start()
    dtype = compute_dtype(c.dtype, world.device)
    eos_ids, banned_ids = eos_token_ids(tokenizer, folder), banned_token_ids(tokenizer)
    if fixed_length:
        banned_ids = sorted({*banned_ids, *eos_ids})
    engine = open_engine(c.rollout, folder, dtype, world, eos_ids, banned_ids, c.max_prompt_tokens + c.max_new_tokens,
                         c.gpu_memory_utilization, c.seed)
    # rows whose old log-probabilities the first update makes, as in train_rl.py
    first = 0 if c.kl_reward_coeff or Way is Plain else c.minibatch_size
    way, hf = Way(c, folder, world, dtype, banned_ids), on_meta(load_config(folder))
    optimizer = torch.optim.AdamW(way.trained, c.learning_rate, (c.adam_beta1, c.adam_beta2), c.adam_eps, c.weight_decay,
                                  fused=True)
    sampling, per_epoch = Sampling(c.temperature, 1.0, c.max_new_tokens), len(train) // c.batch_size
    text = hf.config.text_config
    shape = c.max_tokens_per_microbatch, text.hidden_size, text.intermediate_size
    if validation:
        validation.samples = validation.samples[:eval_problems]
    info = {"device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine(),
            "dtype": str(dtype), "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in hf.parameters()),
            "versions": {p: version(p) for p in ("torch", "transformers", "trl")}}
    if c.keep_features and Way is Ours and way.visual is not None:
        keep_all(way.visual, train, range(len(train)))
    for step in turns(info):
        rate, meter = matrix_rate(world.device, dtype, *shape), Meter(world.device)
        with meter("data"):
            rows = order(len(train), c.seed, step // per_epoch)[step % per_epoch * c.batch_size:][:c.batch_size]
            pixels = encode(None, train, rows)
        with meter("vision"):
            encoded = encode(way.visual, train, rows, pixels) if Way is Ours else pixels
            queries = [encoded[i] for i in rows]
            del pixels
        with meter("rollout"):
            seeds = [request_seed(c.seed, step, train.samples[i].id, 0) for i in rows]
            engine.start(train, rows, seeds, sampling)
            completions = engine.collect(encoded)
            responses = [tokenizer.decode(x.token_ids, skip_special_tokens=True) for x in completions]
        batch = way.batch(queries, completions, tokenizer.pad_token_id)
        mask = batch.response_mask
        if c.old_logprobs == "trainer" or Way is Plain:
            with meter("old_logprobs"):
                logprobs, entropy = way.logprobs(batch, reference=False, first=first)
        else:
            logprobs = padded([x.logprobs for x in completions], mask)
            entropy = torch.zeros_like(logprobs)
        ref_logprobs = logprobs
        if way.reference is not None:
            with meter("ref_logprobs"):
                ref_logprobs, _ = way.logprobs(batch, reference=True)
        with meter("reward"):
            scores = rewards_of(c, responses, [train.samples[i].answer for i in rows],
                                [x.finish_reason == "stop" for x in completions])
        with meter("update"):
            kl = train_rl.k3(logprobs, ref_logprobs) * mask
            rewards = train_rl.token_rewards(torch.tensor(scores, device=world.device), kl, mask, c.kl_reward_coeff)
            advantages, losses, norms = train_rl.whiten(train_rl.discounted_returns(rewards, c.gamma), mask), [], []
            for minibatch in torch.arange(c.batch_size).split(c.minibatch_size) * c.ppo_epochs:
                fill = bool(first) and not losses
                losses.append(way.gradient(batch, minibatch, logprobs, ref_logprobs, entropy, advantages, fill))
                norms.append(torch.nn.utils.clip_grad_norm_(way.trained, c.clip_grad_norm or float("inf")))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        with meter("sync"):
            engine.load_weights(way.weights())
        if validation and Way is Ours:
            with meter("evaluation"):
                evaluate(engine, validation, tokenizer, c.max_new_tokens, c.seed, world, EVALS)
        lengths = mask.sum(1).tolist()
        norms = [getattr(x, "full_tensor", lambda x=x: x)().item() for x in norms]
        check = {"logprobs": logprobs[mask].tolist()[:48], "ref_logprobs": ref_logprobs[mask].tolist()[:48],
                 "entropy": entropy[mask].tolist()[:48], "losses": losses, "grad_norms": norms}  # for the tests
        flops = model_flops(hf, queries, lengths)
        if Way is Plain or way.visual is None or c.rollout == "vllm":  # the sampler has a tower of its own, and runs it
            flops["rollout"] += flops["vision"]
        if Way is Plain or way.visual is None or train.kept:  # not a part of its own here, or done before the steps
            del flops["vision"]
        if Way is Ours:
            flops["old_logprobs"] = model_flops(hf, queries[first:], lengths[first:])["old_logprobs"]
        report({"parts": meter.parts, "response_tokens": sum(lengths), "prompt_tokens": sum(len(x.ids) for x in queries),
                "longest": max(lengths), "flops": flops, "matrix_rate": rate, "check": check})
    engine.close()
    end()


def rewards_of(c, responses, answers, ended):
    """The score of each response, as train_rl.py makes it."""
    verdicts = judge_batch(list(zip(responses, answers)))
    return [c.no_eos_score if c.no_eos_score and not stop else
            v.correct + c.language_reward_coeff * language_reward(r) + c.format_reward_coeff * format_reward(r)
            for r, v, stop in zip(responses, verdicts, ended)]

"""Response collection: two engines behind the same methods, generate (or start and collect), load_weights and close.

    engine = open_engine("hf", model_dir, torch.float32, world, eos_ids, banned_ids, max_model_len=2048)
    completions = engine.generate(dataset, indices, seeds, Sampling(1.0, 1.0, 512))   # one Completion per index
    engine.load_weights(named_tensors)                                                # hub names, full tensors

HFEngine: each process samples its own rows with its own unsharded copy of the model; right for small models.
VLLMEngine (rollout_vllm.py): each node has one vLLM in a process of its own, on the GPU after the training ones (or its CPU
build).
The node's first process owns it; the others send it indices and seeds and get token ids back. Every process can read
the dataset, so no image travels.

All methods are collective: every rank calls them in the same order, with rows of its own (none is fine). Both engines
sample from the same distribution, softmax(logits / temperature) over the ids that are not banned, cut to the top_p
nucleus; no penalty, no top_k, nothing from the checkpoint's generation_config.json but its EOS ids. Each request has a
seed of its own, so its tokens depend neither on the batch nor on the number of ranks. For one seed the engines differ.

Logprobs are those of the distribution at top_p 1, which training uses. With top_p below 1 vLLM renormalises them over
the nucleus and HFEngine does not: they are then for reading only.
"""
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from configurator import UserError
from decode import advance, empty_cache
from distributed import all_max
from model import encode, hub_name
from watch import progress, running

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
MAX_BATCH_TOKENS = 65536  # HF: rows x (query + response) of one batch: bounds the KV cache (3.8 GB for 7B, bf16)
PREFILL_TOKENS = 2048  # HF: query tokens that go through the model at once; more leave a CPU's caches
FOLDER = "nanomaye-weights-"  # vLLM: and its owner's pid, of the folders that a weight sync goes through
OWNER = "NANOMAYE_ENGINE_OWNER"  # environment of the engine's processes: pid of the process they must not outlive


class Sampling(NamedTuple):
    temperature: float
    top_p: float
    max_new_tokens: int


class Completion(NamedTuple):
    token_ids: list  # of int; the EOS that ended it included
    logprobs: list  # of float, one a token: log_softmax(logits / temperature), banned ids at -inf
    finish_reason: str  # 'stop': an EOS was sampled, 'length': max_new_tokens or max_model_len reached


def request_seed(seed, step, sample_id, k) -> int:
    """63 bits that depend on nothing but the arguments: the k-th response to one sample at one step of a run."""
    digest = hashlib.sha256(f"{seed} {step} {k} {sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def banned_token_ids(tokenizer) -> list:
    """Ids of the vision tokens. A sampled <|image_pad|> would be taken for an image by every later forward."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in VISION_TOKENS if token in vocabulary)


def eos_token_ids(tokenizer, model_dir) -> list:
    """Ids that end a response: the tokenizer's EOS and those of generation_config.json (two in Qwen's chat models)."""
    ids, path = {tokenizer.eos_token_id}, pathlib.Path(model_dir) / "generation_config.json"
    if path.exists():
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(eos) if isinstance(eos, list) else {eos}
    return sorted(ids - {None})


def open_engine(kind, model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization, seed):
    """The engine named kind ('hf' or 'vllm') with the weights in model_dir. Collective; raises UserError."""
    if kind == "hf":
        return HFEngine(model_dir, dtype, world, eos_ids, banned_ids, max_model_len)
    if kind == "vllm":
        from rollout_vllm import VLLMEngine  # which imports this file
        return VLLMEngine(model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization, seed)
    raise UserError(f"rollout must be 'vllm' or 'hf', got {kind!r}")


def check_alive(engine):
    """UserError on all ranks if the process of an engine has died: for callers that have no run to save. A collective."""
    if all_max(bool(engine.died)):
        raise UserError(f"the engine's process died ({engine.died or 'on another node'}); out of memory?")


# ---------------------------------------------------------------------------------------------------------------------
# HF: a decode loop over the model's own weights

def draw(logits, uniforms, banned_ids, temperature, top_p):
    """One token a row by inverse CDF, and its logprob before top_p. logits (B, V), uniforms (B,) float64 in [0, 1)
    -> tokens (B,) int64, logprobs (B,) float32."""
    logits = logits.float() / temperature
    logits[:, banned_ids] = -torch.inf
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    if top_p < 1:
        probs = probs.double()
        largest, order = probs.sort(dim=-1, descending=True, stable=True)
        largest[largest.cumsum(-1) - largest >= top_p] = 0  # a token stays if those before it have less than top_p
        probs = torch.zeros_like(probs).scatter_(-1, order, largest)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # the first id whose cdf exceeds the uniform: never one of probability 0. float32 sums differ by 1e-7 between batch
    # shapes; only a uniform that close to a step of the cdf could make another token of that
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def left_pad(rows, value):
    """Lists of ints -> (B, longest) int64, padded on the left with value."""
    longest = max(map(len, rows))
    return torch.tensor([[value] * (longest - len(row)) + row for row in rows])


class HFEngine:
    """The transformers model itself, one unsharded copy in each process."""
    busy = False  # whether it samples on its own: only vLLM, in its own process, can
    died = ""  # how its process ended, if it has one and that is gone: what generate gives then is to be thrown away
    interrupted = staticmethod(lambda: False)  # a run that may be told to stop sets it to what says so

    def __init__(self, model_dir, dtype, world, eos_ids, banned_ids, max_model_len, max_batch_tokens=MAX_BATCH_TOKENS):
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
        self.model.eval().requires_grad_(False).to(world.device)
        self.device, self.max_model_len, self.max_batch_tokens = world.device, max_model_len, max_batch_tokens
        self.eos_ids = torch.tensor(eos_ids, device=world.device)
        self.banned_ids = torch.tensor(banned_ids, dtype=torch.int64, device=world.device)
        # duplicates kept: a tied lm_head.weight arrives under its own name and lies in the embedding's storage
        self.parameters = {hub_name(name): p for name, p in self.model.named_parameters(remove_duplicate=False)}

    def start(self, *request):
        """The arguments of generate: this engine samples in the caller's process, so not before collect."""
        self.request = request

    def collect(self, known=()):
        return self.generate(*self.request, known)

    @torch.no_grad()
    def generate(self, dataset, indices, seeds, sampling, known=()):
        """A Completion for each of indices, in their order. Logprobs are those before top_p.
        known: {index: Query} from a caller whose tower has the same weights, so that no image is read or encoded twice."""
        assert len(indices) == len(seeds), f"{len(indices)=} {len(seeds)=}"
        queries = encode(self.model.model.visual, dataset, indices, known)
        # longest first: rows of one batch are about equally long, and what does not fit shows at once
        queue = sorted(range(len(indices)), key=lambda r: (-len(queries[indices[r]].ids), indices[r], r))
        completions = [None] * len(indices)
        while queue:
            length = len(queries[indices[queue[0]]].ids) + sampling.max_new_tokens
            size = max(1, self.max_batch_tokens // length)
            batch, queue = queue[:size], queue[size:]
            done = self.generate_batch([queries[indices[r]] for r in batch], [seeds[r] for r in batch], sampling)
            for r, completion in zip(batch, done):
                completions[r] = completion
        return completions

    def generate_batch(self, queries, seeds, sampling):
        """Completions for queries that fit in memory together."""
        limits = [min(sampling.max_new_tokens, self.max_model_len - len(query.ids)) for query in queries]
        n = max(limits)
        assert min(limits) > 0, f"a query is {1 - min(limits)} tokens too long for {self.max_model_len=}"
        different = {id(query): query for query in queries}  # responses to one query share its way through the model
        number = {key: i for i, key in enumerate(different)}
        line = torch.tensor([number[id(query)] for query in queries], device=self.device)  # (rows,)
        query_ids, grids, features = zip(*different.values())
        # one uniform per (request, position), whatever else is in the batch
        uniforms = torch.from_numpy(np.stack([np.random.default_rng(s).random(n) for s in seeds])).to(self.device)
        pad_id = self.eos_ids[0].item()
        input_ids = left_pad(query_ids, pad_id).to(self.device)  # (B, Q)
        mask = left_pad([[1] * len(q) for q in query_ids], 0).to(self.device)
        is_image = (input_ids == self.model.config.image_token_id) & mask.bool()
        grid = torch.cat(grids).to(self.device)
        positions, _ = self.model.model.get_rope_index(input_ids, mm_token_type_ids=is_image.int(), image_grid_thw=grid,
                                                       attention_mask=mask)  # (3, B, Q)
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(is_image[..., None], torch.cat(features).to(embeds.dtype))
        position = positions.amax((0, 2)) + 1  # (B,) of the next token, the same in all three M-RoPE rows

        text, (B, Q) = self.model.model.language_model, input_ids.shape
        hide = torch.finfo(embeds.dtype).min  # not -inf: padding before a row's first token sees nothing else, and no nan
        bias = embeds.new_zeros(B, 1, 1, Q + n)
        bias[:, 0, 0, :Q].masked_fill_(mask == 0, hide)
        causal = embeds.new_full((Q, Q), hide).triu(1)
        cache, few = empty_cache(text, B, Q + n), max(1, PREFILL_TOKENS // Q)
        hidden = torch.cat([  # (B, H) of the last query token
            advance(text, embeds[part], positions[:, part], torch.minimum(bias[part, ..., :Q], causal),
                    [kv[:, part] for kv in cache], 0) for part in (slice(i, i + few) for i in range(0, B, few))])

        if len(line) > B:
            for i, kv in enumerate(cache):  # one layer at a time: no second cache in memory
                cache[i] = kv[:, line]
            B, hidden, bias, position = len(line), hidden[line], bias[line], position[line]
        tokens = torch.full((B, n), pad_id, device=self.device)
        logprobs = torch.zeros((B, n), device=self.device)
        limits = torch.tensor(limits, device=self.device)
        lengths = torch.zeros_like(limits)  # 0 until a row has ended
        row = torch.arange(B, device=self.device)  # which of rows each line of the shrinking batch is
        for t in range(n):
            token, logprob = draw(self.model.lm_head(hidden), uniforms[row, t], self.banned_ids, sampling.temperature,
                                  sampling.top_p)
            tokens[row, t], logprobs[row, t] = token, logprob
            ends = (torch.isin(token, self.eos_ids) | (t + 1 == limits[row])) & (lengths[row] == 0)
            lengths[row] = torch.where(ends, t + 1, lengths[row])
            live = (lengths[row] == 0).nonzero()[:, 0]  # the one wait for the device in each step
            if not len(live):
                break
            progress()
            if self.interrupted():  # what there is comes back, and the caller throws it away
                lengths[lengths == 0] = t + 1
                break
            if len(live) <= 0.75 * len(row):  # ended rows leave the batch and the cache; a few are cheaper to keep
                for i, kv in enumerate(cache):
                    cache[i] = kv[:, live]
                row, bias, token, position = row[live], bias[live], token[live], position[live]
            hidden = advance(text, text.embed_tokens(token[:, None]), position.expand(3, -1)[..., None],
                             bias[..., :Q + t + 1], cache, Q + t)
            position = position + 1
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
        return [Completion(ids[:length], lps[:length], "stop" if stop else "length") for ids, lps, length, stop in
                zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), torch.isin(last, self.eos_ids).tolist())]

    @torch.no_grad()
    def load_weights(self, named_tensors):
        """Copies the tensors in place. named_tensors: an iterator of (hub name, full tensor), any device and dtype."""
        for name, tensor in named_tensors:
            if name not in self.parameters:
                raise ValueError(f"load_weights: the model has no parameter {name!r}")
            if self.parameters[name].shape != tensor.shape:
                raise ValueError(f"load_weights: {name} is {tuple(tensor.shape)}, "
                                 f"the model's is {tuple(self.parameters[name].shape)}")
            self.parameters[name].copy_(tensor)

    def close(self):
        self.model = self.parameters = None


# ---------------------------------------------------------------------------------------------------------------------
# vLLM's processes (rollout_vllm.py) import this file, by way of the main script: they must not outlive it

def end_with(owner):
    """Ends this process of the engine, and the engine's process above it, soon after owner is gone, by kill -9 too:
    vLLM's own would stay and hold the GPU's memory."""
    while running(owner):
        time.sleep(0.5)
    for memory in ("/dev/shm", tempfile.gettempdir()):
        for folder in pathlib.Path(memory).glob(f"{FOLDER}{owner}-*"):
            shutil.rmtree(folder, ignore_errors=True)  # weights that were on their way
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != owner and parent.pid == os.getppid():
        os.kill(parent.pid, signal.SIGKILL)  # the engine's process, when this one is its worker
    os._exit(1)


# spawned processes of the engine import this file, by way of the main script or as home of WeightReceiver
if os.environ.get(OWNER, str(os.getpid())) != str(os.getpid()):
    os.setpgrp()  # Ctrl-C in a terminal reaches its whole group: it is meant for the trainer, which ends the engine
    threading.Thread(target=end_with, args=(int(os.environ[OWNER]),), daemon=True).start()

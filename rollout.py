"""Response collection: two engines behind the same three methods, generate, load_weights and close.

    engine = open_engine("hf", model_dir, torch.float32, world, eos_ids, banned_ids, max_model_len=2048)
    completions = engine.generate(dataset, indices, seeds, Sampling(1.0, 1.0, 512))   # one Completion per index
    engine.load_weights(named_tensors)                                                # hub names, full tensors

HFEngine: each process samples its own rows with its own unsharded copy of the model; right for small models.
VLLMEngine: each node has one vLLM in a process of its own, on the GPU after the training ones (or vLLM's CPU build).
The node's first process owns it; the others send it indices and seeds and get token ids back. Every process can read
the dataset, so no image travels.

All methods are collective: every rank calls them in the same order, with rows of its own (none is fine). Both engines
sample from the same distribution, softmax(logits / temperature) over the ids that are not banned, cut to the top_p
nucleus; no penalty, no top_k, nothing from the checkpoint's generation_config.json but its EOS ids. Each request has a
seed of its own, so its tokens depend neither on the batch nor on the number of ranks. For one seed the engines differ.

Logprobs are those of the distribution at top_p 1, which training uses. With top_p below 1 vLLM renormalises them over
the nucleus and HFEngine does not: they are then for reading only.
"""
import atexit
import hashlib
import importlib.util
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
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, DynamicCache

from configurator import UserError
from distributed import all_max, gather_json, together
from model import Weights, encode_images, hub_name, load_config
from watch import progress, running

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
MAX_BATCH_TOKENS = 65536  # HF: rows x (query + response) of one batch: bounds the KV cache (3.8 GB for 7B, bf16)
IMAGES_IN_MEMORY = 32  # HF: images read, and encoded, before the next are
MAX_SHARD_BYTES = 2 * 2**30  # vLLM: a weight sync writes files of about this size, and holds one of them in memory
BAN = -100.0  # vLLM: the lowest logit bias it takes; e^-100 of a typical token's probability
FOLDER = "nanomaye-weights-"  # vLLM: and its owner's pid, of the folders that a weight sync goes through
OWNER = "NANOMAYE_ENGINE_OWNER"  # environment of the engine's processes: pid of the process they must not outlive
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


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
        return VLLMEngine(model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization, seed)
    raise UserError(f"rollout must be 'vllm' or 'hf', got {kind!r}")


def check_alive(engine):
    """UserError on all ranks if the process of an engine has died: for callers that have no run to save. A collective."""
    if all_max(bool(engine.died)):
        raise UserError(f"the engine's process died ({engine.died or 'on another node'}); out of memory?")


# ---------------------------------------------------------------------------------------------------------------------
# HF: a decode loop over the model's own forward

def draw(logits, uniforms, banned_ids, temperature, top_p):
    """One token a row by inverse CDF, and its logprob before top_p. logits (B, V), uniforms (B,) float64 in [0, 1)
    -> tokens (B,) int64, logprobs (B,) float32."""
    logits = logits.float() / temperature
    logits[:, banned_ids] = -torch.inf
    logprobs = logits.log_softmax(-1)
    probs = logprobs.double().exp()
    if top_p < 1:
        largest, order = probs.sort(dim=-1, descending=True, stable=True)
        largest[largest.cumsum(-1) - largest >= top_p] = 0  # a token stays if those before it have less than top_p
        probs = torch.zeros_like(probs).scatter_(-1, order, largest)
    cdf = probs.cumsum(-1)
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

    @torch.no_grad()
    def generate(self, dataset, indices, seeds, sampling):
        """A Completion for each of indices, in their order. Logprobs are those before top_p."""
        assert len(indices) == len(seeds), f"{len(indices)=} {len(seeds)=}"
        images = self.encode(dataset, sorted(set(indices)))
        # longest first: rows of one batch are about equally long, and what does not fit shows at once
        queue = sorted(range(len(indices)), key=lambda r: (-len(images[indices[r]][0]), indices[r], r))
        completions = [None] * len(indices)
        while queue:
            length = len(images[indices[queue[0]]][0]) + sampling.max_new_tokens
            size = max(1, self.max_batch_tokens // length)
            batch, queue = queue[:size], queue[size:]
            done = self.generate_batch([images[indices[r]] for r in batch], [seeds[r] for r in batch], sampling)
            for r, completion in zip(batch, done):
                completions[r] = completion
        return completions

    def encode(self, dataset, indices):
        """{index: (query_ids, grid_thw (1, 3), features (tokens, hidden))}: the tower runs once per image, however many
        responses it gets. Only the features stay in memory, not the pixels."""
        encoded = {}
        for start in range(0, len(indices), IMAGES_IN_MEMORY):
            chunk = [(i, dataset.inputs(i)) for i in indices[start:start + IMAGES_IN_MEMORY]]
            features = encode_images(self.model.model.visual, [inputs for _, inputs in chunk])
            encoded |= {i: (inputs.query_ids, inputs.grid_thw, f) for (i, inputs), f in zip(chunk, features)}
        return encoded

    def generate_batch(self, rows, seeds, sampling):
        """Completions for rows of (query_ids, grid_thw, features) that fit in memory together."""
        query_ids, grids, features = zip(*rows)
        limits = [min(sampling.max_new_tokens, self.max_model_len - len(q)) for q in query_ids]
        n = max(limits)
        assert min(limits) > 0, f"a query of {max(map(len, query_ids))} tokens leaves no room in {self.max_model_len=}"
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

        cache = DynamicCache()
        tokens = torch.full((len(rows), n), pad_id, device=self.device)
        logprobs = torch.zeros((len(rows), n), device=self.device)
        limits = torch.tensor(limits, device=self.device)
        lengths = torch.zeros_like(limits)  # 0 until a row has ended
        row = torch.arange(len(rows), device=self.device)  # which of rows each line of the shrinking batch is
        step = dict(inputs_embeds=embeds, position_ids=positions)
        for t in range(n):
            output = self.model(**step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, logprob = draw(output.logits[:, -1], uniforms[row, t], self.banned_ids, sampling.temperature,
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
                cache.batch_select_indices(live)
                row, mask, token, position = row[live], mask[live], token[live], position[live]
            mask = torch.cat([mask, mask.new_ones(len(row), 1)], 1)
            step = dict(input_ids=token[:, None], position_ids=position.expand(3, -1)[..., None])
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
# vLLM: in a process of its own, owned by the node's first process

class VLLMEngine:
    """One vLLM per node. The leader (local rank 0) drives it; what fails there is raised on all the node's ranks. That its
    process dies raises nothing: generate and load_weights return at once from then on, with died set on all the node's
    ranks, so that a run can leave a checkpoint before it ends."""
    died = ""
    interrupted = staticmethod(lambda: False)  # as HFEngine's

    def __init__(self, model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization, seed):
        if importlib.util.find_spec("vllm") is None:
            raise UserError("rollout=vllm: vLLM is not installed here; pip install -r requirements-vllm.txt on a GPU "
                            "machine, or use --rollout=hf")
        self.group, self.dtype, self.eos_ids, self.banned_ids = world.node_group, dtype, eos_ids, banned_ids
        self.shapes = {name: tuple(file.get_slice(stored).get_shape())
                       for name, (file, stored) in Weights(model_dir).where.items()}
        self.tied = load_config(model_dir).tie_word_embeddings
        self.leader, self.llm, self.processes = world.local_rank == 0, None, []
        with self.agreement():
            if self.leader:
                before = set(multiprocessing.active_children())
                self.llm = start_vllm(model_dir, dtype, engine_gpu(world), max_model_len, gpu_memory_utilization, seed)
                self.processes = sorted(set(multiprocessing.active_children()) - before, key=lambda process: process.pid)
                atexit.register(self.close)

    def agreement(self):
        return together(self.group, "vLLM's process: ")

    def wait_for_vllm(self, act):
        """What act() returns; None if vLLM's process is gone, or goes meanwhile: then died says how. On the leader. In a
        thread, since vLLM (0.32.0) waits for ever for the outputs of a process that was killed."""
        outcome = []  # (result, error)

        def call():
            try:
                outcome.append((act(), None))
            except Exception as error:
                outcome.append((None, error))
        if self.died:
            return None
        thread = threading.Thread(target=call, daemon=True, name="vllm")
        thread.start()
        while thread.is_alive() and not self.end_of_process():
            thread.join(0.1)
        result, error = outcome[0] if outcome else (None, None)
        says_so = type(error).__name__ == "EngineDeadError"  # known before the process has ended
        until = time.monotonic() + (10 if says_so else 1)
        while error is not None and not self.end_of_process() and time.monotonic() < until:
            time.sleep(0.1)
        self.died = self.end_of_process() or says_so * "a part of it is gone"
        if error is not None and not self.died:
            raise error
        return None if self.died else result

    def end_of_process(self):
        """How vLLM's process ended; '' while it runs."""
        codes = [process.exitcode for process in self.processes if process.exitcode is not None]
        return f"killed by signal {-codes[0]}" if codes and codes[0] < 0 else f"exit code {codes[0]}" if codes else ""

    def tell_all(self):
        """The node's ranks learn from the leader whether the process has died."""
        self.died = gather_json(self.died, self.group)[0]

    def generate(self, dataset, indices, seeds, sampling):
        """A Completion for each of this rank's indices, in their order."""
        assert len(indices) == len(seeds), f"{len(indices)=} {len(seeds)=}"
        requests = gather_json([list(map(int, indices)), list(map(int, seeds))], self.group)
        counts = [len(i) for i, _ in requests]
        flat = [(i, s) for rank in requests for i, s in zip(*rank)]
        outputs = []
        with self.agreement():
            if self.leader:
                outputs = self.wait_for_vllm(lambda: self.sample(dataset, flat, sampling)) or self.nothing(flat)
        self.tell_all()
        # the leader's answer to all ranks, flat, as tensors: length and finish of each request, then ids and logprobs
        table = torch.tensor([[len(c.token_ids), c.finish_reason == "stop"] for c in outputs]
                             or [[0, 0]] * len(flat), dtype=torch.int64).reshape(len(flat), 2)
        self.broadcast(table)
        total = int(table[:, 0].sum())
        ids = torch.tensor([t for c in outputs for t in c.token_ids] or [0] * total, dtype=torch.int64)
        logprobs = torch.tensor([x for c in outputs for x in c.logprobs] or [0] * total, dtype=torch.float32)
        self.broadcast(ids)
        self.broadcast(logprobs)
        lengths = table[:, 0].tolist()
        completions = [Completion(i.tolist(), x.tolist(), "stop" if stop else "length") for i, x, stop in
                       zip(ids.split(lengths), logprobs.split(lengths), table[:, 1].tolist())] if flat else []
        rank = dist.get_rank(self.group)
        start = sum(counts[:rank])
        return completions[start:start + counts[rank]]

    def nothing(self, requests):
        """As many completions as requests; the caller throws them away."""
        return [Completion([self.eos_ids[0]], [0.0], "stop")] * len(requests)

    def broadcast(self, tensor):
        if tensor.numel():
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def sample(self, dataset, requests, sampling):
        """Completions for requests of (index, seed), on the leader."""
        from vllm import SamplingParams
        common = dict(temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
                      top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
                      ignore_eos=True, stop_token_ids=self.eos_ids, logit_bias={i: BAN for i in self.banned_ids},
                      logprobs=0, detokenize=False)  # logprobs=0: of the sampled token alone
        inputs = {i: dataset.inputs(i)._replace(pixel_values=None) for i in sorted({i for i, _ in requests})}
        # requests for one image side by side: its features are computed once
        order = sorted(range(len(requests)), key=lambda r: (requests[r][0], r))
        prompts = [{"prompt": inputs[i].prompt, "multi_modal_data": {"image": inputs[i].image}}
                   for i, _ in (requests[r] for r in order)]
        params = [SamplingParams(seed=requests[r][1], **common) for r in order]
        completions, outputs = [None] * len(requests), []
        self.llm.enqueue(prompts, params, use_tqdm=False)
        while self.llm.llm_engine.has_unfinished_requests():  # LLM.generate, but for the next two lines
            progress()
            if self.interrupted():
                return self.nothing(requests)
            outputs += [output for output in self.llm.llm_engine.step() if output.finished]
        for r, output in zip(order, sorted(outputs, key=lambda output: int(output.request_id))):
            i, out = requests[r][0], output.outputs[0]
            if output.prompt_token_ids != inputs[i].query_ids:
                raise ValueError(f"sample {i}: vLLM's prompt is not the trainer's (image size, chat template?): "
                                 f"{len(output.prompt_token_ids)} ids {output.prompt_token_ids} against "
                                 f"{len(inputs[i].query_ids)} ids {inputs[i].query_ids}")
            if out.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"sample {i}: vLLM ended a response with {out.finish_reason!r}")
            ids = list(out.token_ids)
            completions[r] = Completion(ids, [lp[t].logprob for t, lp in zip(ids, out.logprobs)], out.finish_reason)
        return completions

    def load_weights(self, named_tensors):
        """New weights by way of safetensors files in memory (/dev/shm) or on disk. Raises unless each tensor given is
        known, has its shape, and was taken by vLLM's loader. A frozen part is left out, a module is given whole."""
        error, folder, sent, shard, room = None, None, [], {}, MAX_SHARD_BYTES
        size = sum(torch.Size(s).numel() for s in self.shapes.values()) * self.dtype.itemsize
        try:
            for name, tensor in named_tensors:  # a collective: run to its end on every rank, whatever happens here
                sent.append(name)
                if not self.leader or error is not None:
                    continue
                try:
                    folder = folder or weights_folder(size)
                    self.check_tensor(name, tensor)
                    if self.tied and name == "lm_head.weight":
                        continue  # the embedding again
                    # a copy: the iterator may reuse its buffer
                    shard[name] = tensor.detach().to("cpu", self.dtype, copy=True).contiguous()
                    room -= shard[name].nbytes
                    if room <= 0:
                        save_file(shard, folder / f"{len(sent):06d}.safetensors")
                        shard, room = {}, MAX_SHARD_BYTES
                except Exception as e:
                    error = e
            with self.agreement():
                if error is not None:
                    raise error
                if self.leader and sent:
                    self.check_whole(sent)
                    save_file(shard, folder / f"{len(sent):06d}.safetensors")
                    self.wait_for_vllm(lambda: self.swap(folder, sent))
            self.tell_all()
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def check_tensor(self, name, tensor):
        stored = "model.embed_tokens.weight" if self.tied and name == "lm_head.weight" else name
        if stored not in self.shapes:
            raise ValueError(f"load_weights: the model has no parameter {name!r}")
        if tuple(tensor.shape) != self.shapes[stored]:
            raise ValueError(f"load_weights: {name} is {tuple(tensor.shape)}, the model's is {self.shapes[stored]}")

    def check_whole(self, sent):
        """vLLM fuses q, k and v, gate and up: were one of them missing, it would fill its place with noise."""
        def block(name):
            return name.rsplit(".", 2)[0]
        blocks = {block(name) for name in sent}
        missing = sorted(name for name in self.shapes if block(name) in blocks and name not in set(sent))
        if missing:
            raise ValueError(f"load_weights: {len(missing)} tensors are missing, such as {missing[0]}")

    def swap(self, folder, sent):
        """The engine takes the files; everything computed from the old weights is dropped."""
        if self.tied and "model.embed_tokens.weight" in sent:
            sent = [*sent, "lm_head.weight"]  # vLLM's CPU build packs a copy of the head: without its name it stays old
        arrived, = self.llm.collective_rpc("receive_weights", args=(str(folder), self.tied))
        if set(arrived) != set(sent):
            raise RuntimeError(f"load_weights: not all weights arrived in vLLM: {sorted(set(sent) ^ set(arrived))}")
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_prefix_cache()

    def close(self):
        """Ends the engine's process. Safe to call twice."""
        llm, self.llm = self.llm, None
        if llm is not None:
            atexit.unregister(self.close)
            llm.llm_engine.engine_core.shutdown(timeout=30)


def weights_folder(size):
    """A new folder for size bytes: in /dev/shm when it has room, else in the system's folder for temporary files."""
    memory = pathlib.Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * size
    return pathlib.Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=memory if fits else None))


def engine_gpu(world):
    """CUDA_VISIBLE_DEVICES for the engine: the GPU after the node's training processes; None on CPU."""
    if world.device.type == "cpu":
        return None
    count = torch.cuda.device_count()
    if count <= world.local_world_size:
        raise UserError(f"rollout=vllm needs a GPU for vLLM after the {world.local_world_size} that train, but {count} "
                        "can be seen; lower torchrun's --nproc_per_node or use --rollout=hf")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return visible.split(",")[world.local_world_size]


def start_vllm(model_dir, dtype, gpu, max_model_len, gpu_memory_utilization, seed):
    """A vllm.LLM whose engine's processes end when this one does. gpu None: vLLM's CPU build."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings fill a page at each start; none asks for action
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would report to its makers
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"], os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "1", "spawn"
    settings = dict(gpu_memory_utilization=gpu_memory_utilization)
    if gpu is None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        # eager, and TORCH_COMPILE_DISABLE below: compiling takes 20 s and a C++ compiler. No prompt in pieces: the CPU
        # build then fails on a request with a seed ("CPU Generator does not use offset")
        settings = dict(enforce_eager=True, enable_chunked_prefill=False,
                        max_num_batched_tokens=max(8192, max_model_len))
    image = json.loads((pathlib.Path(model_dir) / "preprocessor_config.json").read_text(encoding="utf-8"))
    factor = (image.get("patch_size", 14) * image.get("merge_size", 2)) ** 2  # pixels per image token
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(TORCHRUN):
            del os.environ[name]  # else vLLM would take itself for one of torchrun's ranks
    os.environ[OWNER] = str(os.getpid())
    # Python's tracker of shared memory frees what a killed engine leaves, and need not say so after our last word
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [saved.get("PYTHONWARNINGS"), "ignore:resource_tracker"]))
    os.environ |= {"TORCH_COMPILE_DISABLE": "1"} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    try:
        from vllm import LLM
        return LLM(
            model_dir, dtype=str(dtype).removeprefix("torch."), seed=seed, max_model_len=max_model_len, **settings,
            generation_config="vllm",  # not the checkpoint's: it may hold a repetition penalty
            logprobs_mode="processed_logprobs",  # after temperature and bans
            limit_mm_per_prompt={"image": 1, "video": 0}, mm_processor_cache_gb=1, enable_prefix_caching=False,
            # images come at their final size: any bounds that let them through as they are
            mm_processor_kwargs=dict(size=dict(shortest_edge=factor, longest_edge=factor * max_model_len)),
            worker_extension_cls="rollout.WeightReceiver", use_tqdm_on_load=False)
    finally:
        os.environ.clear()  # vLLM sets some of its own as well
        os.environ.update(saved)


class WeightReceiver:
    """Added to vLLM's worker, in the engine's process."""

    def receive_weights(self, folder, tied):
        """Loads every tensor in folder; the hub names of those that vLLM's loader has taken."""
        arrived = []

        def tensors():
            for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    for name in file.keys():
                        names = [name]
                        if tied and name == "model.embed_tokens.weight":
                            names = [name, "lm_head.weight"]
                        for alias in names:
                            yield alias, file.get_tensor(name)
                            arrived.append(alias)  # it asked for the next one: this one is in
        self.reload_weights(weights_iterator=tensors())
        return arrived


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

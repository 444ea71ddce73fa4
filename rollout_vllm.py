"""vLLM in a process of its own, owned by the node's first process: the engine 'vllm' of rollout.py.

The leader hands requests over and takes outputs and weights; the node's other ranks get theirs from it. The engine's process
is watched: vLLM (0.32) waits for ever for one that was killed.
"""
import atexit
import importlib.util
import json
import multiprocessing
import os
import pathlib
import threading
import time

import torch
import torch.distributed as dist

from configurator import UserError
from data import open_readers
from distributed import gather_json, together
from model import Weights, load_config
from rollout import OWNER, Completion
from watch import progress
from weight_sync import FileSync, NCCLSync

BAN = -100.0  # the lowest logit bias that vLLM takes; e^-100 of a typical token's probability
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


class VLLMEngine:
    """One vLLM per node. The leader (local rank 0) drives it; what fails there is raised on all the node's ranks. That its
    process dies raises nothing: all methods return at once from then on, with died set on all the node's ranks, so that a
    run can leave a checkpoint before it ends."""
    died = ""
    busy = False  # between start and collect
    interrupted = staticmethod(lambda: False)  # as HFEngine's

    def __init__(self, model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization, seed):
        if importlib.util.find_spec("vllm") is None:
            raise UserError("rollout=vllm: vLLM is not installed here; pip install -r requirements-vllm.txt on a GPU "
                            "machine, or use --rollout=hf")
        self.group, self.dtype, self.eos_ids, self.banned_ids = world.node_group, dtype, eos_ids, banned_ids
        self.shapes = {name: tuple(file.get_slice(stored).get_shape())
                       for name, (file, stored) in Weights(model_dir).where.items()}
        self.tied, self.device = load_config(model_dir).tie_word_embeddings, world.device
        self.leader, self.llm, self.nccl, self.processes = world.local_rank == 0, None, None, []
        with self.agreement():
            if self.leader:
                before = set(multiprocessing.active_children())
                self.llm = start_vllm(model_dir, dtype, engine_gpu(world), max_model_len, gpu_memory_utilization, seed)
                self.processes = sorted(set(multiprocessing.active_children()) - before, key=lambda process: process.pid)
                atexit.register(self.close)

    def agreement(self):
        return together(self.group, "vLLM's process: ")

    def wait_for_vllm(self, act):
        """What act() returns; None if vLLM's process is gone, or goes meanwhile: then died says how. On the leader."""
        return self.finish(*self.begin(act))

    def begin(self, act):
        """Calls act() in a thread, which stays behind if vLLM's process does not come back. Returns what finish takes."""
        outcome = []  # (result, error)

        def call():
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # a thread starts with GPU 0
                outcome.append((act(), None))
            except Exception as error:
                outcome.append((None, error))
        thread = threading.Thread(target=call, daemon=True, name="vllm")
        if not self.died:
            thread.start()
        return thread, outcome

    def finish(self, thread, outcome):
        """What wait_for_vllm returns, of a call that has begun."""
        if self.died:
            return None
        while thread.is_alive() and not self.end_of_process():
            thread.join(0.1)
        result, error = outcome[0] if outcome else (None, None)
        says_so = type(error).__name__ == "EngineDeadError"  # known before the process has ended
        until = time.monotonic() + (10 if says_so else 1)
        while error is not None and not self.end_of_process() and time.monotonic() < until:
            time.sleep(0.1)
        self.died = self.end_of_process() or says_so * "a part of it is gone"
        if self.died and self.nccl is not None:
            self.nccl.abort()
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

    # -----------------------------------------------------------------------------------------------------------------
    # sampling

    def generate(self, dataset, indices, seeds, sampling):
        """A Completion for each of this rank's indices, in their order."""
        self.start(dataset, indices, seeds, sampling)
        return self.collect()

    def start(self, dataset, indices, seeds, sampling):
        """Begins to hand over the requests of all ranks, and returns: vLLM's process samples while this one does something
        else. What goes wrong shows in collect."""
        assert len(indices) == len(seeds) and not self.busy, f"{len(indices)=} {len(seeds)=} {self.busy=}"
        requests = gather_json([list(map(int, indices)), list(map(int, seeds))], self.group)
        self.counts = [len(i) for i, _ in requests]
        self.requests = [(i, s) for rank in requests for i, s in zip(*rank)]
        self.busy = True
        if self.leader:
            self.handing_over = self.begin(lambda: self.enqueue(dataset, sampling))

    def enqueue(self, dataset, sampling):
        """{index: Inputs} of the requests, which vLLM's process has now. On the leader."""
        from vllm import SamplingParams
        common = dict(temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
                      top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
                      ignore_eos=True, stop_token_ids=self.eos_ids, logit_bias={i: BAN for i in self.banned_ids},
                      logprobs=0, detokenize=False)  # logprobs=0: of the sampled token alone
        # requests for one image side by side: its features are computed once
        self.order = sorted(range(len(self.requests)), key=lambda r: (self.requests[r][0], r))
        requests, rows = [self.requests[r] for r in self.order], sorted({i for i, _ in self.requests})
        with open_readers() as readers:
            inputs = dict(zip(rows, readers.map(lambda i: dataset.inputs(i, pixels=False), rows)))
        prompts = [{"prompt": inputs[i].prompt, "multi_modal_data": {"image": inputs[i].image}} for i, _ in requests]
        # all at once: on a CPU, image by image as they are read was slower, with few rows in vLLM's first batches
        self.llm.enqueue(prompts, [SamplingParams(seed=seed, **common) for _, seed in requests], use_tqdm=False)
        return {i: x._replace(image=None) for i, x in inputs.items()}

    def collect(self, known=(), whole=False):
        """The Completions of the requests that start got, once all are there. After an interruption, which whole ignores,
        placeholders. known: as HFEngine's; vLLM makes features of its own."""
        outputs, self.busy, flat = [], False, self.requests
        interrupted = (lambda: False) if whole else self.interrupted
        nothing = [Completion([self.eos_ids[0]], [0.0], "stop")] * len(flat)  # the caller throws it away
        with self.agreement():
            if self.leader:
                self.inputs = self.finish(*self.handing_over)
                outputs = self.wait_for_vllm(lambda: self.outputs(interrupted)) or nothing
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
        start = sum(self.counts[:rank])
        return completions[start:start + self.counts[rank]]

    def broadcast(self, tensor):
        if tensor.numel():
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def outputs(self, interrupted):
        """Completions of all requests, on the leader; None after an interruption."""
        completions, outputs = [None] * len(self.requests), []
        while self.llm.llm_engine.has_unfinished_requests():  # LLM.generate, but for the next two lines
            progress()
            if interrupted():
                return None
            outputs += [output for output in self.llm.llm_engine.step() if output.finished]
        for r, output in zip(self.order, sorted(outputs, key=lambda output: int(output.request_id))):
            i, out = self.requests[r][0], output.outputs[0]
            query_ids = self.inputs[i].query_ids
            if output.prompt_token_ids != query_ids:
                raise ValueError(f"sample {i}: vLLM's prompt is not the trainer's (image size, chat template?): "
                                 f"{len(output.prompt_token_ids)} ids {output.prompt_token_ids} against "
                                 f"{len(query_ids)} ids {query_ids}")
            if out.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"sample {i}: vLLM ended a response with {out.finish_reason!r}")
            ids = list(out.token_ids)
            completions[r] = Completion(ids, [lp[t].logprob for t, lp in zip(ids, out.logprobs)], out.finish_reason)
        return completions

    # -----------------------------------------------------------------------------------------------------------------
    # new weights

    def load_weights(self, named_tensors):
        """New weights: over NCCL to a GPU, by way of files to the CPU build. Raises unless each tensor given is known, has
        its shape, and was taken by vLLM's loader. A frozen part is left out, a module is given whole."""
        assert not self.busy, "the engine is sampling: collect first"
        error, sync, sent = None, None, []
        try:
            for name, tensor in named_tensors:  # a collective: run to its end on every rank, whatever happens here
                sent.append(name)
                if not self.leader or error is not None or self.died:
                    continue
                try:
                    self.check_tensor(name, tensor)
                    sync = sync or self.open_sync()
                    self.wait_for_vllm(lambda sync=sync, name=name, tensor=tensor: sync.add(name, tensor))
                except Exception as e:
                    error = e
            with self.agreement():
                if error is not None:
                    raise error
                if self.leader and sent:
                    self.check_whole(sent)
                    self.wait_for_vllm(lambda: self.swap(sync))
            self.tell_all()
        finally:
            if sync is not None:
                sync.close()

    def open_sync(self):
        if self.device.type != "cuda":
            size = sum(torch.Size(s).numel() for s in self.shapes.values()) * self.dtype.itemsize
            return FileSync(self.llm, self.dtype, self.tied, size)
        self.nccl = self.nccl or self.wait_for_vllm(lambda: NCCLSync(self.llm, self.dtype, self.tied))
        return self.nccl

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

    def swap(self, sync):
        """The engine samples from what was added; everything computed from the old weights is dropped."""
        sync.finish()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_prefix_cache()

    def close(self):
        """Ends the engine's process. Safe to call twice."""
        llm, self.llm = self.llm, None
        if llm is not None:
            atexit.unregister(self.close)
            llm.llm_engine.engine_core.shutdown(timeout=30)


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
    # vLLM's own weight transfer, see NCCLSync
    settings = dict(gpu_memory_utilization=gpu_memory_utilization, weight_transfer_config=dict(backend="nccl"))
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
            worker_extension_cls="weight_sync.WeightReceiver", use_tqdm_on_load=False)
    finally:
        os.environ.clear()  # vLLM sets some of its own as well
        os.environ.update(saved)

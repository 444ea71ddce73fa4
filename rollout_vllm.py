"""vLLM in a process of its own: the engine 'vllm' of rollout.py.

This file is both ends of two pipes. VLLMEngine stands in the trainer: a node's first rank, its leader, runs
`python rollout_vllm.py`, and the other ranks get their responses from it. A request is a line of JSON:

    ["sample", rows, pixels, sampling]   the answer, a line of JSON too, is what collect takes apart
    ["load_weights"]                     then each tensor, a line [name, dtype, shape] and its bytes (on a
                                         GPU of its own by NCCL), then []; answered once vLLM has them

Pictures do not travel, the server opens them itself. It dies with its parent, and an error of vLLM's ends it.
Where a machine's only GPU trains, the server shares it: vLLM opens before the trainer does, and sleeps after
that and after sampling: weights move to the host, the cache is dropped. Loading wakes the weights, sampling
wakes both.
"""
import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist

from configurator import UserError
from data import Completion, Sampling, open_readers, read_image
from distributed import gather_json
from model import CONNECTOR, load_config, open_weights

BAN = -100.0  # the lowest logit bias that vLLM takes: e^-100 of a typical token's probability
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
# connector, tower, language model: trained whole or not at all
PARTS = (tuple(f"model.visual.{name}" for name in CONNECTOR), "model.visual.", "")


class VLLMEngine:
    """One vLLM a node. Its methods are collectives; once the server has died, they raise on all its ranks.
    The constructor waits for vLLM only where it shares the GPU; else vLLM starts while the trainer loads, and
    if that fails, the first use says so. trains: whether this process trains; else vLLM may have its GPU."""

    def __init__(self, model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization,
                 trains=True):
        if importlib.util.find_spec("vllm") is None:
            raise UserError("rollout=vllm: no vLLM; pip install -r requirements-vllm.txt or set --rollout=hf")
        self.group, self.leader, self.device = world.node_group, world.local_rank == 0, world.device
        self.shared = trains and shares_gpu(world)
        self.dtype = str(dtype).removeprefix("torch.")
        self.names = {*open_weights(model_dir), "lm_head.weight"}  # the head also where it is tied
        self.dataset = self.nccl = None  # whose rows are being sampled; the group that weights travel in
        if self.leader:
            settings = dict(model_dir=model_dir, dtype=self.dtype, eos_ids=eos_ids, banned_ids=banned_ids,
                            max_model_len=max_model_len, gpu_memory_utilization=gpu_memory_utilization,
                            shared=self.shared)
            libc = ctypes.CDLL(None)  # here: between fork and exec it is too late
            self.stderr = tempfile.TemporaryFile()
            self.server = subprocess.Popen(
                [sys.executable, __file__, json.dumps(settings)], env=engine_environment(world, trains),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
                start_new_session=True,  # Ctrl-C is for the trainer, which finishes its step first
                preexec_fn=lambda: libc.prctl(1, signal.SIGKILL))  # PR_SET_PDEATHSIG: it ends when we do
        self.sleep()  # vLLM measures what is free: nobody else may allocate meanwhile

    def sleep(self):
        """The memory of a shared GPU is the trainer's from here on, until the next request."""
        if self.shared:
            self.tell("sleep")
            self.answer()

    def tell(self, *request, data=b""):
        """Sends a request to the server. On the leader."""
        try:
            self.server.stdin.writelines([json.dumps(request).encode(), b"\n", data])
            self.server.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: answer says so, on all ranks

    def answer(self):
        """The server's next answer, on every rank. A collective; RuntimeError when the server has died."""
        line = b""
        if self.leader and not (line := self.server.stdout.readline()).endswith(b"\n"):
            line = json.dumps({"died": self.last_words()}).encode()
        size = max(gather_json(len(line), self.group))
        text = torch.frombuffer(bytearray(line.ljust(size)), dtype=torch.uint8)
        dist.broadcast(text, group_src=0, group=self.group)
        answer = json.loads(text.numpy().tobytes())
        if isinstance(answer, dict):
            raise RuntimeError(answer["died"])
        return answer

    def last_words(self):
        """How the server ended, for an error. On the leader."""
        if self.nccl is not None:
            self.nccl.destroy()  # else what is queued for the server would keep this GPU waiting for ever
        status = self.server.wait(60)  # its pipe is closed: it is about to end
        how = f"killed by signal {-status}" if status < 0 else f"exit code {status}"
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").splitlines()
        died = f"the engine's process died ({how}); go on from the last checkpoint by --init_from=resume"
        return "\n    ".join([died, *lines[-12:]])

    def close(self):
        """Ends the server, which holds nothing that is worth keeping. Safe to call twice."""
        if self.leader:
            self.server.kill()
            self.server.wait()

    def generate(self, dataset, rows, seeds, sampling, queries=None):
        """A Completion for each of this rank's rows, in their order. A collective."""
        self.start(dataset, rows, seeds, sampling)
        return self.collect()

    def start(self, dataset, rows, seeds, sampling, queries=None):
        """Has the server begin with the rows of all ranks, and returns. A collective. The server reads the
        request before it samples, and answers when all is sampled: neither side waits for the other."""
        assert len(rows) == len(seeds) and self.dataset is None, f"{len(rows)=} {len(seeds)=} {self.dataset=}"
        self.dataset, self.shares = dataset, gather_json(list(zip(rows, seeds)), self.group)
        self.seeds = {}  # row -> its seeds, those of the first rank first
        for row, seed in sum(self.shares, []):
            self.seeds.setdefault(row, []).append(seed)
        if self.shared:
            torch.cuda.empty_cache()  # what torch only keeps for later is the server's now
        if self.leader:
            self.tell("sample", [(dataset.prompt(row), dataset.samples[row].images, several)
                                 for row, several in self.seeds.items()], dataset.pixels, sampling)

    def collect(self):
        """The Completions of the rows that start got, in their order. A collective; waits for the server."""
        responses = {}
        dataset, self.dataset = self.dataset, None
        answer = self.answer()
        self.sleep()
        for row, (ids, several) in zip(self.seeds, answer):
            if ids != dataset.ids(row):
                raise ValueError(f"sample {dataset.samples[row].id}: vLLM's prompt is not the trainer's "
                                 f"(chat template, size of a picture?): {ids} against {dataset.ids(row)}")
            responses[row] = iter(several)
        completions = [[Completion(*next(responses[row])) for row, _ in share] for share in self.shares]
        return completions[dist.get_rank(self.group)]

    def load_weights(self, named_tensors):
        """vLLM samples from these from now on: an iterator of (name, full tensor), the same on all ranks.
        A collective. ValueError unless each part of the model that they are of is whole; the engine is spoilt
        then, and the run should end."""
        assert self.dataset is None, "the engine is sampling: collect first"
        if self.shared:
            torch.cuda.empty_cache()
        if self.leader:
            if self.device.type == "cuda" and self.nccl is None and not self.shared:  # NCCL: a rank a GPU
                self.nccl = self.meet()
            self.tell("load_weights")
        names = set()
        for name, tensor in named_tensors:  # a collective of its own: run to its end
            names.add(name)
            if self.leader:
                tensor = tensor.detach().to(getattr(torch, self.dtype)).contiguous()
                by_pipe = b"" if self.nccl else tensor.cpu().view(-1).view(torch.uint8).numpy()
                self.tell(name, self.dtype, tensor.shape, data=by_pipe)
                if self.nccl and self.server.poll() is None:
                    self.nccl.broadcast(tensor.to(self.device), 0, torch.cuda.current_stream())
        if self.leader:
            self.tell()
        self.answer()
        # a hole is silent. vLLM has q, k and v in one tensor, and puts noise in the place of a missing one;
        # its CPU build keeps a copy of a tied head, which would stay the old one
        part_of = {name: next(part for part in PARTS if name.startswith(part)) for name in self.names}
        parts = {part_of[name] for name in names}
        missing = [name for name in self.names - names if part_of[name] in parts]
        if missing:
            raise ValueError(f"load_weights: {len(missing)} tensors are missing, such as {min(missing)}")

    def meet(self):
        """vLLM's own NCCL group of this process, rank 0, and the server, rank 1. Not run on a GPU so far."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meeting = dict(master_address="127.0.0.1", master_port=probe.getsockname()[1], world_size=2)
        self.tell("meet", meeting)
        return trainer_init(meeting)


def shares_gpu(world):
    """Whether vLLM has to sample on the GPU that trains, the only one."""
    return world.device.type == "cuda" and torch.cuda.device_count() == world.local_world_size == 1


def engine_environment(world, trains):
    """The server's. Its GPU: the one after the node's processes; the first if none trains, or if shared."""
    values = {name: value for name, value in os.environ.items() if not name.startswith(TORCHRUN)}
    values = dict(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="2") | values  # the latter in GiB
    values |= dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")  # stats go to its makers
    if world.device.type == "cpu":
        return values | dict(TORCH_COMPILE_DISABLE="1")  # compiling takes 20 s and a C++ compiler
    count, needed = torch.cuda.device_count(), world.local_world_size
    if trains and count <= needed and not shares_gpu(world):
        raise UserError(f"rollout=vllm needs a GPU for vLLM after the {needed} that train, but {count} are "
                        "there; lower torchrun's --nproc_per_node or use --rollout=hf")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return values | dict(CUDA_VISIBLE_DEVICES=visible[needed if count > needed else 0])


class Server:
    """vLLM in this process. A method for each request; what it returns, if anything, is the answer."""

    def __init__(self, model_dir, dtype, eos_ids, banned_ids, max_model_len, gpu_memory_utilization, shared):
        from vllm import LLM
        self.eos_ids, self.banned_ids, self.nccl = eos_ids, banned_ids, None
        self.asleep = set()  # parts of vLLM's memory
        # no prompt in pieces on a CPU: a request with a seed then fails ("CPU Generator does not use offset")
        settings = dict(enforce_eager=True, enable_chunked_prefill=False, enable_prefix_caching=False,
                        max_num_batched_tokens=max(8192, max_model_len))
        if torch.cuda.is_available():
            settings = dict(gpu_memory_utilization=gpu_memory_utilization, enable_prefix_caching=True,
                            enable_sleep_mode=shared)
        vision = load_config(model_dir).vision_config
        token = (vision.patch_size * vision.spatial_merge_size)**2  # its pixels
        self.llm = LLM(
            model_dir, dtype=dtype, max_model_len=max_model_len, **settings,
            generation_config="vllm",  # not the checkpoint's: it may hold a repetition penalty
            logprobs_mode="processed_logprobs",  # after temperature and bans
            limit_mm_per_prompt={"video": 0}, mm_processor_cache_gb=1,  # up to 999 pictures
            # pictures come at their final size: any bounds that let them through as they are
            mm_processor_kwargs=dict(size=dict(shortest_edge=token, longest_edge=token * max_model_len)))

    def sleep(self):
        self.llm.sleep(level=1)  # level 2 would forget the weights, and a frozen tower's never come again
        self.asleep = {"weights", "kv_cache"}
        return "asleep"

    def wake(self, *tags):
        """Wakes those of these parts that are asleep."""
        if needed := [tag for tag in tags if tag in self.asleep]:
            self.llm.wake_up(tags=needed)
            self.asleep -= set(needed)

    def sample(self, rows, pixels, sampling):
        """rows: [(prompt, paths of pictures, seeds), ...] -> [(prompt ids, [response, ...]), ...].
        Requests of one row stand side by side, so that its pictures are encoded once."""
        from vllm import SamplingParams
        self.wake("weights", "kv_cache")
        temperature, top_p, max_new_tokens = Sampling(*sampling)
        common = dict(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, top_k=0, min_p=0.0,
                      repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, ignore_eos=True,
                      stop_token_ids=self.eos_ids, logit_bias={i: BAN for i in self.banned_ids},
                      logprobs=0, detokenize=False)  # logprobs=0: of the sampled token alone
        with open_readers() as readers:
            pictures = readers.map(lambda row: [read_image(path, *pixels) for path in row[1]], rows)
        prompts, parameters = [], []
        for (prompt, _, seeds), images in zip(rows, pictures):
            prompts += [dict(prompt=prompt, multi_modal_data={"image": images})] * len(seeds)
            parameters += [SamplingParams(seed=seed, **common) for seed in seeds]
        outputs, answer = iter(self.llm.generate(prompts, parameters, use_tqdm=False)), []
        for _, _, seeds in rows:
            several = [next(outputs) for _ in seeds]
            answer.append((several[0].prompt_token_ids, [self.response(*each.outputs) for each in several]))
        return answer

    def response(self, output):
        """The fields of a Completion."""
        logprobs = [of_id[i].logprob for i, of_id in zip(output.token_ids, output.logprobs)]
        return list(output.token_ids), logprobs, output.finish_reason

    def meet(self, meeting):
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        self.nccl = trainer_init(meeting, rank=1)

    def load_weights(self):
        """The tensors that come take their places; everything computed from the old ones is dropped."""
        self.wake("weights")
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=self.tensors()))
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_prefix_cache()
        return "loaded"

    def tensors(self):
        """(name, tensor) of each tensor that comes."""
        while header := json.loads(sys.stdin.buffer.readline()):
            name, dtype, shape = header
            device = getattr(self.nccl, "device", "cpu")
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            if self.nccl is None:
                sys.stdin.buffer.readinto(tensor.view(-1).view(torch.uint8).numpy())
            else:
                self.nccl.broadcast(tensor, 0, torch.cuda.current_stream())
            yield name, tensor


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    server = Server(**json.loads(sys.argv[1]))
    for line in sys.stdin.buffer:  # until its other end is closed
        request, *arguments = json.loads(line)
        if (answer := getattr(server, request)(*arguments)) is not None:
            print(json.dumps(answer), file=answers, flush=True)

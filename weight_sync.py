"""New weights on their way into vLLM's process: as files in memory on a CPU, over NCCL between GPUs.

    sync = FileSync(llm, dtype, tied, size) or NCCLSync(llm, dtype, tied)      # in the process that owns the engine
    sync.add(name, tensor)     # hub names, full tensors; no more than a bucket of them is held
    sync.finish()              # vLLM's model has them; raises unless all arrived
    sync.close()               # after finish, and after any failure

A tied head comes under both names. vLLM's GPU build has one tensor for the two, its CPU build packs a copy of the head.
"""
import concurrent.futures
import os
import pathlib
import shutil
import socket
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rollout import FOLDER

BUCKET_BYTES = 2 * 2**30  # about so many are collected, then sent


class FileSync:
    """Safetensors files in /dev/shm, or on disk where that is too small; vLLM's worker reads them (WeightReceiver)."""

    def __init__(self, llm, dtype, tied, size):
        """size: bytes that come at most."""
        self.llm, self.dtype, self.tied, self.names, self.bucket, self.room = llm, dtype, tied, [], {}, BUCKET_BYTES
        memory = pathlib.Path("/dev/shm")
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * size
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=memory if fits else None))

    def add(self, name, tensor):
        self.names.append(name)
        if self.tied and name == "lm_head.weight":
            return  # the embedding again
        self.bucket[name] = tensor.detach().to("cpu", self.dtype, copy=True).contiguous()  # its buffer may be used again
        self.room -= self.bucket[name].nbytes
        if self.room <= 0:
            self.write()

    def write(self):
        save_file(self.bucket, self.folder / f"{len(self.names):06d}.safetensors")
        self.bucket, self.room = {}, BUCKET_BYTES

    def finish(self):
        self.write()
        arrived, = self.llm.collective_rpc("receive_weights", args=(str(self.folder), self.tied))
        if self.tied and "model.embed_tokens.weight" in self.names:
            self.names.append("lm_head.weight")  # without its name the CPU build's copy stays old
        if set(arrived) != set(self.names):
            raise RuntimeError(f"load_weights: not all weights arrived in vLLM: {sorted(set(self.names) ^ set(arrived))}")

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class WeightReceiver:
    """Added to vLLM's worker, in the engine's process: the other end of FileSync."""

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


class NCCLSync:
    """vLLM's own weight transfer, vllm/distributed/weight_transfer (0.32): this process is rank 0 of a group of two, the
    engine's worker is rank 1. The worker is told a bucket's names, dtypes and shapes and receives them while this process
    broadcasts, from its shards gathered one by one: never a state dict, never the host's memory. One for a whole run."""

    def __init__(self, llm, dtype, tied):
        self.llm, self.dtype, self.tied, self.started = llm, dtype, tied, False
        self.pool = concurrent.futures.ThreadPoolExecutor(1)  # for what blocks in the engine until this process does its part
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meeting = dict(master_address="127.0.0.1", master_port=probe.getsockname()[1], world_size=2)
        worker = self.pool.submit(self.tell, "init_weight_transfer_engine", meeting | dict(rank_offset=1, packed=False))
        self.send = self.join(meeting)
        worker.result()
        self.bucket, self.room = {}, BUCKET_BYTES

    def join(self, meeting):
        """A function that broadcasts a tensor to the worker. Returns once the worker is there."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        self.group = trainer_init(meeting)
        if self.group.disabled:
            raise RuntimeError("NCCL could not be loaded, or VLLM_DISABLE_PYNCCL is set: no weight would reach the engine")
        return lambda tensor: self.group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())

    def tell(self, method, *args):
        self.llm.collective_rpc(method, args=args)

    def add(self, name, tensor):
        if self.tied and name == "lm_head.weight":
            return  # the embedding again
        self.bucket[name] = tensor.detach().to(self.dtype, copy=True).contiguous()  # its buffer may be used again
        self.room -= self.bucket[name].nbytes
        if self.room <= 0:
            self.broadcast()

    def broadcast(self):
        if not self.started:
            self.tell("start_weight_update")
            self.started = True
        tensors = self.bucket.values()
        worker = self.pool.submit(self.tell, "update_weights", dict(
            names=list(self.bucket), shapes=[list(t.shape) for t in tensors],
            dtype_names=[str(t.dtype).removeprefix("torch.") for t in tensors]))
        for tensor in tensors:
            if worker.done():
                worker.result()  # it failed before it received all: nobody is there for the next broadcast
            self.send(tensor)
        worker.result()
        self.bucket, self.room = {}, BUCKET_BYTES  # after the worker has all: broadcasts are only queued until then

    def finish(self):
        if self.bucket:
            self.broadcast()
        self.tell("finish_weight_update")
        self.started = False

    def close(self):
        """Nothing: the group serves the next update as well."""

    def abort(self):
        """The worker is gone: what is queued for it would keep this GPU waiting for ever."""
        self.group.destroy()

"""The processes of a run, and the few collectives that it needs.

One process and N processes run the same code: a process group always exists, gloo for tensors on the CPU and
nccl for those on a GPU. What is not a tensor travels as JSON: this file unpickles nothing.
"""
import ctypes
import datetime
import json
import os
import signal
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from configurator import UserError


class World(NamedTuple):
    rank: int  # 0 .. world_size - 1, over all nodes
    world_size: int
    local_rank: int  # 0 .. local_world_size - 1, on this node
    local_world_size: int
    node_group: Any  # gloo group of this node's processes, who share one vLLM engine
    device: torch.device


def start() -> World:
    """The World of this process, from torchrun's environment; without torchrun, a world of one."""
    torchrun = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(*x)) for x in torchrun.items())
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if torch.cuda.device_count() < local_world_size:
            raise UserError(f"{local_world_size} processes on a node with {torch.cuda.device_count()} GPUs; "
                            "lower torchrun's --nproc_per_node, or set CUDA_VISIBLE_DEVICES= for the CPU")
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)  # before any collective, or every process opens a context on GPU 0
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would build and keep a plan for every new length
    if "RANK" in os.environ:  # an agent of torchrun's that is killed would leave this process to go on alone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; other nodes lose their connection then
    timeout = datetime.timedelta(hours=2)  # of a collective, which others may wait in while one evaluates
    # alone: no port, no rendezvous
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=timeout, **alone)
    # every process takes part in making each node's group
    groups = [dist.new_group(range(first, first + local_world_size), timeout, backend="gloo")
              for first in range(0, world_size, local_world_size)]
    return World(rank, world_size, local_rank, local_world_size, groups[rank // local_world_size], device)


def end(status=0):
    """Ends this process once every rank is here. Not by the interpreter's own end: gloo's groups, which FSDP
    still holds then, abort it now and then after all work is done (pytorch/pytorch pull 179291)."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def all_sum(values) -> torch.Tensor:
    """A new tensor: values (a tensor, or numbers, taken as float64 on the CPU) summed over all ranks."""
    total = values.clone() if torch.is_tensor(values) else torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total


def all_max(value) -> float:
    """The largest value over all ranks."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def gather_json(obj, group=None) -> list:
    """Every rank's obj, in the order of ranks, on every rank. obj: anything that json can write."""
    text = torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(text)]), group=group)
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)  # gloo gathers equal shapes only
    padded[:len(text)] = text
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return [json.loads(row[:int(n)].numpy().tobytes()) for row, n in zip(gathered, lengths)]

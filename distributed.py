"""The processes of one run: who they are, and the few things that travel between them.

One process and N processes run the same code: a process group always exists. Collectives on CPU tensors go over gloo, on
GPU tensors over nccl. What is not a tensor travels as JSON in a uint8 tensor: nothing is ever unpickled.
What happens when one of them fails or hangs is in watch.py.
"""
import contextlib
import datetime
import json
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import watch
from configurator import UserError
from watch import progress


class World(NamedTuple):
    rank: int  # 0 .. world_size - 1, over all nodes
    world_size: int
    local_rank: int  # 0 .. local_world_size - 1, on this node
    local_world_size: int
    node_group: Any  # gloo group of this node's processes, who share one vLLM engine
    device: torch.device


def start(timeout_minutes=120.0) -> World:
    """The World of this process, from torchrun's environment; without torchrun, a world of one. timeout_minutes: the run ends
    when no process has got any further for so long."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # of one collective. only a net below the watch: a wait may be long while others sample or evaluate, and get on
    timeout = datetime.timedelta(minutes=10 * timeout_minutes)
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < local_world_size:
        raise UserError(f"{local_world_size} processes on this node, but {torch.cuda.device_count()} GPUs can be seen; lower "
                        "torchrun's --nproc_per_node, or set CUDA_VISIBLE_DEVICES= to run on the CPU")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # before any collective, or every process opens a context on GPU 0
    several, store = "RANK" in os.environ, dist.HashStore()  # alone: no port, no rendezvous
    if several:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
                            timeout=timeout)
    node_group = None
    for first in range(0, world_size, local_world_size):  # new_group is collective: all take part in making each
        ranks = list(range(first, first + local_world_size))
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        node_group = group if rank in ranks else node_group
    watch.begin(rank, rank - local_rank, local_world_size, store.clone() if several else None, 60 * timeout_minutes)
    return World(rank, world_size, local_rank, local_world_size, node_group, device)


def end(status=0):
    """Ends this process once every rank is here. Not by the interpreter's own end: FSDP's meshes still hold gloo's groups
    then, whose C++ threads now and then abort the process after all work is done (seen once in some hundred runs; compare
    https://github.com/pytorch/pytorch/pull/179291)."""
    watch.current.leave()
    dist.barrier()
    dist.destroy_process_group()
    watch.quit_now(status)


def all_sum(values) -> torch.Tensor:
    """A new tensor: values (a tensor, or a list of numbers taken as float64 on the CPU) summed over all ranks."""
    total = values.clone() if torch.is_tensor(values) else torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    progress()
    return total


def all_max(value: float) -> float:
    """The largest value over all ranks."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    progress()
    return largest.item()


def gather_json(obj, group=None) -> list:
    """Every rank's obj, in the order of ranks, on every rank. obj: anything that json can write."""
    payload = torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(payload)]), group=group)
    padded = torch.zeros(max(int(n) for n in lengths), dtype=torch.uint8)  # gloo gathers equal shapes only
    padded[:len(payload)] = payload
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    progress()
    return [json.loads(g[:int(n)].numpy().tobytes()) for g, n in zip(gathered, lengths)]


def gather_rows(rows) -> list:
    """The rows (JSON objects) of a batch in its order, on every rank; its row p is in the hands of rank p % world_size."""
    ranks = gather_json(rows)
    return [row for several in zip(*ranks, strict=True) for row in several]


@contextlib.contextmanager
def together(group=None, who=""):
    """A failure of the block on any of the group's ranks is raised on all of them, so that none waits for ever. The block
    must hold no collective that a failing rank would leave the others in. who: whose failure it is, for the message."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    mine = error and [isinstance(error, UserError), f"{type(error).__name__}: {error}"]
    failures = [failure for failure in gather_json(mine, group) if failure]
    if error is not None:
        raise error
    if failures:
        by_user, text = failures[0]
        failure = UserError(text.removeprefix("UserError: ")) if by_user else RuntimeError(who + text)
        failure.elsewhere = True  # where it came from is for another rank to say
        raise failure

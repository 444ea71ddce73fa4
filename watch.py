"""When a process fails: all end within seconds, and one says why, the first that has something to say (fail).

A thread of each process (Watch) sees what the main thread cannot while it waits: that another process is gone or has failed,
that torchrun is gone, that nobody gets any further. Under torchrun what is said stands at the end of torchrun's report.
"""
import atexit
import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

import configurator
from configurator import UserError, say_last

HERE = os.path.dirname(os.path.abspath(__file__))
DISTRIBUTED = os.path.join(HERE, "distributed.py")  # whose functions wait for other processes
POLL_S = 1.0  # between two looks of the watch
GRACE_S = 3.0  # what a process with nothing to say leaves to the one that has, before it ends as well

current = None  # this process's Watch, from begin() on


def begin(*about):
    """Starts this process's Watch; about: its arguments."""
    global current
    if current is not None:
        current.leave()  # of an earlier group, in tests
    current = Watch(*about)
    current.start()
    atexit.register(current.leave)
    sys.excepthook = excepthook


def now_at(place):
    """place: the point of the run that this process has come to, for messages. It has got further, therefore."""
    if current is not None:
        current.place = place
    progress()
    return place


def progress():
    """Says that this process gets on. The collectives of distributed.py say it; what takes long without them has to."""
    if current is not None:
        current.count += 1


def excepthook(kind, error, trace):
    """What an error ends in that the main thread did not catch, from begin() on."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, from here on the end
    by_user = issubclass(kind, UserError)
    text = str(error) if by_user else "".join(traceback.format_exception(kind, error, trace)).rstrip()
    until = time.monotonic() + GRACE_S * (getattr(error, "elsewhere", False) or issubclass(kind, RuntimeError))
    while time.monotonic() < until and not current.first_to_fail():  # gloo's and nccl's errors follow from another rank's end
        if lost := current.lost():
            fail(lost, ago=10)
        time.sleep(0.1)
    fail(text, 2 if by_user else 1)


def fail(text, status=1, ago=0):
    """Ends this process. text is said unless another process has failed before: then the word is with that one.
    ago: seconds; torchrun takes the earliest failure for the cause of the others, by the clock, and puts it last."""
    if current.claim():
        say_last(text, ago)
        if threading.current_thread() is threading.main_thread():
            quit_now(status)
    else:
        time.sleep(GRACE_S)  # for torchrun to see that one end before this one, and to end this one itself
        if first := current.first_to_fail():
            say_last(f"rank {current.rank} ends since rank {first} failed")
    for process in multiprocessing.active_children():
        process.kill()  # vLLM's, which may be what hangs
    os._exit(status)


def running(pid):
    """Whether the process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (ProcessLookupError, PermissionError):
        return False
    except OSError:
        return not os.path.exists("/proc/self")  # gone meanwhile, or a system without /proc


def doing():
    """What the main thread is at: 'waits for another process in agreed (checkpoint.py:58)', 'is in draw (rollout.py:80)'."""
    frame, verb = sys._current_frames().get(threading.main_thread().ident), "is"
    while frame is not None:
        path, name = os.path.abspath(frame.f_code.co_filename), frame.f_code.co_name
        if path == DISTRIBUTED or ("/torch/distributed/" in path and "checkpoint" not in path):
            verb = "waits for another process"
        elif os.path.dirname(path) == HERE:
            verb = "waits for vLLM's process" if name == "wait_for_vllm" else verb
            return f"{verb} in {name.strip('<>')} ({os.path.basename(path)}:{frame.f_lineno})"
        frame = frame.f_back
    return f"{verb} outside of these scripts"


class Watch(threading.Thread):
    """Looks every second how far all processes are, and ends this one when there is no going on. By the process group's store
    each says where it is (at/<rank>), that it ends as it should (done/<rank>) and, if it is the first, that it fails."""

    def __init__(self, rank, first, size, store, timeout_s):
        """first, size: of the ranks of this node. store: a client of its own, since the main thread may be waiting with its
        one; None for a world of one."""
        super().__init__(daemon=True, name="watch")
        self.rank, self.node, self.timeout_s, self.store = rank, range(first, first + size), timeout_s, store
        self.torchrun, self.parent = "TORCHELASTIC_RUN_ID" in os.environ, os.getppid()
        self.place, self.count, self.pids = "start-up", 0, {}
        self.over, self.claimed = threading.Event(), threading.Lock()
        self.keys = [f"at/{r}" for r in range(dist.get_world_size())]
        if store is not None:
            self.store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self.store.set(f"pid/{rank}", str(os.getpid()))

    def run(self):
        # of each rank what it said last, and when it last got on, by this process's clock
        states, since = {}, {self.rank: time.monotonic()}
        while not self.over.wait(POLL_S):
            try:
                for rank, state in self.exchange().items():
                    if rank not in states or states[rank][0] != state[0]:
                        since[rank] = time.monotonic()
                    states[rank] = state
                first = self.first_to_fail()
                if first == str(self.rank):
                    return  # the main thread is at it
                if first and not self.over.is_set():
                    fail("")
                if (lost := self.lost()) and not self.over.is_set():
                    fail(lost, ago=10)
            except RuntimeError:
                self.store = None  # gone with torchrun, or with the first rank's node
            if self.torchrun and os.getppid() != self.parent:
                self.go_on_without_torchrun()
            if time.monotonic() - max(since.values()) > self.timeout_s and not self.over.is_set():
                fail(self.who_waits(states, since))

    def exchange(self):
        """{rank: [how often it got on, place, what it does]}; of this rank alone until all have said something."""
        mine = [self.count, self.place, doing()]
        if self.store is not None:
            self.store.set(f"at/{self.rank}", json.dumps(mine))
        if self.store is None or not self.store.check(self.keys):
            return {self.rank: mine}
        return {rank: json.loads(text) for rank, text in enumerate(self.store.multi_get(self.keys))}

    def lost(self):
        """A line on a rank of this node whose process is gone though it said neither why nor that it was done; else ''."""
        store = self.store  # the other thread may take it away
        with contextlib.suppress(RuntimeError):  # the store is gone
            for rank in self.node if store is not None else []:
                if rank not in self.pids and store.check([f"pid/{rank}"]):
                    self.pids[rank] = int(store.get(f"pid/{rank}"))
                if rank in self.pids and not running(self.pids[rank]) and not store.check([f"done/{rank}"]):
                    return f"{self.place}: rank {rank} is gone without a word (killed? out of memory?)"
        return ""

    def first_to_fail(self):
        """The rank, as text, that failed first; '' while none has."""
        store = self.store
        with contextlib.suppress(RuntimeError):
            if store is not None and store.check(["failed"]):
                return store.get("failed").decode()
        return ""

    def claim(self):
        """Whether this process is the first to fail, and this thread the first of its own."""
        store = self.store
        if not self.claimed.acquire(blocking=False):
            return False
        try:
            return store is None or store.compare_set("failed", "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:
            return True  # no store any more: better twice than never

    def who_waits(self, states, since):
        """The message of a run that has come to a halt: where each process is, and for how long."""
        groups = {}
        for rank, (_, place, what) in states.items():
            groups.setdefault((place, what), []).append(rank)
        lines = [f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {place}, {what}, for "
                 f"{time.monotonic() - max(since[rank] for rank in ranks):.0f} s" for (place, what), ranks in groups.items()]
        return "\n".join([f"{self.place}: no process got any further for {self.timeout_s / 60:g} minutes (timeout_minutes)",
                          *lines])

    def go_on_without_torchrun(self):
        """Nobody is left to tell the ranks to stop, or to say why they do: they stop as if torchrun had told them to."""
        if self.rank == self.node[0]:
            print("torchrun is gone: the run stops", file=sys.stderr, flush=True)
        self.store, self.torchrun, configurator.error_file = None, False, ""
        os.kill(os.getpid(), signal.SIGTERM)

    def leave(self):
        """This process ends as it should, and needs no watching any more."""
        if not self.over.is_set():
            self.over.set()
            if threading.current_thread() is not self:
                self.join()  # not while it is in the store: C++ code that the interpreter's end stops aborts the process
            with contextlib.suppress(RuntimeError):
                if self.store is not None:
                    self.store.set(f"done/{self.rank}", "")


def quit_now(status):
    """Ends this process after what it has registered for its end, without the interpreter's own."""
    atexit._run_exitfuncs()  # the judge's workers and the like
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

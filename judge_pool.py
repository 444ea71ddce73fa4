r"""
Verdicts on hostile formulas: Pool().ask([(gold, box), ...], workers) -> a Verdict for each.

    this process  <-- JSON lines over two pipes -->  server (this file run as a script)  --fork-->  workers

The server imports sympy once (1 s) and never reads a formula. For every CHUNK questions it forks a worker, which starts
from the same clean state each time, locks itself in (confine) and answers with one byte a question. A worker that runs out
of time, memory or luck dies, which costs the one question it was at and 10 ms: the server forks another for the rest.

The same questions get the same verdicts whatever the number of workers, the load, and who kills which process when: chunks
do not depend on the workers, each question starts with empty caches and the same seeds, time is CPU time, and what
somebody else killed is asked again. What still depends on the machine: how much a CPU does in LIMIT_S (formulas take 0.01
to 0.1 s or hang), and WALL_S, which a process gets to see only when it has less than a thirtieth of a core.
"""
import collections
import gc
import importlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from answers import compare, compare_formulas

LIMIT_S = 1.0           # CPU time of one question; most take 0.01 s
WALL_S = 30.0           # wall clock of one question, for a machine so busy that LIMIT_S of CPU takes that long
START_S = 60.0          # wall clock of the server's start (importing sympy: 1 s on an idle CPU)
MEMORY_BYTES = 1 << 30  # what a worker may allocate beyond the server's imports
CHUNK = 8               # questions of one worker; a fork and its page faults take 5 to 20 ms, the questions as much
TRIES = 3               # of a question whose worker somebody else killed (out of memory, say), and of a silent server


class Verdict(NamedTuple):
    correct: bool
    error: str          # '', 'timeout', or 'unreadable': there is a box, but it does not parse or it killed its worker.
                        # an error is never correct


def default_workers():
    """the cores that this process may use, shared with the other ranks of this machine; at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# -----------------------------------------------------------------------------
# this process

class Pool:
    """The asking side. Its server starts with the first question, stays for the next ones, ends when its stdin does (so it
    never outlives this process, however that ends) and is replaced when it is gone. Any thread may ask, one at a time."""

    def __init__(self):
        self.process, self.lines, self.lock = None, [], threading.Lock()

    def ask(self, questions, workers=0):
        """a Verdict for each (gold, box), in order. workers: how many to have at once, 0 for default_workers()."""
        verdicts = [None] * len(questions)
        chunks = collections.deque(range(len(questions))[i:i + CHUNK] for i in range(0, len(questions), CHUNK))
        asked, silent = [], 0           # sets of the numbers that a worker is at; how often the server said nothing
        with self.lock:
            try:
                while chunks or asked:
                    self._start()
                    while chunks and len(asked) < (workers or default_workers()):
                        asked.append(set(chunks[0]))
                        self._send([(number, *questions[number]) for number in chunks.popleft()])
                    line = self._read(WALL_S + START_S)
                    if line:
                        number, *verdict = json.loads(line)
                        verdicts[number], silent = Verdict(*verdict), 0
                        for numbers in asked:
                            numbers.discard(number)
                        asked = [numbers for numbers in asked if numbers]
                        continue
                    self._stop()        # gone, or silent for longer than any question may take
                    silent += 1
                    if silent < TRIES:
                        chunks.extendleft(sorted(numbers) for numbers in reversed(asked))
                    else:
                        for number in set().union(*asked):
                            verdicts[number] = Verdict(False, "timeout")
                    asked = []
            except BaseException:       # a Ctrl-C, say: answers to these questions must not meet the next ones
                self._stop()
                raise
        return verdicts

    def close(self):
        with self.lock:
            self._stop()

    def _start(self):
        if self.process is not None and self.process.poll() is None:
            return
        self._stop()
        # of the environment only what a Python may need to find its libraries; the seed makes sets iterate the same
        keep = "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "SYSTEMROOT"
        environment = {name: os.environ[name] for name in keep if name in os.environ} | {"PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve"], env=environment, bufsize=0,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        start_new_session=True)     # a Ctrl-C is this process's business alone
        if self._read(START_S) != b"ready":
            raise RuntimeError(f"judge_pool.py: the judge did not start; `{' '.join(self.process.args)}` shows why")

    def _send(self, chunk):
        # never a deadlock: the server always reads, and its answers to all that is asked fit in a pipe
        line = json.dumps(chunk).encode() + b"\n"
        try:
            while line:
                line = line[self.process.stdin.write(line):]
        except BrokenPipeError:
            pass                        # _read says so

    def _read(self, seconds):
        """the next line; None when none comes in time; b'' when the server is gone."""
        deadline = time.monotonic() + seconds
        while len(self.lines) < 2:      # the last one is not complete
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                return b""
            self.lines = ((self.lines or [b""])[-1] + piece).split(b"\n")
        return self.lines.pop(0)

    def _stop(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            try:
                self.process.wait(1)    # it ends with its stdin, and its workers with it
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.process, self.lines = None, []

    def forget(self):
        """what a forked child calls: it starts a server of its own. Its parent's pipes would never end if it kept them."""
        if self.process is not None:
            self.process.returncode = 0  # not this process's child
            self.process.stdin.close()
            self.process.stdout.close()
        self.__init__()


# -----------------------------------------------------------------------------
# the server

def serve():
    """[[number, gold, box], ...] lines in; [number, correct, error] lines out, in any order."""
    out = os.dup(1)
    os.dup2(2, 1)                       # what a library prints stays out of the pipe
    os.environ.clear()
    warm_up()
    os.write(out, b"ready\n")
    workers, text = {}, b""             # workers: the pipe that a worker writes to -> (pid, its questions, tries left)

    def start(questions, tries=TRIES):
        mine, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            work(questions, theirs)
        os.close(theirs)
        workers[mine] = pid, questions, tries

    def say(question, correct, error):
        os.write(out, json.dumps([question[0], correct, error]).encode() + b"\n")

    while True:
        for pipe in select.select([0, *workers], [], [])[0]:
            piece = os.read(pipe, 65536)
            if pipe == 0 and not piece:
                for pid, *_ in workers.values():
                    os.kill(pid, signal.SIGKILL)
                return
            if pipe == 0:
                *lines, text = (text + piece).split(b"\n")
                for line in lines:
                    start(json.loads(line))
                continue
            pid, questions, tries = workers[pipe]
            marks, _, module = piece.partition(IMPORT)
            for mark in marks.decode():
                say(questions.pop(0), mark == RIGHT, "unreadable" if mark == UNREADABLE else "")
            if marks and not module:
                continue
            os.close(pipe)
            del workers[pipe]
            status = os.waitpid(pid, 0)[1]
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
            if module:
                load(module.decode())
            elif killed == signal.SIGKILL and tries > 1:        # by somebody else: our limits send other signals
                tries -= 1
            elif questions:
                late = killed in (signal.SIGPROF, signal.SIGXCPU, signal.SIGALRM)
                say(questions.pop(0), False, "timeout" if late else "unreadable")
                tries = TRIES
            if questions:
                start(questions, tries)


WARM_UP = [(r"5\sqrt{3}", "8.66"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), (r"\frac{3}{4}\pi", r"3\pi/4"),
           (r"24+4\pi", r"4(\pi + 6)"), ("x^2+y^2=4", "2x^2+2y^2=8"), (r"(5, \infty)", "x > 5"), ("|2x-1|", "|1-2x|"),
           (r"\frac{\pi a^2}{4}", r"\pi(\frac{a}{2})^{2}"), (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
           (r"\cos 60^\circ", "0.5"), ("5!", r"4 \times 30")]


def warm_up():
    """imports what the workers need, and keeps text away from Python's eval."""
    sys.modules.update(numpy=None, scipy=None)          # not to be had; sympy goes without
    import sympy.core.numbers
    sympy.core.numbers.sympify = number
    for gold, box in WARM_UP:           # imports and the parser's tables, which all workers share: nearly half their time
        if not compare(gold, box, compare_formulas):
            raise RuntimeError(f"math-verify does not work here: {box} is not {gold}")
    gc.freeze()                         # the workers share these objects; collecting among them would copy their pages


def number(text):
    """sympy's number that a text of digits says. In the place of sympy's own, which is eval: math-verify reads every number
    in a formula by sympy.Number(text), that is sympify(text), that is Python's eval of Integer(text)."""
    import sympy
    if not isinstance(text, str):
        return sympy.sympify(text)
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        raise ValueError(f"no number: {text:.50}")
    return sympy.Integer(int(text)) if text.isdigit() else sympy.Float(text)


PACKAGES = "sympy.", "mpmath.", "math_verify.", "latex2sympy2_extended.", "antlr4."
UNAVAILABLE = set()     # modules of these that are not there


def load(module):
    """imports, on behalf of the workers, who cannot, a module that sympy puts off until it is needed."""
    try:
        importlib.import_module(module)
        gc.freeze()
    except Exception:                   # whatever a package raises as it loads: a worker gets an ImportError for it
        UNAVAILABLE.add(module)


# -----------------------------------------------------------------------------
# a worker: it writes RIGHT, WRONG or UNREADABLE for each question, or IMPORT and a module's name, and ends

RIGHT, WRONG, UNREADABLE, IMPORT = "1", "0", "?", b"import "


def work(questions, out):
    """judges, and ends the process whatever happens."""
    try:
        confine(out)
        for _, gold, box in questions:
            os.write(OUT, answer(gold, box).encode())
    finally:
        os._exit(0)


def answer(gold, box):
    import sympy.core.cache
    import sympy.core.random
    sympy.core.cache.clear_cache()
    sympy.core.random.seed(0)
    random.seed(0)
    # no handlers: these signals end the process, also in the middle of one long multiplication
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        return RIGHT if compare(gold, box, compare_formulas) else WRONG
    except Exception:                   # sympy raises anything on odd text, RecursionError and MemoryError too
        return UNREADABLE
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


OUT = 3                 # a worker's only way to be heard; 1 and 2 are /dev/null
HARMLESS = {"sys._getframe", "object.__getattr__", "builtins.id", "array.__new__"}  # of Python's audit events


def confine(out):
    """locks this process in, for good. The kernel: no new file or socket, no file grows, no child, memory, time. Python: an
    audit hook, which nothing can take away, refuses what an interpreter calls sensitive (files, processes, sockets,
    imports, ctypes, eval and exec), all but HARMLESS."""
    import resource
    limits = {"FSIZE": 0, "NOFILE": 0, "NPROC": 0, "CORE": 0, "CPU": int(LIMIT_S + 1) * CHUNK}
    try:
        with open("/proc/self/statm") as file:
            limits["AS"] = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    except OSError:
        pass                            # no /proc here: memory is bounded by time only
    os.dup2(out, OUT)
    os.close(0)
    os.closerange(OUT + 1, 1024)        # the other workers' pipes
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    sys.addaudithook(refuse)


def refuse(event, args):
    """the hook: raises on every event that is not known to be harmless."""
    if event in HARMLESS:
        return
    if event in ("compile", "exec"):    # sympy writes itself functions to multiply monomials: of numbers, never of text
        if sys._getframe(1).f_code.co_filename == sys.modules["sympy.polys.monomials"].__file__:
            return
    if event == "import" and args[0].startswith(PACKAGES) and args[0] not in UNAVAILABLE:
        os.write(OUT, IMPORT + args[0].encode())
        os._exit(0)
    raise (ImportError if event == "import" else PermissionError)(f"{event} in a judge's worker")


if __name__ == "__main__" and sys.argv[1:] == ["--serve"]:
    serve()

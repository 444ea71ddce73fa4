r"""
Rule rewards of a response: is its last \boxed{...} right (accuracy), is it in one script (language), is it laid out as
asked (format).

    from reward import judge
    judge(r"so the side is \boxed{8.66}.", r"5\sqrt{3}")     # True

A response is hostile text: never evaluated as code, only its last box is read, and what is more than plain numbers and
words is parsed by math-verify in a worker process of our own, killed when it takes longer than LIMIT_S. (A signal works
in the main thread only, a thread cannot be killed: https://github.com/huggingface/Math-Verify/issues/55.)

What counts as right is in answers.py. A response without \boxed{...} is wrong, and so is one whose last box never closes:
no earlier box is taken instead.
"""
import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import unicodedata
from typing import NamedTuple

from answers import compare, compare_formulas

LIMIT_S = 1.5           # wall clock of one response in the worker; most take 0.01 s
START_S = 60.0          # wall clock of a worker's start (importing sympy: 0.5 s on an idle CPU)
WORKER_BYTES = 1 << 30  # what the worker may allocate after its imports


class Verdict(NamedTuple):
    correct: bool
    error: str          # '', 'timeout', or 'unreadable': there is a box, but it does not parse or it killed the worker.
                        # an error is never correct


def last_box(text):
    r"""(what the last \boxed{...} of text holds, where it ends); None when there is none or it never closes. Linear in
    len(text). `\boxed 5`, without braces, is read as its writer means it: the digits, or the one letter, that follow."""
    start = max((match.end() for match in re.finditer(r"\\boxed(?![A-Za-z])\s{0,20}", text)), default=None)
    if start is None:
        return None
    if text[start:start + 1] != "{":
        bare = re.match(r"-?\d[\d.,]*|[A-Za-z]", text[start:start + 400])
        return (bare.group().rstrip(".,"), start + len(bare.group())) if bare else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):     # \\. steps over \{ and \}
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start + 1:start + match.start()], start + match.end()
    return None


def last_boxed(text):
    r"""what the last \boxed{...} of text holds, or None."""
    found = last_box(text)
    return found and found[0]


# -----------------------------------------------------------------------------
# the worker: this file run as a script, JSON lines in and out

class Worker:
    """A process that compares formulas. It ends when its stdin does, so it never outlives its parent."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], bufsize=0,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.ready, self.lost = False, False

    def read(self, seconds):
        """the next line; None when it does not come in time; b'' when the worker is gone."""
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            piece = self.process.stdout.read(65536)
            if not piece:
                return b""
            line += piece
        return line

    def ask(self, gold, box):
        """the Verdict; self.lost is then True if the worker was too late or died, and must be replaced."""
        if not self.ready and self.read(START_S) != b"ready\n":
            command = " ".join(self.process.args)
            raise RuntimeError(f"reward.py: the judge's worker did not start; `{command}` shows why")
        self.ready = True
        try:
            self.process.stdin.write(json.dumps([gold, box]).encode() + b"\n")
            line = self.read(LIMIT_S)
        except BrokenPipeError:
            line = b""
        self.lost = not line
        return Verdict(*json.loads(line)) if line else Verdict(False, "timeout" if line is None else "unreadable")

    def close(self, ours=True):
        if ours:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


_worker, _lock = None, threading.Lock()


def _ask(gold, box):
    """the worker's Verdict. Any thread may ask; one is answered at a time."""
    global _worker
    with _lock:
        if _worker is None or _worker.process.poll() is not None:       # none yet, or killed from outside
            _worker = Worker()
        verdict = _worker.ask(gold, box)
        if _worker.lost:
            _worker.close()
            _worker = Worker()              # starts while the caller goes on
        return verdict


def _forget():
    """a forked child starts a worker of its own; it lets go of its parent's pipes, or they would never end."""
    global _worker, _lock
    if _worker is not None:
        _worker.process.returncode = 0      # not this process's child
        _worker.close(ours=False)
    _worker, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def serve():
    """the worker's loop: [gold, box] in, Verdict out."""
    import resource
    import signal
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                           # what a library prints stays out of the pipe
    compare_formulas(r"5\sqrt{3}", "8.66", True)        # imports, grammar tables
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize() + WORKER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except OSError:
        pass                                # no /proc here: only time is bounded
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * LIMIT_S)       # no handler: the end of a hanging worker without parent
        try:
            verdict = Verdict(bool(compare(*json.loads(line), compare_formulas)), "")
        except Exception:                   # sympy raises anything on odd text, RecursionError and MemoryError too
            verdict = Verdict(False, "unreadable")
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=out, flush=True)


# -----------------------------------------------------------------------------
# what the trainers call

class _Formula(Exception):
    """raised in place of comparing formulas in this process."""


def _not_here(gold, box, decimal):
    raise _Formula


def judge_one(response, answer):
    """the Verdict on one response: numbers and words are compared here (0.2 ms), formulas in the worker (10 ms)."""
    box = last_boxed(response)
    if box is None:
        return Verdict(False, "")
    answer = last_boxed(answer) or answer   # some golds come in a box
    try:
        return Verdict(bool(compare(answer, box, _not_here)), "")
    except (ValueError, ArithmeticError, LookupError):      # Unreadable, or a text nobody thought of: it stops no run
        return Verdict(False, "unreadable")
    except _Formula:
        return _ask(answer, box)


def judge(response, answer):
    r"""whether the last \boxed{...} of response is the gold answer: a number, formula, list, letter or word, in LaTeX
    with or without $, or plain."""
    return judge_one(response, answer).correct


def judge_batch(pairs):
    """a Verdict for each (response, answer), in order."""
    return [judge_one(response, answer) for response, answer in pairs]


def readable(answer):
    r"""whether answer can be a gold answer: \boxed{answer} is judged right, and not for being the same string.
    A letter A to E and words are compared as words and so are readable; a formula math-verify cannot parse is not."""
    return bool(answer.strip()) and judge(rf"\boxed{{{last_boxed(answer) or answer}}}", answer)


@functools.lru_cache(maxsize=4096)
def _foreign(letter):
    """whether a letter is neither Latin nor Greek; NFKC: full-width and mathematical letters count as plain ones."""
    return not unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "").startswith(("LATIN", "GREEK"))


def language_reward(response):
    """minus the fraction of letters that are neither Latin nor Greek, in [-1, 0]; 0 without letters. Not yet times the
    paper's 0.1."""
    letters = [] if response.isascii() else [char for char in response if char.isalpha()]
    return -sum(map(_foreign, letters)) / len(letters) if letters else 0.0


def format_reward(response):
    r"""1.0 if the response has exactly one \boxed, with something in it, and only punctuation or closing math
    delimiters after it; else 0.0."""
    found = last_box(response)
    if not found or not found[0].strip() or len(re.findall(r"\\boxed(?![A-Za-z])", response)) != 1:
        return 0.0
    after = response[found[1]:]
    return float(len(after) < 100 and re.fullmatch(r"(\\[)\]]|[\s$}.,;:!*)\]])*", after) is not None)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    serve()

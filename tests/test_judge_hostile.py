r"""The judge as a hostile place: what a response can do to it, and what other processes can do to a verdict: nothing."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
import hostile
import judge_pool
import reward
from judge_pool import Pool, Verdict
from reward import judge, judge_batch, readable_batch

ROOT = Path(reward.__file__).parent
RIGHT = r"2\sqrt{3}", r"\sqrt{12}"      # a question that only a worker can answer
HANGS = r"\left(\sum_{n=1}^{9999} \sin(n)^{n}\right)^{\frac{1}{7}} + 9^{9^{9^{9}}}"
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def processes(session):
    """{pid: state letter} of a session's processes: the first field after the name, which may hold anything, is the state."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue                    # it has just ended
        if int(fields[3]) == session and fields[0] != "Z":
            found[int(folder.name)] = fields[0]
    return found


def workers_of(pool):
    return sorted(set(processes(pool.process.pid)) - {pool.process.pid}) if pool.process else []


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.01)
    return value


@pytest.fixture
def pool():
    pool = Pool()
    yield pool
    pool.close()


def run(code, *args, cwd=ROOT):
    return subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, timeout=300, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})


# -----------------------------------------------------------------------------
# the corpus

def test_the_corpus_is_a_thousand_different_texts_each_time_the_same():
    corpus = hostile.responses()
    assert corpus == hostile.responses() and len(corpus) == len({text for _, text in corpus}) == 1000
    kinds = "code slow words long nested unbalanced list empty regex soup tower lure"
    assert {kind for kind, _ in corpus} == set(kinds.split())


@needs_proc
def test_a_thousand_hostile_responses(tmp_path):
    """judged from an empty folder: none is right, raises, writes a file or takes its worker's memory; nothing is left."""
    code = r"""
import json, os, resource, time, hostile, judge_pool, reward
from test_judge_hostile import RIGHT, processes
corpus, golds = [text for _, text in hostile.responses()], hostile.GOLDS
start = time.monotonic()
got = reward.judge_batch([(text, golds[i % len(golds)]) for i, text in enumerate(corpus)])
seconds = time.monotonic() - start
reward.readable_batch([text[24:-2] for text in corpus[::10]])       # as gold answers: neither do these stop anything
after = reward.judge(rf"\boxed{{{RIGHT[1]}}}", RIGHT[0])
server = reward._pool.process.pid
reward._pool.close()
print(json.dumps(dict(
    right=[ascii(text)[:100] for text, v in zip(corpus, got) if v.correct], errors=[v.error for v in got], seconds=seconds,
    after=after, left=list(processes(server)), peak=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    cpu=sum(t for who in (0, resource.RUSAGE_CHILDREN) for t in resource.getrusage(who)[:2]))))
"""
    done = run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{found['seconds']:.1f} s, {found['cpu']:.1f} of CPU, largest process {found['peak'] / 2**30:.2f} GB, "
          f"{found['errors'].count('timeout')} timeouts, {found['errors'].count('unreadable')} unreadable")
    assert found["right"] == [] and found["after"] is True and found["left"] == [] and list(tmp_path.iterdir()) == []
    assert len(found["errors"]) == 1000 and set(found["errors"]) == {"", "timeout", "unreadable"}
    assert 0 < found["errors"].count("timeout") < 100 < found["errors"].count("unreadable")
    assert found["peak"] < judge_pool.MEMORY_BYTES + 2**28
    assert found["cpu"] < 2 * 60        # a minute of two cores, on a busy machine too


# -----------------------------------------------------------------------------
# a worker: what it cannot do

ATTEMPTS = {
    "read a file": "open('/etc/hostname')", "write a file": "open('made', 'w')", "os.open": "os.open('/etc/hostname', 0)",
    "a folder": "os.mkdir('made')", "list": "os.listdir('.')", "remove": "os.remove('there')",
    "rename": "os.rename('there', 'b')", "link": "os.symlink('there', 'made')", "shell": "os.system('touch made')",
    "process": "subprocess.Popen(['touch', 'made'])", "fork": "os.fork()", "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})", "kill": "os.kill(os.getppid(), 0)", "socket": "socket.socket()",
    "connect": "socket.getaddrinfo(b'127.0.0.1', 9)", "import": "__import__('wave')", "sympy": "__import__('sympy.nothing')",
    "ctypes": "ctypes.CDLL(None)", "eval": "eval('1 + 1')", "Python": "exec('x = 1')", "compile": "compile('1', 'f', 'eval')",
    "sympify": "sympy.sympify('1')", "environment": "os.environ['SECRET']",
    "chdir": "os.chdir('/')", "chmod": "os.chmod('there', 0)", "truncate": "os.truncate('there', 0)"}
FENCED = r"""
import ctypes, json, os, signal, socket, subprocess, sys, sympy, judge_pool
actions = {name: eval("lambda: " + text) for name, text in json.loads(sys.argv[1]).items()}
judge_pool.warm_up()
judge_pool.load("sympy.nothing")
if sys.argv[2] == "kernel only":
    judge_pool.refuse = lambda event, args: None
mine, theirs = os.pipe()
if os.fork() == 0:
    try:
        judge_pool.confine(theirs)
        got = {}
        for name, action in actions.items():
            try:
                got[name] = "done: " + repr(action())[:50]
            except BaseException as error:
                got[name] = f"{type(error).__name__}: {error}"
        os.write(judge_pool.OUT, json.dumps(got).encode())
    finally:
        os._exit(0)
os.close(theirs)
print(os.fdopen(mine).read())
"""


def fenced(actions, which, folder):
    (folder / "there").write_text("here")
    done = run(FENCED, json.dumps(actions), which, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["there"] and (folder / "there").read_text() == "here"
    got = json.loads(done.stdout)
    assert got.keys() == actions.keys()
    return got


def test_a_worker_can_do_nothing_but_answer(tmp_path):
    got = fenced(ATTEMPTS, "all", tmp_path)
    kept = {name: text for name, text in got.items() if not text.endswith("in a judge's worker")}
    assert kept.keys() == {"environment"} and kept["environment"].startswith("KeyError"), kept
    assert got["import"].startswith("ImportError") and got["sympy"].startswith("ImportError")


@needs_proc
def test_the_kernel_alone_gives_a_worker_no_file_socket_or_memory(tmp_path):
    names = "read a file", "write a file", "os.open", "list", "socket", "process"
    sizes = {"memory": "len(bytearray(1100 << 20))", "less": "len(bytearray(1 << 29))"}
    got = fenced({name: ATTEMPTS[name] for name in names} | sizes, "kernel only", tmp_path)
    assert {name for name, text in got.items() if "Too many open files" in text} == set(names), got
    assert got["memory"].startswith("MemoryError") and got["less"] == f"done: {1 << 29}"


@needs_proc
def test_the_kernel_bounds_a_worker(pool):
    assert pool.ask([("20", HANGS)]) == [Verdict(False, "timeout")]     # the imports are made
    thread = threading.Thread(target=pool.ask, args=([("20", HANGS)],))
    thread.start()
    pid = wait_for(lambda: workers_of(pool))[0]
    limits = Path(f"/proc/{pid}/limits")
    wait_for(lambda: re.search(r"Max open files +0 +0 ", limits.read_text()))
    rows = dict(re.findall(r"^Max ([a-z ]+?)  +(\w+) ", limits.read_text(), re.MULTILINE))
    assert [rows[name] for name in ("file size", "open files", "processes", "core file size")] == ["0"] * 4
    assert judge_pool.MEMORY_BYTES < int(rows["address space"]) < 2 * judge_pool.MEMORY_BYTES
    assert {int(link.name) for link in Path(f"/proc/{pid}/fd").iterdir()} == {1, 2, judge_pool.OUT}
    thread.join()


@needs_proc
def test_nothing_of_this_process_reaches_the_judge(pool, monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    mine, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    assert pool.ask([RIGHT]) == [Verdict(True, "")]
    server = Path(f"/proc/{pool.process.pid}")
    assert b"SECRET" not in (server / "environ").read_bytes()
    assert os.readlink(f"/proc/self/fd/{theirs}") not in [os.readlink(link) for link in (server / "fd").iterdir()]
    os.close(mine), os.close(theirs)


def test_no_text_of_a_formula_is_compiled():
    """math-verify has sympy read its numbers, which is eval; in the judge nothing is compiled but sympy's own templates."""
    code = r"""
import json, sys, answers, hostile, judge_pool
judge_pool.warm_up()
for module in "tensor.tensor", "physics.units", "physics.matrices":     # these compile constants when they are imported
    judge_pool.load(f"sympy.{module}")
seen, files = [], []
def watch(event, args):
    if event == "compile" and args[0] is not None:
        seen.append(args[0] if isinstance(args[0], str) else bytes(args[0]).decode())
        files.append(sys._getframe(1).f_code.co_filename)
sys.addaudithook(watch)
for text in ["54321", "54321.5+x", r"\frac{54321}{x}", "54321,54322", r"54321\%", "1.54321e5x", *hostile.CODE]:
    for gold in "x+1", "20", r"\{1,2\}":
        for formulas in (answers.compare_formulas, lambda *pair: answers.parse(pair[1])):
            try:
                answers.compare(gold, text, formulas)
            except Exception:
                pass
assert str(answers.parse("x^{543.5}+y")) == "x**543.5 + y"
print(json.dumps([text for text, file in zip(seen, files) if not file.endswith("/monomials.py")]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_numbers_are_read_as_sympy_would_and_nothing_else_is():
    import sympy
    for text in ("20", "020", "0", "0.75", ".5", "5.", "1e5", "2.5E-3", "9" * 60):
        assert judge_pool.number(text) == sympy.sympify(text.lstrip("0") or "0"), text
        assert type(judge_pool.number(text)) is type(sympy.Number(text.lstrip("0") or "0")), text
    for text in ("", "x", "1+1", "1_000", "٣", "2**9", "-5", "1e", "0x1f", "1j", "20\n", "open(1)", "__import__('os')",
                 "9" * 5000):
        with pytest.raises(ValueError):
            judge_pool.number(text)


# -----------------------------------------------------------------------------
# equal verdicts, whoever is killed

MIXED = ([(rf"{n}\sqrt{{3}}", rf"\sqrt{{{3 * n * n + (n % 3 == 0)}}}") for n in range(2, 42)]
         + [RIGHT, ("x^2+y^2=4", "y^2+x^2=4"), ("x>5", r"(5, \infty)"), ("2x+1", "x+x+1"), ("2x+1", r"\foo{x}"),
            (r"24+4\pi", r"4(\pi + 6)"), ("3", r"\sqrt[3]{27}"), ("3", r"\frac{x}{"), ("3", "x" * 300 + "^2"),
            (r"\frac{1}{2}", r"\sin 30^\circ"), ("1, 2", r"\sqrt{4}, \sqrt{1}"), (r"(1+x)^{9}", r"(1+x)^{8}(1+x)")])


def mixed():
    """questions of all kinds, two that hang among them."""
    return MIXED[:20] + [("20", HANGS)] + MIXED[20:] + [(r"\sqrt{3}", HANGS)]


@pytest.fixture(scope="module")
def verdicts():
    """of one worker, undisturbed."""
    pool = Pool()
    got = pool.ask(mixed(), 1)
    pool.close()
    assert [v.error for v in got].count("timeout") == 2 and got[20].error == got[-1].error == "timeout"
    assert [v.correct for v in got[:20]] == [n % 3 != 0 for n in range(2, 22)]
    assert {"", "unreadable"} < {v.error for v in got} and sum(v.correct for v in got) > 30
    return got


@pytest.mark.parametrize("workers", [2, 4])
def test_verdicts_do_not_depend_on_the_number_of_workers(pool, verdicts, workers):
    assert pool.ask(mixed(), workers) == verdicts


def test_verdicts_do_not_depend_on_the_order(pool, verdicts):
    assert pool.ask(mixed()[::-1], 2) == verdicts[::-1]
    assert [pool.ask([question], 2)[0] for question in mixed()[15:25]] == verdicts[15:25]


@needs_proc
def test_killed_workers_and_servers_change_no_verdict(pool, verdicts):
    killed = []

    def kill():
        for which in ("worker", "worker", "server", "worker"):
            if which == "server":
                time.sleep(0.3)
            pid = wait_for(lambda: workers_of(pool))[0]
            pid = pool.process.pid if which == "server" else pid
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            wait_for(lambda pid=pid: not running(pid))

    thread = threading.Thread(target=kill)
    thread.start()
    got = pool.ask(mixed() * 2, 2)
    thread.join()
    assert got == verdicts * 2 and len(set(killed)) == 4


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@needs_proc
def test_a_question_whose_worker_always_dies_costs_itself_only(pool):
    pool.ask([RIGHT])
    stop = threading.Event()

    def kill():                         # what hangs is there to be killed; the others are quick
        while not stop.is_set():
            for pid in workers_of(pool):
                time.sleep(0.3)
                if running(pid):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    got = pool.ask([RIGHT, ("20", HANGS), RIGHT], 1)
    stop.set()
    thread.join()
    assert got[1] == Verdict(False, "unreadable") and got[0] == got[2] == Verdict(True, "")


@needs_proc
def test_the_limit_is_cpu_time_not_a_busy_machines(pool):
    assert pool.ask([("20", HANGS)]) == [Verdict(False, "timeout")]     # and its imports are made
    got = []
    thread = threading.Thread(target=lambda: got.extend(pool.ask([("20", HANGS)])))
    thread.start()
    pid = wait_for(lambda: workers_of(pool))[0]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(judge_pool.LIMIT_S * 1.5)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.1)
    assert running(pid) and not got     # the clock on the wall said so long ago
    thread.join()
    assert got == [Verdict(False, "timeout")]


@needs_proc
def test_the_wall_clock_ends_a_worker_that_gets_no_cpu(pool, monkeypatch):
    """from outside, when even the kernel's timers did not: the server is replaced, and the question asked again."""
    assert pool.ask([RIGHT]) == [Verdict(True, "")]
    first = pool.process.pid
    monkeypatch.setattr(judge_pool, "WALL_S", 1.0)
    monkeypatch.setattr(judge_pool, "START_S", 9.0)
    os.kill(first, signal.SIGSTOP)
    got = pool.ask([RIGHT, ("3", r"\sqrt{3}")])
    assert got == [Verdict(True, ""), Verdict(False, "")] and pool.process.pid != first and not running(first)


@needs_proc
def test_a_judge_that_never_answers_stops_no_run(pool, monkeypatch):
    monkeypatch.setattr(Pool, "_read", lambda self, seconds: b"ready" if seconds == judge_pool.START_S else None)
    assert pool.ask([RIGHT] * 20, 2) == [Verdict(False, "timeout")] * 20
    monkeypatch.undo()
    assert pool.ask([RIGHT]) == [Verdict(True, "")]


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(56), raising=False)
    for ranks, workers in {"1": 8, "7": 8, "14": 4, "56": 1, "60": 1}.items():
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert judge_pool.default_workers() == workers


def test_a_judge_that_cannot_start_says_so(pool, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="judge did not start; `/bin/false .*judge_pool.py --serve` shows why"):
        pool.ask([RIGHT])


def test_after_an_interrupt_no_old_answer_meets_a_new_question(pool, monkeypatch):
    real, calls = Pool._read, []

    def read(self, seconds):
        calls.append(seconds)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, seconds)

    monkeypatch.setattr(Pool, "_read", read)
    with pytest.raises(KeyboardInterrupt):
        pool.ask([RIGHT] * 9, 2)
    monkeypatch.undo()
    assert pool.ask([("3", r"\sqrt{3}")] * 9, 2) == [Verdict(False, "")] * 9


def test_long_questions_fill_no_pipe(pool):
    """the largest that there are, in characters that take 12 bytes each, many more than a pipe holds."""
    text = "\U0001f916" * answers.MAX_CHARS
    assert pool.ask([(text, text)] * 200, 8) == [Verdict(False, "unreadable")] * 200


def test_a_hanging_formula_is_cut_and_the_next_judged():
    pairs = [(rf"\boxed{{{HANGS}}}", r"\sqrt{3}"), (rf"\boxed{{{RIGHT[1]}}}", RIGHT[0])]
    assert judge_batch(pairs) == [Verdict(False, "timeout"), Verdict(True, "")]


def test_brackets_in_brackets_are_bounded():
    deep = answers.MAX_DEPTH
    assert judge(r"\boxed{" + "(" * deep + r"\sqrt{4}" + ")" * deep + "}", "2") is False
    assert judge(r"\boxed{" + "(" * (deep - 5) + r"\sqrt{4}" + ")" * (deep - 5) + "}", "2") is True
    assert judge_batch([(r"\boxed{" + "(" * deep + "(2)" + ")" * deep + "}", "2")]) == [Verdict(False, "unreadable")]
    assert answers._depth("((1))") == answers._depth(r"\frac{(1)}{[2]}") == 2 and answers._depth(")](") == 1


# -----------------------------------------------------------------------------
# threads, forks, and the end

def test_threads_share_a_pool():
    pairs = [(rf"\boxed{{\sqrt{{{n * n * 3}}}}}", rf"{n + n % 2}\sqrt{{3}}") for n in range(2, 26)]
    got, errors = {}, []

    def run(n):
        try:
            got[n] = judge(*pairs[n])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and got == {n: n % 2 == 0 for n in range(len(pairs))}


def test_a_forked_child_has_its_own_judge():
    code = r"""
import os, reward
gold = r"2\sqrt{3}"
assert reward.judge(r"\boxed{\sqrt{12}}", gold)
mine = reward._pool.process.pid
reward._pool.lock.acquire()         # as if another thread were judging while this one forks
child = os.fork()
if child == 0:
    ok = reward._pool.process is None and reward.judge(r"\boxed{\sqrt{12}}", gold) and reward._pool.process.pid != mine
    reward._pool.close()
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
reward._pool.lock.release()
assert reward.judge(r"\boxed{\sqrt{12}}", gold) and reward._pool.process.pid == mine
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@needs_proc
@pytest.mark.parametrize("end", ["killed", "killed while judging", "returns", "returns while judging"])
def test_no_process_outlives_the_asking_one(end):
    code = r"""
import os, signal, sys, threading, time, reward
from test_judge_hostile import HANGS, wait_for, workers_of
assert reward.judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
print(reward._pool.process.pid, flush=True)
if "judging" in sys.argv[1]:
    hangs = [(rf"\boxed{{{HANGS} + {n}}}", "20") for n in range(40)]
    threading.Thread(target=reward.judge_batch, args=(hangs, 4), daemon=True).start()
    for pid in wait_for(lambda: len(found := workers_of(reward._pool)) == 4 and found):
        os.kill(pid, signal.SIGSTOP)        # or their limits would end them soon
if "killed" in sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(code, end)
    assert done.returncode == (-9 if "killed" in end else 0), done.stderr
    server = int(done.stdout)
    try:
        wait_for(lambda: not processes(server), 10)
    finally:
        for pid in processes(server):
            os.kill(pid, signal.SIGKILL)


# -----------------------------------------------------------------------------
# any text at all

ANY = st.text(st.characters(exclude_categories=()), max_size=80)        # lone surrogates and control characters too
LATEX = st.lists(st.sampled_from(hostile.PIECES + hostile.CODE + ["2", "x", "\\pi", "3"]), max_size=12).map("".join)
ANSWERS = st.sampled_from(hostile.GOLDS) | ANY | LATEX


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ANY | LATEX.map(hostile.box) | ANY.map(hostile.box), ANSWERS), max_size=4))
def test_any_text_gets_a_verdict_and_the_same_one_again(pairs):
    got = judge_batch(pairs)
    assert len(got) == len(pairs) and all(type(v) is Verdict and type(v.correct) is bool for v in got)
    assert all(v.error in ("", "timeout", "unreadable") and not (v.error and v.correct) for v in got)
    assert judge_batch(pairs[::-1], 1) == got[::-1]


@settings(max_examples=75, deadline=None)
@given(ANY | LATEX, ANY | LATEX | st.sampled_from(hostile.GOLDS), ANSWERS)
def test_text_before_the_box_changes_no_verdict(before, inside, answer):
    response = r"\boxed{" + inside + "}"
    alone, after = judge_batch([(response, answer), (before.replace("boxed", "") + " " + response, answer)])
    assert alone == after


@settings(max_examples=75, deadline=None)
@given(st.lists(ANY | LATEX, max_size=4))
def test_any_gold_answer_is_readable_or_not(golds):
    got = readable_batch(golds)
    assert got == readable_batch(golds) and all(type(ok) is bool for ok in got) and len(got) == len(golds)

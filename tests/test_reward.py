"""reward.py: strings of all kinds, hostile ones too, and labelled responses if NANOMAYE_REAL_DATA is set."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import hostile
import reward
from conftest import ROOT
from reward import Verdict, format_reward, judge, judge_batch, language_reward, last_boxed, readable_batch

boxed = hostile.box
HANGS = r"((x+1)^{999})^{999}", r"\pi a^2"      # (box, gold)

# gold answer: (boxes that are right, boxes that are wrong)
TABLE = {
    "20": (
        ["20", " 20 ", "20.", "020", r"\$20", "**20**", r"\text{20}", r"\mathbf{20}", "x=20", "BC = 20",
         "∠B = 20°", r"AB = 4 \cdot 5 = 20", r"\text{Area} = 20", "f(3) = 20", r"\text{approximately } 20",
         r"\approx 20", r"20 \text{ cm}", r"20 \, \mathrm{cm}^2", r"20\mathrm{~cm}^{2}", "20 cm^2",
         r"20 \text{ m}", "20 apples", r"20 \text{ km/h}", r"20^\circ", "20°", r"20^\circ \text{C}", r"20\%",
         r"\text{(B) } 20", r"\textbf{(B)}\ 20", r"2 \times 10", r"\frac{40}{2}", "40/2", r"\sqrt{400}",
         "√400", "3(4) + 8", r"\{20\}", "19.995", "20\u200b", "4! - 4"],
        ["", "?", ".", "2", "-20", "20.01", "20.5", "20,30", "20, 30", r"20 \text{ or } 30", "20 and 30",
         "x=20, y=30", r"20 \text{ or more}", r"\text{more than } 20", r"\text{not } 20",
         r"20 \text{ million}", "10 10", r"20\pi", "20x", r"\sqrt{20}", "<20", "x > 20", "(20, 30)",
         "20 = 30", "B", r"\text{twenty-five}", "2 0", "20_5", r"\foo{20}", "20 +", r"0.2\%"]),
    "-5": (["-5", "−5", "- 5", "x = -5", r"-\frac{10}{2}", "(-5)"], ["5", "--5", "|-5|", "-0.5"]),
    "0": (["0", "0.0", "-0", r"\frac{0}{3}", r"0^\circ"], ["0.005", "1", r"\emptyset"]),
    ".75": ([".75", "0.75", r"\frac{3}{4}", r"75\%", "3/4"], ["75", ".7", "0.76"]),
    "1000": (["1,000", "1{,}000", r"1\,000", "10^3"], ["1", "1,00", "10^4"]),
    r"\frac{1}{2}": (
        ["1/2", r"\frac12", r"\dfrac{1}{2}", "0.5", ".5", r"50\%", "1:2", "2^{-1}"],
        ["2", "1", "0.51", "12", "1, 2"]),
    r"5\sqrt{3}": (
        ["8.66", r"5 \sqrt { 3 }", r"\sqrt{75}", "5√3", "5sqrt(3)", r"5\sqrt{3} \approx 8.66",
         r"\frac{15}{\sqrt{3}}", r"x = 5\sqrt{3} \text{ cm}", r"5\sqrt{3} \text{ m}"],
        ["8.7", "8.65", "5", "3", "15", r"5+\sqrt{3}", r"\sqrt{15}"]),
    r"36 \pi": (["36π", "36 pi", "113.10", r"36\pi \approx 113"], ["113", "36", r"36\pi^2"]),
    "0.005": (["0.005", r"\frac{1}{200}"], ["0", "0.01", "0.006", "-0.004"]),
    r"\frac{7}{3}": ([r"2\frac{1}{3}", "2.333", "2 1/3"], ["2", r"\frac{2}{3}", r"\frac{3}{7}", "2.3"]),
    r"\frac{3}{4}\pi": ([r"\frac{3\pi}{4}", r"3/4\pi", "2.356"], [r"\frac{3}{4\pi}", r"\frac{3}{4}"]),
    "B": (["B.", r"\textbf{(B)}", "B) 12", "Option B", "b"], ["A", "AB", "12", "A and B", "B or C"]),
    "(3,-4)": (["(3, -4)", r"\left(3, -4\right)"], ["(-4,3)", "3", "-4", "(3,-4,0)"]),
    "1, 2": (
        ["2, 1", r"1 \text{ and } 2", r"x=2 \text{ or } x=1", r"\{2,1\}", r"x \in \{1,2\}"],
        ["1", "1, 3", "1, 2, 3", "12", "1.2"]),
    r"\pm 2": (["±2", "-2, 2", r"x = \pm 2"], ["2", "-2", r"\pm 3"]),
    "[1,2)": (["[1, 2)", r"x \in [1,2)", r"1 \le x < 2"], ["(1,2)", "[1,2]", "[1,3)"]),
    r"(5, \infty)": (["x > 5", r"(5,+\infty)"], [r"[5, \infty)", r"x \ge 5", "5"]),
    "x=9": (["9", "x = 9.0", r"x = \sqrt{81}"], ["y=9", "x=8", "x>9"]),
    "x^2+y^2=4": (["x^2 + y^2 - 4 = 0", "2x^2+2y^2=8"], ["4", "x^2+y^2=2", "x^2+y^2"]),
    r"\frac{\pi a^2}{4}": ([r"\pi\left(\frac{a}{2}\right)^2", r"S = \frac{1}{4}\pi a^{2}"], ["0.785"]),
    "Monday": ([r"\text{Monday}", "monday."], ["Tuesday", "1"]),
    r"\frac{1}{2004!}": ([r"\frac{2}{2 \cdot 2004!}"], [r"\frac{1}{2006!}", "0"]),
    r"\frac{3^{1008}-1}{3^{1009}}": ([r"\frac{1}{3}-\frac{1}{3^{1009}}"], [r"\frac{1}{3}"]),
    r"$\boxed{\frac{16}{7}}$": (["16/7"], ["16", "7"]),
    "\x0crac{36}{13}": ([r"\frac{36}{13}"], [r"\frac{1}{13}", "36"]),
}


def wait_for_the_end_of(server):
    """of every living process of its session; in stat, after a name: state, parent, group, session."""
    deadline, living = time.monotonic() + 20, True
    while living:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        stats = subprocess.run("cat /proc/[0-9]*/stat", shell=True, text=True, capture_output=True).stdout
        fields = [line.rpartition(")")[2].split() for line in stats.splitlines()]
        living = [field for field in fields if field[0] != "Z" and field[3] == str(server)]


def run(*words, folder=ROOT, **environment):
    environment = os.environ | environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)


def test_table():
    pairs = [(boxed(box), gold) for gold, (right, wrong) in TABLE.items() for box in right + wrong]
    wanted = [box in right for right, wrong in TABLE.values() for box in right + wrong]
    got = judge_batch(pairs)
    assert [(*pair, *v) for pair, v, correct in zip(pairs, got, wanted) if v.correct != correct] == []
    assert {verdict.error for verdict in got} == {"", "unreadable"}
    assert readable_batch(TABLE) == [True] * len(TABLE)


def test_each_rewrite_is_needed_by_its_example():
    for i, (pattern, _, example) in enumerate(reward.REWRITES):
        text = example.translate(str.maketrans(reward.CHARS))
        for earlier, replacement, _ in reward.REWRITES[:i]:
            text = re.sub(earlier, replacement, text)
        assert re.search(pattern, text), (example, text)


@pytest.mark.parametrize("response, content", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\boxed{8}}", "8"),
    (r"\boxed {3}", "3"), (r"$\boxed 12.$", "12"), (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{}", ""),
    ("\\boxed{a\nb}", "a\nb"), (r"\boxed{2} or \boxed{3", None), ("20", None), (r"\boxed{2}, \boxed", None),
    ("\\boxedx", None), (r"\boxed, {5}", None)])
def test_last_boxed(response, content):
    assert last_boxed(response) == content
    assert judge(response, content or "20") is (content not in (None, ""))


def test_an_unreadable_box_is_wrong_and_said_so():
    odd = ["?", r"\foo{2}", "", "9" * 500, "2 + ", "(" * 9 + r"\sqrt{4}" + ")" * 9]
    wanted = {"21": "", HANGS[0]: "timeout"} | dict.fromkeys(odd, "unreadable")
    got = judge_batch([(boxed(box), HANGS[1]) for box in wanted])
    assert got == [Verdict(False, error) for error in wanted.values()]
    assert judge_batch([("no box", "20"), (boxed("20"), "20")]) == [Verdict(False, ""), Verdict(True, "")]


def test_gold_answers_that_cannot_be_read():
    golds = ["", " ", "?", r"\frac{1}{2", r"\foo{2}", "2 +", "}{", "3 4", "1" * 500, "$$", r"\boxed{}"]
    assert readable_batch(golds) == [False] * len(golds)
    assert reward.readable(r"\sqrt{3}") and not reward.readable("?")


def test_numbers_letters_and_equal_strings_take_no_server(monkeypatch):
    monkeypatch.setattr(reward, "servers", [])
    pairs = [(boxed(str(i)), str(i // 2)) for i in range(256)]
    pairs += [(boxed(r"\foo"), r"\foo"), (boxed("(B)"), "B"), (boxed("$8.66$"), ".5"), ("none", "x")]
    assert sum(verdict.correct for verdict in judge_batch(pairs)) == 3 and reward.servers == []


def test_real_responses(real_data):
    for name, least in ("pairs", 1.0), ("responses_a", 0.999), ("responses_b", 0.999):
        text = (real_data / "judge" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        got = judge_batch([(row["response"], row["answer"]) for row in rows])
        agree = sum(verdict.correct == row["correct"] for verdict, row in zip(got, rows))
        assert agree >= least * len(rows) and not any(verdict.error == "timeout" for verdict in got), name
        assert all(readable_batch({row["answer"] for row in rows}))


def test_hostile_responses_do_nothing(tmp_path):
    """a hundred of all kinds, code among them: none is right, none runs (HERE is the canary)."""
    code = r"""
import hostile, reward
some = hostile.responses()[::4]
got = reward.judge_batch([(text, hostile.GOLDS[i % 6]) for i, text in enumerate(some)] + hostile.LURES)
reward.readable_batch(some[:20])
print(len(some) >= 100, sum(verdict.correct for verdict in got))
"""
    done = run("-c", code, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 0\n", "")
    assert list(tmp_path.iterdir()) == []


def test_text_is_never_compiled(tmp_path):
    """sympy reads numbers by an eval; in the judge's workers, converter keeps text away from it."""
    guard = re.search(r"\n +(converter\[str\].*)\n", (ROOT / "reward.py").read_text(encoding="utf-8"))[1]
    code = r"""
import sys, hostile
from reward import *
seen = []
sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == "compile" else None)
judge_one(("x+1", "54321+x"))       # without a guard, so that this test can fail
assert any("54321" in text for text in seen)
list(map(judge_one, WARM_UP))
""" + guard + r"""
seen.clear()
for text in ["65432+x", "65432.5x", r"\frac{65432}{x}", *hostile.CODE]:
    judge_one(("x+1", text))
print([text for text in seen if "65432" in text or "HERE" in text])
"""
    assert run("-c", code, folder=tmp_path).stdout == "[]\n"


def test_a_worker_may_do_nothing_but_answer(tmp_path):
    code = r"""
import os, socket, subprocess, sys, reward
actions = [lambda: open("/etc/hostname"), lambda: open("made", "w"), socket.socket,
           lambda: bytearray(1 << 30), lambda: subprocess.run(["touch", "made"], stdin=0)]
os.dup2(os.open(os.devnull, os.O_RDWR), 2)
out = os.dup(1)
reward.confine(os.dup(1))
for action in actions:
    try:
        os.write(out, repr(action()).encode())
    except (OSError, MemoryError) as error:
        os.write(out, type(error).__name__.encode() + b" ")
"""
    assert run("-c", code, folder=tmp_path).stdout.split() == ["OSError"] * 3 + ["MemoryError", "OSError"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fresh(monkeypatch):
    """a server of this test's own; the workers' number is the test's to set."""
    monkeypatch.setattr(reward, "servers", [])
    yield monkeypatch
    for server in reward.servers:
        server.communicate()


def test_verdicts_do_not_depend_on_the_number_of_workers_or_the_order(fresh):
    pairs = [(boxed(rf"\sqrt{{{3 * n * n + (n % 3 == 0)}}}"), rf"{n}\sqrt{{3}}") for n in range(2, 12)]
    pairs += [(text, hostile.GOLDS[1]) for text in hostile.responses()[200::15]]
    fresh.setattr(reward, "WORKERS", 1)
    one = judge_batch(pairs)
    assert [verdict.correct for verdict in one[:10]] == [n % 3 != 0 for n in range(2, 12)]
    reward.servers.pop().communicate()
    fresh.setattr(reward, "WORKERS", 2)
    assert judge_batch(pairs[::-1])[::-1] == one


def test_a_killed_server_is_replaced_and_leaves_nothing(fresh):
    assert judge(boxed(r"\sqrt{12}"), r"2\sqrt{3}")
    first = reward.servers[0].pid
    threading.Timer(0.3, os.kill, [first, signal.SIGKILL]).start()
    assert judge_batch([(boxed(HANGS[0]), HANGS[1]), (boxed(r"\sqrt{12}"), r"2\sqrt{3}")]) == [
        Verdict(False, "timeout"), Verdict(True, "")]
    assert reward.servers[0].pid != first
    wait_for_the_end_of(first)
    fresh.setattr(sys, "executable", "/bin/false")
    os.killpg(reward.servers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="python reward.py 1"):
        judge(boxed(r"\sqrt{12}"), r"2\sqrt{3}")


def test_the_server_dies_with_its_parent_and_knows_nothing_of_it(tmp_path):
    code = r"""
import os, signal, sys, reward
assert reward.judge(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
server = reward.servers[0].pid
known = open(f"/proc/{server}/environ").read().split("\0")
print(server, [name for name in known if name[:4] in ("RANK", "MAST")], os.getsid(server) - server)
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run("-c", code, RANK="1", MASTER_ADDR="127.0.0.1")
    server, rest = done.stdout.split(maxsplit=1)
    assert rest == "[] 0\n"
    wait_for_the_end_of(server)


@pytest.mark.parametrize("response, wanted", [
    ("The answer is 5.", 0), ("", 0), ("12 + 3 = 15", 0), ("α and β, Ω", 0), ("naïve café", 0), ("12中", -1),
    ("ab中文", -0.5), ("Ответ", -1), ("中 = x", -0.5), ("𝑥 = ５ ａ", 0), ("90° ± 5²", 0)])
def test_language_reward(response, wanted):
    assert language_reward(response) == wanted


@pytest.mark.parametrize("response, wanted", [
    (r"$\boxed{5}$.", 1), ("\\[\\boxed{5}\\]\n", 1), (r"**\boxed{5}**", 1), ("5", 0), (r"\boxed{5} is 5", 0),
    (r"\( \boxed{\frac{1}{2}} \)", 1), (r"\boxed 5.", 1), (r"\boxed{ }", 0), (r"\boxed{5} \boxed{5}", 0),
    (r"\boxed{}", 0), (r"\boxed{5", 0), (r"\boxed{5}" + " " * 99, 0), (r"\boxed{5} \boxedx", 0),
    (r"\boxedx \boxed{5}", 1), (r"\boxed{{5}}", 1)])
def test_format_reward(response, wanted):
    assert format_reward(response) == wanted

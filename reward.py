r"""
Rule rewards of a response: is its last \boxed{...} right, is it in one script, is it laid out as asked.

    judge(r"so the side is \boxed{8.66}.", r"5\sqrt{3}")     # True

Right is an equal value, however written; units, degree signs, `x =` and words around it are ignored. Where
one of the two is a decimal, less than 0.01 apart will do (the paper's code), if that is less than a tenth of
the gold too (ours: 0 is not 0.005). 17% is right for 17 and for 0.17. Lists and sets go in any order, points
in theirs; a list where one number is asked is wrong. No box, or a last one that never closes: wrong.

A response is hostile text: 9^{9^9} takes for ever, and neither a signal nor a thread ends that everywhere
(Math-Verify#55 on GitHub). Numbers, letters and equal strings are settled here. For the rest:

    trainer  <-- a line of JSON each way -->  python reward.py  <-- pebble.ProcessPool -->  limited workers
"""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from fractions import Fraction
from multiprocessing import get_context
from typing import NamedTuple

import math_verify
import pebble
import sympy
from math_verify.parser import NormalizationConfig
from sympy.core.sympify import converter

LIMIT_S = 1.0               # CPU time of one question; most take 0.01 s
WALL_S = 20.0               # its time on the clock, for a machine so busy that LIMIT_S of CPU takes that long
MEMORY_BYTES = 1 << 30      # address space of a worker
MAX_CHARS = 400             # of an answer; a longer one is none
WORKERS = min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))   # of one rank
servers = []                # `python reward.py`, while it waits for a question
BOXED = r"\\boxed(?![A-Za-z])"
PLAIN = re.compile(r"[\s$]*([+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))[\s$.]*")


class Verdict(NamedTuple):
    correct: bool
    error: str              # '', 'timeout', or 'unreadable': a box without an answer. Then correct is False


def last_boxed(text):
    r"""what the last \boxed{...} of text holds; None without one, or if it never closes. Linear in len(text).
    `\boxed 5` is read as it is meant: the digits, or the one letter, that follow."""
    tail = (re.split(BOXED, text)[1:] or [""])[-1].lstrip()
    if not tail.startswith("{"):
        bare = re.match(r"-?\d[\d.,]*|[A-Za-z]", tail)
        return bare and bare[0].rstrip(".,")
    depth = 0
    for match in re.finditer(r"\\.|[{}]", tail, re.DOTALL):     # \\. steps over \{ and \}
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return tail[1:match.start()]
    return None


# ---- in a worker: does the box say what the gold answer says? ----------------------------------------------
CHARS = {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "√": r"\sqrt ", "π": r"\pi ", "∠": "",
         "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "∪": r"\cup ", "°": r"^\circ ", "²": "^2",
         "³": "^3", "\u200b": "", "\f": r"\f"}       # \frac, read from JSON with one backslash, is \f and rac
# words: four letters, or one of these (xy, abc, ABCD are products and names); some say another number
WORD = "[A-Za-z][a-z]{3,}|[cdkm]m|ft|in|yd|mi|kg|deg|rad|sec|min|hrs?|sq|cu|[Tt]he|is|an|of|at|[Yy]es|no|not"
CHANGES = set("not no never more less most least over under half third twice dozen hundred million".split())
REWRITES = [  # pattern, replacement, an example; one after the other. Words get quotes; clean takes them out
    (r"\*\*|\\[()\[\]]|\\?\$|~|\\(?=%)|\\(quad|angle|triangle|[,;: ])(?![a-z])", " ", r"\(**12**\,\) \$"),
    (r"\^\s*(\{\s*\\circ\s*\}|\\circ)", " ", r"60^\circ"),
    (r"(?<=.)\\(text|mathrm)\s*\{\s*([mgshuCF])\s*\}", r' "\2" ', r"12 \mathrm{~m}"),
    (r"\\(text\w*|math[a-z]+|mbox|boxed|underline|boldsymbol|bf)(?![a-z])", " ", r"\mathbf{12} \text{cm}"),
    (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-z])", r"\\\1 ", "36 pi"),
    (r"\\sqrt\s*(\((?P<a>[^()]*)\)|(?P<b>\d+))", r"\\sqrt{\g<a>\g<b>}", "sqrt(75), √75"),
    (r"\{?\s*\b(and|or)\b\s*\}?|\{,\}|,\\!", ",", r"1 \text{ or } 2; 1{,}000"),
    (r"(?<![\d.,(\[{])\d{1,3}([, ]\d{3})+(?![\d,)\]}])", lambda match: re.sub(r"\D", "", match[0]), "1,000"),
    (r"^\W*[A-E]\s*[}).:]+[\s}]*(?=\S)", "", "(B) 20"),
    (r"(?<=[\d})i])\s*\\approx.*|\\approx", "", r"5\sqrt{3} \approx 8.66"),
    (rf"(?<![\\A-Za-z])({WORD})(?![A-Za-z])", lambda match: f'"{match[0].lower()}"', "cannot be determined"),
    (r'("\w+")\s*/\s*("\w+"|[a-z])', r"\1", "20 km/h"),
    (r'"\s*\^\s*(\{\s*\d\s*\}|\d)', '"', "12 cm^2"),
    (r'[{(]\s*("["\w. ]*")[\s.:]*[})](\s*\^\s*(\{\s*\d\s*\}|\d))?', r" \1 ", r"\text{cm}^2"),
    (r",\s*[A-Za-z](_\{?\d\}?)?\s*=", ",", "x = 1, x = 2"),
    (r"(?<![\d./^{])(\d+)\s*/\s*(\d+)(?![\d./^!])", r"\\frac{\1}{\2}", r"3/4\pi"),      # read as 3/(4\pi)
    (r"(?<![_^a-z])([\d)])\s*\(", r"\1\\cdot (", "3(4)"),                               # read as 3 + 4
]
# signs of no answer; numbers side by side, read as a sum; brackets nine deep; what takes long, like towers
REFUSED = re.compile(r"""[^A-Za-z0-9\\{}()\[\]^_+\-*/=<>.,:;!|% ] | (?<!_)\d\s+\d | \d_ | \d\.\d*\.
    | ([(\[{][^()\[\]{}]*){9} | \^\s*\{[^{}]*\^ | \^\s*\{?\s*-?\d{5} | \d{5}\s*! | !\s*!
    | \\(int|oint|sum|prod|operatorname)""", re.VERBOSE)
# LaTeX only: math-verify's other parser, of plain expressions, is sympy's parse_expr, which runs Python
LATEX = math_verify.LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True))


def clean(text):
    """(formula, words): an answer in one spelling of LaTeX, without the words around it; these words."""
    text = text.translate(str.maketrans(CHARS))
    for pattern, replacement, _ in REWRITES:
        text = re.sub(pattern, replacement, text)
    formula = re.sub(r'"\w+"|\{\s*\}', " ", text)
    return formula.lstrip(" ,;:").rstrip(" .,;:\\"), re.findall(r'"(\w+)"', text)


def close(gold, box, decimal):
    """whether two numbers are one answer: equal to 490 digits, or near if one of them is a decimal."""
    bound = min(Fraction(1, 100), abs(gold) / 10) if decimal else abs(gold) / 10**490
    return bool(gold == box or abs(gold - box) < bound)


def same(gold, box):
    """whether box says what gold says. Raises ValueError, or what sympy raises, if one makes no sense."""
    (gold, words), (box, box_words) = clean(gold), clean(box)
    if not gold or CHANGES & (set(words) ^ set(box_words)):
        return bool(words) and (gold, words) == (box, box_words)    # Monday; 20 million is not 20
    if "=" not in gold:                                     # x =, f(2) =, AB = 4 + 5 =, x \in
        box = re.sub(r"^([^\d+\-*/^<>=][^+\-*/^<>=]*)?=(.*=)?|^[a-z]\s*\\in(?![a-z])", "", box)
    if REFUSED.search(gold) or REFUSED.search(box):
        raise ValueError(box)
    (a,), (b,) = (math_verify.parse(rf"\boxed{{{text.replace('%', '')}}}", [LATEX], "no_fallback",
                                    parsing_timeout=None) for text in (gold, box))
    if not (getattr(a, "is_comparable", False) and getattr(b, "is_comparable", False)):     # not two numbers
        return math_verify.verify(a, b, timeout_seconds=None, allow_set_relation_comp=True)
    # verify takes 1/2004! for 1/2006! (Math-Verify#14); in 40 digits, (3^{1008} - 1) / 3^{1009} would be 1/3
    a, b, decimal = a.evalf(500), b.evalf(500), re.search(r"\.\d", gold + " " + box)
    return any(close(a, number, decimal) for number in ([b, b / 100] if "%" in box else [b]))


# ---- the server and its workers ----------------------------------------------------------------------------
WARM_UP = [(r"5\sqrt{3}", "8.66"), ("x^2+y^2=4", "2x^2+2y^2=8"), (r"(5, \infty)", "x > 5"), ("1,2", "2,1"),
           (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"), (r"\pi a^2", r"\pi(\frac{2a}{2})^{2}")]


def judge_one(question):
    """(correct, error) of one (gold, box)."""
    sympy.core.cache.clear_cache()          # no verdict depends on the questions before it
    sympy.core.random.seed(0)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)   # no handler: it ends a worker amid one big power, too
    try:
        return bool(same(*question)), ""
    except Exception:                       # of any kind: RecursionError and MemoryError are among them
        return False, "unreadable"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def confine(out):
    """takes a worker's rights: to open files and sockets, write files, start processes, take much memory."""
    os.dup2(2, 0)                           # 2 is /dev/null; pipes that a worker holds outlive the server
    os.dup2(2, out)
    for name, limit in dict(NOFILE=1, FSIZE=0, NPROC=0, CORE=0, AS=MEMORY_BYTES).items():  # 0 breaks poll()
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def serve(workers):
    """for each line [[gold, box], ...] of stdin writes a line [[correct, error], ...], until stdin ends."""
    out = os.dup(1)
    os.dup2(2, 1)                           # what a library prints is no answer
    for question in WARM_UP:                # sympy imports late, which a worker cannot
        assert judge_one(question) == (True, ""), f"math-verify does not work here: {question}"
    # sympy reads the digits of a number by an eval; not so from here on, and no other text becomes anything
    converter[str] = lambda text: sympy.Integer(int(text)) if text.isdigit() else sympy.Float(text)
    pool = pebble.ProcessPool(workers, initializer=confine, initargs=[out], context=get_context("fork"))
    try:
        for line in open(0, closefd=False):         # not sys.stdin: a forked worker would wait for its lock
            verdicts, questions = [], json.loads(line)
            for future in [pool.schedule(judge_one, [question], timeout=WALL_S) for question in questions]:
                try:
                    verdicts.append(future.result(4 * WALL_S))      # a net under pebble's own limit
                except (TimeoutError, pebble.ProcessExpired):       # only LIMIT_S ends a worker
                    verdicts.append((False, "timeout"))
            os.write(out, json.dumps(verdicts).encode() + b"\n")
    finally:        # when the trainer has gone or the pool is broken. start_new_session made us one group
        os.killpg(os.getpid(), signal.SIGKILL)


# ---- what the trainers call --------------------------------------------------------------------------------
def ask(questions):
    """a Verdict for each (gold, box), whatever WORKERS is. A server that dies is replaced, once."""
    # of the environment what Python needs, nothing of torchrun's; the seed orders sets alike in all servers
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if key in os.environ}
    for _ in range(2):
        server = servers.pop() if servers else subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(WORKERS)], env=kept | {"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True)         # a Ctrl-C in the terminal is for the trainer alone
        try:
            print(json.dumps(questions), file=server.stdin, flush=True)
            verdicts = [Verdict(*verdict) for verdict in json.loads(server.stdout.readline())]
        except (OSError, ValueError):
            continue
        servers.append(server)              # only now: after a Ctrl-C, no late answer meets the next question
        return verdicts
    raise RuntimeError("reward.py: the judge ends before it answers; `python reward.py 1` shows why")


def settle(gold, box):
    """the Verdict where it takes no parser, in microseconds; else None."""
    if box is None:
        return Verdict(False, "")
    if not box.strip() or max(len(gold), len(box)) > MAX_CHARS:
        return Verdict(False, "unreadable")
    if gold == box:
        return Verdict(True, "")
    a, b = PLAIN.fullmatch(gold), PLAIN.fullmatch(box)
    if a and b:
        return Verdict(close(Fraction(a[1]), Fraction(b[1]), "." in a[1] + b[1]), "")
    if re.fullmatch(r"[ (]*[A-E][ .)]*", gold):     # an option: B, (B), \textbf{(B)} 12; not "B or C", not AB
        said = re.sub(r"\\[a-z]+|\b(the|answer|option|choice|is)\b|[^a-z0-9]", " ", box.lower()).split()
        options = [word for word in said if word in [*"abcde"]]
        return Verdict(options == said[:1] == [gold.strip(" (.)").lower()], "")
    return None


def judge_batch(pairs):
    """a Verdict for each (response, answer), in order; equal questions are judged once."""
    questions = [(last_boxed(answer) or answer, last_boxed(response)) for response, answer in pairs]
    verdicts = {question: settle(*question) for question in questions}
    asked = [question for question, verdict in verdicts.items() if verdict is None]
    verdicts.update(zip(asked, ask(asked) if asked else []))
    return [verdicts[question] for question in questions]


def judge(response, answer):
    r"""whether the last \boxed{...} of response is the gold answer: LaTeX, with or without $, or text."""
    return judge_batch([(response, answer)])[0].correct


def readable_batch(answers):
    """for each answer, whether it can be a gold: in a box it is right, and not for being an equal string."""
    return [verdict.correct for verdict in judge_batch(
        [(rf"\boxed{{{last_boxed(answer) or answer} }}", answer) for answer in answers])]


def readable(answer):
    """readable_batch of one."""
    return readable_batch([answer])[0]


def language_reward(response):
    """minus the fraction of letters that are neither Latin nor Greek; not yet times the paper's 0.1."""
    letters = [char for char in response if char.isalpha()]
    plain = [unicodedata.normalize("NFKC", char)[0] for char in letters if not char.isascii()]  # Ａ is A
    foreign = [char for char in plain if not unicodedata.name(char, "").startswith(("LATIN", "GREEK"))]
    return -len(foreign) / len(letters) if letters else 0.0


def format_reward(response):
    r"""1.0 for exactly one \boxed, filled, with only punctuation and closing $, \), \] after it; else 0.0."""
    content, (_, *tails) = last_boxed(response), re.split(BOXED, response)
    if len(tails) != 1 or not content or not content.strip():
        return 0.0
    after = tails[0].partition(content)[2]
    return float(len(after) < 100 and re.fullmatch(r"(\\[)\]]|[\s$}.,;:!*)\]])*", after) is not None)


if __name__ == "__main__":
    serve(int(sys.argv[1]))

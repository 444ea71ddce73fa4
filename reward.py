r"""
Rule rewards of a response: is its last \boxed{...} right (accuracy), is it in one script (language), is it laid out as
asked (format).

    from reward import judge
    judge(r"so the side is \boxed{8.66}.", r"5\sqrt{3}")     # True

A response is hostile text: never evaluated as code, only its last box is read, and what is more than plain numbers and
words is parsed by math-verify in a worker process of judge_pool.py, which has a limit to all it can do. (A signal works
in the main thread only, a thread cannot be killed: https://github.com/huggingface/Math-Verify/issues/55.)

What counts as right is in answers.py. A response without \boxed{...} is wrong, and so is one whose last box never closes:
no earlier box is taken instead.
"""
import functools
import os
import re
import unicodedata

from answers import compare
from judge_pool import Pool, Verdict


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
# what the trainers call

_pool = Pool()
os.register_at_fork(after_in_child=_pool.forget)


class _Formula(Exception):
    """raised in place of comparing formulas in this process."""


def _not_here(gold, box, decimal):
    raise _Formula


def _read(response, answer):
    """the Verdict on one response, or the (gold, box) to ask the pool about. Numbers and words are compared here (0.2 ms)."""
    box = last_boxed(response)
    if box is None:
        return Verdict(False, "")
    answer = last_boxed(answer) or answer   # some golds come in a box
    try:
        return Verdict(bool(compare(answer, box, _not_here)), "")
    except _Formula:
        return answer, box
    except Exception:       # Unreadable, or a text nobody thought of: it stops no run
        return Verdict(False, "unreadable")


def judge_batch(pairs, workers=0):
    """a Verdict for each (response, answer), in order; equal ones are judged once. workers: processes at a time, 0 for
    default_workers(); the verdicts do not depend on it."""
    found = [_read(response, answer) for response, answer in pairs]
    formulas = list(dict.fromkeys(f for f in found if not isinstance(f, Verdict)))
    verdicts = dict(zip(formulas, _pool.ask(formulas, workers)))
    return [f if isinstance(f, Verdict) else verdicts[f] for f in found]


def judge(response, answer):
    r"""whether the last \boxed{...} of response is the gold answer: a number, formula, list, letter or word, in LaTeX
    with or without $, or plain."""
    return judge_batch([(response, answer)])[0].correct


def readable_batch(answers, workers=0):
    r"""for each answer, whether it can be a gold answer: \boxed{answer} is judged right, and not for being the same string.
    A letter A to E and words are compared as words and so are readable; a formula math-verify cannot parse is not."""
    boxed = [rf"\boxed{{{last_boxed(answer) or answer}}}" for answer in answers]
    return [bool(answer.strip()) and verdict.correct
            for answer, verdict in zip(answers, judge_batch(zip(boxed, answers), workers))]


def readable(answer):
    """readable_batch of one."""
    return readable_batch([answer])[0]


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


"""What the page marks in a response: reflection words, the last box, the word of a candidate "aha moment"."""
import itertools
import re

from reflection import WORDS
from reward import last_boxed

ANY_WORD = "|".join(sorted(WORDS, key=len, reverse=True))
NUMBER = r"-?\d[\d,./]*"
# a reflection word, or a value that the response states on its way: a result, an answer, an earlier box
STATED = rf"(?:=|answer is|answer:|\\boxed\{{)[\s$*]*(?P<value>{NUMBER})"
STEP = re.compile(rf"(?P<word>{ANY_WORD})|{STATED}", re.IGNORECASE)


def plain_value(text):
    """A number, or a text without blanks and $: equal for two ways to write the same short value."""
    text = re.sub(r"[\s$,]", "", text).rstrip(".")
    try:
        return float(text)
    except ValueError:
        return text


def aha_moment(response, final):
    """A candidate "aha moment" of a right response whose last box holds final: it states a value, then a
    reflection word, ends with another value and never comes back to the first. None, or (value before, word,
    its place). A guess for a person to look at, never a count: the paper chose its by eye."""
    last_seen = {plain_value(match[0]): match.start() for match in re.finditer(NUMBER, response)}
    value = final
    for match in STEP.finditer(response, 0, response.rfind("\\boxed")):
        if match["value"]:
            value = match["value"].rstrip(".,/")
            continue
        before = plain_value(value)
        if before != plain_value(final) and last_seen.get(before, 0) < match.start():
            return value, match["word"], match.start()
    return None


def mark(response, correct):
    """(parts, aha). parts: the response as [text, kinds] end to end, kinds some of 'word box aha'. aha:
    [value before, word, final value] of a right response with a candidate aha moment, else None."""
    kinds, aha, final = [""] * len(response), None, last_boxed(response)

    def add(kind, start, end):
        kinds[start:end] = [f"{before} {kind}".strip() for before in kinds[start:end]]

    for match in re.finditer(ANY_WORD, response, re.IGNORECASE):
        add("word", *match.span())
    if final is not None:
        boxes = list(re.finditer(r"\\boxed[\s{]*" + re.escape(final) + r"\s*\}?", response))
        if boxes:
            add("box", *boxes[-1].span())
        moment = aha_moment(response, final) if correct else None
        if moment:
            value, word, start = moment
            add("aha", start, start + len(word))
            aha = [value, word, final]
    ends = itertools.accumulate(len(list(group)) for _, group in itertools.groupby(kinds))
    starts = [0, *ends]
    return [[response[start:end], kinds[start]] for start, end in itertools.pairwise(starts)], aha

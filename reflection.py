"""Reflection in responses: the 15 words and five ratios of the paper (MAYE, arXiv 2504.02587).

    python reflection.py out/toy/samples.jsonl                    # the responses of a run
    python reflection.py out/toy/samples.jsonl --match=word
    python reflection.py other.jsonl --text_key=completion --correct_key=reward

Departures from the paper's code:
 1. Counts are summed over ranks first and divided once; there, the ranks' ratios are averaged.
 2. An empty denominator gives None (null in metrics.jsonl); there 0, which pulls the mean down.
 3. match="word" counts whole words only; the paper's "substring" also finds "wait" in "awaiting".
"""
import json
import os
import re

from configurator import UserError, configure, one_of

# ------------------------------------------------------------------------------------------------------------
data = ""  # jsonl of responses; a bare argument sets it too
text_key = "response"  # the key of a response's text
correct_key = "correct"  # the key that says whether it is right: true or false, or 1 or 0
match = "substring"  # "substring" (the paper's counts) or "word" (whole words only)
# ------------------------------------------------------------------------------------------------------------

WORDS = ("re-check", "re-evaluate", "re-examine", "re-think", "recheck", "reevaluate", "reexamine",
         "reevaluation", "rethink", "check again", "think again", "try again", "verify", "wait", "yet")
TOTALS = ("N", "N_ref", "N_correct", "N_ref_correct")  # responses: all, with a reflection word, correct, both
# a hyphen or an apostrophe joins letters into one word: "wait-list" and "wait's" hold no "wait"
WHOLE = {word: re.compile(r"(?<!\w)(?<!\w[-'’])" + word.replace(" ", r"\s+") + r"(?!\w)(?![-'’]\w)")
         for word in WORDS}


def count_words(text, match="substring"):
    """{word: occurrences in text} of all 15, upper and lower case alike. Every word is counted by itself:
    "recheck again" holds "recheck" and, as a substring, "check again"."""
    text = text.lower()
    if match == "substring":
        return {word: text.count(word) for word in WORDS}
    return {word: len(WHOLE[word].findall(text)) for word in WORDS}


def tally(responses, correct, match="substring"):
    """The counts of a batch, {name: int}: TOTALS count responses, WORDS count occurrences, so that a response
    with three "wait" adds 3. responses: str each; correct: bool each, as many."""
    counts = dict.fromkeys(TOTALS + WORDS, 0)
    for response, is_correct in zip(responses, correct, strict=True):
        words = count_words(response, match)
        reflects = any(words.values())
        counts["N"] += 1
        counts["N_ref"] += reflects
        counts["N_correct"] += is_correct
        counts["N_ref_correct"] += reflects and is_correct
        for word in WORDS:
            counts[word] += words[word]
    return counts


def add(*counts):
    """The counts of several batches, ranks or steps as one: add(tally(a), tally(b)) is tally(a + b)."""
    return {name: sum(c[name] for c in counts) for name in TOTALS + WORDS}


def ratios(counts):
    """The paper's five ratios, fractions of 1 under its names; None where the denominator is 0."""
    n, n_ref, n_correct, n_ref_correct = (counts[name] for name in TOTALS)
    fractions = {
        "reflection_ratio": (n_ref, n),
        "reflection_ratio_in_correct_answers": (n_ref_correct, n_correct),
        "reflection_ratio_in_incorrect_answers": (n_ref - n_ref_correct, n - n_correct),
        "correct_ratio_in_reflection_texts": (n_ref_correct, n_ref),
        "correct_ratio_in_no_reflection_texts": (n_correct - n_ref_correct, n - n_ref),
    }
    return {name: part / whole if whole else None for name, (part, whole) in fractions.items()}


def metrics(responses, correct):
    """What a run logs: reflection/<ratio>, a fraction or None, and reflection_words/<word>, occurrences."""
    counts = tally(responses, correct)
    logged = {f"reflection/{name}": value for name, value in ratios(counts).items()}
    return logged | {f"reflection_words/{word}": counts[word] for word in WORDS}


def read_response(line, text_key, correct_key):
    """(text, is correct) of one line of a jsonl file; ValueError says what was wanted and what came."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {row!r:.60}")
    text, correct = row.get(text_key), row.get(correct_key)
    if not isinstance(text, str):
        raise ValueError(f"{text_key} must be a text, got {text!r:.60}; --text_key names another key")
    if correct not in (0, 1):                            # true is 1
        raise ValueError(f"{correct_key} must be true or false, got {correct!r:.60}; or --correct_key")
    return text, bool(correct)


def tally_file(path, match="substring", text_key="response", correct_key="correct"):
    """The counts of a jsonl file, one line in memory at a time; UserError names a bad line."""
    counts = tally([], [])
    with open(path, "rb") as file:                       # bytes: a line that is not utf-8 is then a bad line
        for number, line in enumerate(file, 1):
            try:
                text, is_correct = read_response(line, text_key, correct_key)
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            counts = add(counts, tally([text], [is_correct], match))
    return counts


if __name__ == "__main__":
    config = configure(globals(), positional="data")
    one_of(config, "match", "substring", "word")
    if not os.path.isfile(data):
        raise UserError(f"command line: no file {data!r}; python reflection.py out/toy/samples.jsonl")
    counts = tally_file(data, match, text_key, correct_key)
    for name, count in counts.items():
        print(f"{name:<40} {count:>8}")
    for name, ratio in ratios(counts).items():
        print(f"{name:<40} {'null' if ratio is None else format(ratio, '.4f'):>8}")

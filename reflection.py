"""Reflection in responses: the paper's 15 words, their counts, and five ratios (arXiv 2504.02587, evaluation scheme).

    python reflection.py out/toy/samples.jsonl       # any jsonl with the keys response (text) and correct (true, false)
    python reflection.py out/toy/samples.jsonl --match=word

Departures from the paper's code:
1. Counts are summed over ranks (and steps) first and divided once; there, the ranks' ratios are averaged.
2. An empty denominator gives None (null in metrics.jsonl); there 0, which pulls the mean down where reflection is rare.
3. match='word' is added: 'substring', the paper's, also finds 'wait' in 'await' and 'awaiting'.
"""
import json
import re

# ---------------------------------------------------------------------------------------------------------------------
data = ''            # jsonl of responses; a bare argument sets it too
match = 'substring'  # 'substring' (the paper's counts) or 'word' (whole words only)
# ---------------------------------------------------------------------------------------------------------------------

WORDS = ('re-check', 're-evaluate', 're-examine', 're-think', 'recheck', 'reevaluate', 'reexamine', 'reevaluation',
         'rethink', 'check again', 'think again', 'try again', 'verify', 'wait', 'yet')
TOTALS = ('N', 'N_ref', 'N_correct', 'N_ref_correct')    # responses: all, with a reflection word, correct, both
MATCHES = ('substring', 'word')
# a hyphen or an apostrophe between letters joins them into one word: no 'wait' in 'wait-list', 'dumb-wait' or "wait's",
# but one in 'wait--', "'wait'" and 'wait - no'. The two words of 'try again' may stand on two lines.
WHOLE = {word: re.compile(r"(?<!\w)(?<!\w[-'’])" + word.replace(' ', r'\s+') + r"(?!\w)(?![-'’]\w)") for word in WORDS}


def count_words(text, match='substring'):
    """{word: occurrences in text}, all 15 in the order of WORDS, upper and lower case alike, as in the paper's code.
    Every word is counted by itself: 'recheck again' holds 'recheck' and, as a substring, 'check again'."""
    if match not in MATCHES:
        raise ValueError(f"match must be 'substring' or 'word', got {match!r}")
    text = text.lower()
    return {word: text.count(word) if match == 'substring' else len(WHOLE[word].findall(text)) for word in WORDS}


def tally(responses, correct, match='substring'):
    """Counts {name: int} of a batch: the four TOTALS count responses, the 15 words count occurrences (a response with
    three 'wait' adds 3), as the paper's code does. responses: str each; correct: bool each, as many. An empty batch is
    all zeros."""
    counts = dict.fromkeys(TOTALS + WORDS, 0)
    for response, right in zip(responses, correct, strict=True):
        words = count_words(response, match)
        reflects = any(words.values())
        for name, hit in zip(TOTALS, (True, reflects, right, reflects and right), strict=True):
            counts[name] += bool(hit)
        for word in WORDS:
            counts[word] += words[word]
    return counts


def add(*counts):
    """The counts of several batches, ranks or steps as one: sums, so that add(tally(a), tally(b)) is tally(a + b)."""
    return {name: sum(c[name] for c in counts) for name in TOTALS + WORDS}


def ratios(counts):
    """The paper's five ratios, fractions of 1 under its names; None where the denominator is 0."""
    n, n_ref, n_correct, n_both = (counts[name] for name in TOTALS)
    fractions = {
        'reflection_ratio': (n_ref, n),
        'reflection_ratio_in_correct_answers': (n_both, n_correct),
        'reflection_ratio_in_incorrect_answers': (n_ref - n_both, n - n_correct),
        'correct_ratio_in_reflection_texts': (n_both, n_ref),
        'correct_ratio_in_no_reflection_texts': (n_correct - n_both, n - n_ref),
    }
    return {name: part / whole if whole else None for name, (part, whole) in fractions.items()}


def metrics(counts):
    """counts as a run logs them: 'reflection/<ratio>' (fraction or None), 'reflection_words/<word>' (occurrences)."""
    logged = {f'reflection/{name}': value for name, value in ratios(counts).items()}
    return logged | {f'reflection_words/{word}': counts[word] for word in WORDS}


def tally_file(path, match='substring'):
    """The counts of a jsonl file, a line in memory at a time; blank lines are skipped. ValueError (file, line, what)
    for a line that is no object with a text response and a true or false correct; OSError if it cannot be opened."""
    counts = tally([], [])
    with open(path, 'rb') as file:                       # bytes: text that is not utf-8 is then one line's error
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{path}:{number}: not JSON ({error})') from None
            if type(row) is not dict:
                raise ValueError(f'{path}:{number}: must be an object like {{"response": ...}}, got {repr(row)[:60]}')
            for key, kind, wanted in (('response', str, 'a text'), ('correct', bool, 'true or false')):
                if type(row.get(key)) is not kind:
                    got = repr(row[key])[:60] if key in row else 'no such key'
                    raise ValueError(f'{path}:{number}: {key} must be {wanted}, got {got}')
            counts = add(counts, tally([row['response']], [row['correct']], match))
    return counts


if __name__ == "__main__":
    from configurator import UserError, configure  # here, so that importing reflection imports nothing of ours
    config = configure(globals(), positional='data')
    if not data:
        raise UserError('command line: which responses? python reflection.py out/toy/samples.jsonl')
    if match not in MATCHES:
        raise UserError(f"command line: match must be 'substring' or 'word', got {match!r}")
    try:
        counts = tally_file(data, match)
    except OSError as error:
        raise UserError(f'{data}: cannot be read ({error.strerror}), give a jsonl of responses') from None
    except ValueError as error:
        raise UserError(str(error)) from None
    for name in TOTALS + WORDS:
        print(f'{name:<40} {counts[name]:>8}')
    for name, value in ratios(counts).items():
        print(f'{name:<40} {"null" if value is None else format(value, ".4f"):>8}')

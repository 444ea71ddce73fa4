"""Reflection in responses: the paper's 15 words, their counts, and five ratios (arXiv 2504.02587, evaluation scheme).

    python reflection.py out/toy/samples.jsonl       # the responses of a run of ours
    python reflection.py out/toy/samples.jsonl --match=word
    python reflection.py completions.jsonl --text_key=completion --correct_key=reward     # of any other project
    python reflection.py completions.jsonl --text_key=completion --correct_key=           # nobody judged them

Departures from the paper's code:
1. Counts are summed over ranks (and steps) first and divided once; there, the ranks' ratios are averaged.
2. An empty denominator gives None (null in metrics.jsonl); there 0, which pulls the mean down where reflection is rare.
3. match='word' is added: 'substring', the paper's, also finds 'wait' in 'await' and 'awaiting'.
"""
import bisect
import json
import re

# ---------------------------------------------------------------------------------------------------------------------
data = ''            # jsonl of responses; a bare argument sets it too
text_key = 'response'   # the key of a response's text
correct_key = 'correct'  # the key that says whether it is right: true or false, or 1 or 0; '' when nothing does
match = 'substring'  # 'substring' (the paper's counts) or 'word' (whole words only)
# ---------------------------------------------------------------------------------------------------------------------

WORDS = ('re-check', 're-evaluate', 're-examine', 're-think', 'recheck', 'reevaluate', 'reexamine', 'reevaluation',
         'rethink', 'check again', 'think again', 'try again', 'verify', 'wait', 'yet')
TOTALS = ('N', 'N_ref', 'N_correct', 'N_ref_correct')    # responses: all, with a reflection word, correct, both
MATCHES = ('substring', 'word')
# a hyphen or an apostrophe between letters joins them into one word: no 'wait' in 'wait-list', 'dumb-wait' or "wait's",
# but one in 'wait--', "'wait'" and 'wait - no'. The two words of 'try again' may stand on two lines.
WHOLE = {word: re.compile(r"(?<!\w)(?<!\w[-'’])" + word.replace(' ', r'\s+') + r"(?!\w)(?![-'’]\w)") for word in WORDS}


ANY_WORD = re.compile('(?=(' + '|'.join(sorted(WORDS, key=len, reverse=True)) + '))')  # a look-ahead, for those that overlap
MAX_LINE_BYTES = 1 << 26  # longer lines of a file are refused: what is read must fit in memory, whoever wrote it

# what a response states on its way, for aha_moment; every repeat is bounded, so the time is linear in hostile text too
NUMBER = r'(-?\d{1,15}(?:,\d{3}){0,4}(?:\.\d{1,15})?(?:/\d{1,15})?)'
BOX = re.compile(r'\\boxed\s{0,5}\{([^{}]{1,60})\}')
ANSWER = re.compile(r'answer\s{0,5}(?:is|:|=)[\s$*]{0,5}' + NUMBER, re.IGNORECASE)
EQUATION = re.compile(r'([\w+\-*/^().\\×÷·∠°{} ]{1,60})=\s{0,5}' + NUMBER)


def count_words(text, match='substring'):
    """{word: occurrences in text}, all 15 in the order of WORDS, upper and lower case alike, as in the paper's code.
    Every word is counted by itself: 'recheck again' holds 'recheck' and, as a substring, 'check again'."""
    if match not in MATCHES:
        raise ValueError(f"match must be 'substring' or 'word', got {match!r}")
    text = text.lower()
    return {word: text.count(word) if match == 'substring' else len(WHOLE[word].findall(text)) for word in WORDS}


def find_words(text):
    """[(start, end)] of the reflection words in text, in order; those that overlap are one. None exactly where
    count_words(text) counts nothing."""
    lower = ''.join(c if len(c.lower()) > 1 else c.lower() for c in text)  # 'İ'.lower() is two characters: positions move
    spans = []
    for hit in ANY_WORD.finditer(lower):
        start, end = hit.span(1)
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def plain_value(text):
    """A number, or a text without blanks, $ and a last full stop: equal for two ways to write the same short value."""
    text = re.sub(r'[\s$]|[.,]$|,(?=\d{3})', '', text)
    try:
        return float(text)
    except ValueError:
        return text


def aha_moment(response, final):
    """A candidate "aha moment" of a response whose final answer is right: it states a value, reflects, and ends with
    another one. None, or (strength, value stated before, reflection word, where the word starts).

    strength 4: another answer stood in a box before the word; 3: "the answer is ..." with another value did; 2: an
    equation got another result after the word (`16+4=21. Wait, 16+4=20`); 1: the last equation before the word ended in
    another value, which never comes again. A guess for a person to look at, never a count: the paper chose its by eye."""
    boxed_at, final = response.rfind('\\boxed'), plain_value(final)
    boxes = [(m.end(), m[1]) for m in BOX.finditer(response)]
    answers = [(m.end(), m[1]) for m in ANSWER.finditer(response)]
    equations = [(m.end(), m[2], ''.join(m[1].split())) for m in EQUATION.finditer(response)]
    results = {}                                         # left side: [(where, value), ...]
    for where, value, left in equations:
        results.setdefault(left, []).append((where, value))
    last_seen = {plain_value(m[1]): m.start() for m in re.finditer(NUMBER, response)}

    def until(stated, position):
        """How many of the stated (where, ...) stand before the position."""
        return bisect.bisect_right(stated, position, key=lambda entry: entry[0])

    best = None
    for start, end in find_words(response):
        if boxed_at < end:
            break                                        # the final answer stood already
        found = None
        n_boxes, n_answers, n_equations = (until(stated, start) for stated in (boxes, answers, equations))
        for _, value, left in equations[max(0, n_equations - 5):n_equations]:
            later = results[left][(at := until(results[left], end)):at + 1]
            if later and plain_value(value) not in (final, plain_value(later[0][1])):
                found = 2, value
        if n_equations and not found:
            value = equations[n_equations - 1][1]
            if plain_value(value) != final and last_seen.get(plain_value(value), -1) < start:
                found = 1, value
        for strength, stated, n in ((3, answers, n_answers), (4, boxes, n_boxes)):
            if n and plain_value(stated[n - 1][1]) != final:
                found = strength, stated[n - 1][1]
        if found and (best is None or found[0] > best[0]):
            best = *found, response[start:end], start
    return best


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


def read_responses(path, text_key='response', correct_key='correct'):
    """Yields (text, right) of each line of a jsonl file, one in memory at a time; blank lines are skipped, right is False
    without a correct_key. ValueError (file, line, what) for a line that is no object with a text and true, false, 1 or 0;
    OSError if the file cannot be opened."""
    with open(path, 'rb') as file:                       # bytes: text that is not utf-8 is then one line's error
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b''), 1):
            if not line.strip():
                continue
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f'{path}:{number}: longer than {MAX_LINE_BYTES >> 20} MB')
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{path}:{number}: not JSON ({error})') from None
            if type(row) is not dict:
                raise ValueError(f'{path}:{number}: must be an object like {{"{text_key}": ...}}, got {repr(row)[:60]}')
            right = row.get(correct_key, None if correct_key else False)
            for key, fine, wanted, flag in ((text_key, type(row.get(text_key)) is str, 'a text', 'text_key'),
                                            (correct_key, type(right) in (bool, int, float) and right in (0, 1),
                                             'true or false, or 1 or 0', 'correct_key')):
                if not fine:
                    got = f'got {repr(row[key])[:60]}' if key in row else f'no such key; --{flag} names another'
                    raise ValueError(f'{path}:{number}: {key} must be {wanted}, {got}')
            yield row[text_key], bool(right)


def tally_file(path, match='substring', text_key='response', correct_key='correct'):
    """The counts of a jsonl file in constant memory; raises what read_responses raises."""
    counts = tally([], [])
    for text, right in read_responses(path, text_key, correct_key):
        counts = add(counts, tally([text], [right], match))
    return counts


if __name__ == "__main__":
    from configurator import UserError, configure  # here, so that importing reflection imports nothing of ours
    config = configure(globals(), positional='data')
    if not data:
        raise UserError('command line: which responses? python reflection.py out/toy/samples.jsonl')
    if match not in MATCHES:
        raise UserError(f"command line: match must be 'substring' or 'word', got {match!r}")
    try:
        counts = tally_file(data, match, text_key, correct_key)
    except OSError as error:
        raise UserError(f'{data}: cannot be read ({error.strerror}), give a jsonl of responses') from None
    except ValueError as error:
        raise UserError(str(error)) from None
    unjudged = () if correct_key else TOTALS[2:]
    for name in TOTALS + WORDS:
        print(f'{name:<40} {"null" if name in unjudged else counts[name]:>8}')
    for name, value in ratios(counts).items():
        known = value is not None and (correct_key or name == 'reflection_ratio')
        print(f'{name:<40} {format(value, ".4f") if known else "null":>8}')

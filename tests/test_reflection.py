"""reflection.py on numbers worked by hand."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reflection
from reflection import WORDS, add, aha_moment, count_words, find_words, metrics, ratios, tally, tally_file

ROOT = Path(reflection.__file__).parent
#            reflects?  correct?
BATCH = [('Wait, wait. Let me re-check.', True),         # 2 wait, 1 re-check
         ('It is 5, yet I verify it.', False),           # yet, verify
         ('Hence the answer is 7.', True),
         ('No idea.', False),
         ('Try again: 9', False)]


def counted(text, match):
    return {word: n for word, n in count_words(text, match).items() if n}


def test_the_words_are_the_papers_fifteen():
    assert len(WORDS) == len(set(WORDS)) == 15 and all(word == word.lower() for word in WORDS)


def test_worked_batch():
    counts = tally(*zip(*BATCH, strict=True))
    assert {k: v for k, v in counts.items() if v} == {
        'N': 5, 'N_ref': 3, 'N_correct': 2, 'N_ref_correct': 1,
        'wait': 2, 're-check': 1, 'yet': 1, 'verify': 1, 'try again': 1}
    assert ratios(counts) == {
        'reflection_ratio': 3 / 5,
        'reflection_ratio_in_correct_answers': 1 / 2, 'reflection_ratio_in_incorrect_answers': 2 / 3,
        'correct_ratio_in_reflection_texts': 1 / 3, 'correct_ratio_in_no_reflection_texts': 1 / 2}
    logged = metrics(counts)
    assert logged['reflection/reflection_ratio'] == 0.6 and logged['reflection_words/wait'] == 2 and len(logged) == 20


@pytest.mark.parametrize('responses, correct, empty', [
    ([], [], {'reflection_ratio', 'reflection_ratio_in_correct_answers', 'reflection_ratio_in_incorrect_answers',
              'correct_ratio_in_reflection_texts', 'correct_ratio_in_no_reflection_texts'}),
    (['wait'], [True], {'reflection_ratio_in_incorrect_answers', 'correct_ratio_in_no_reflection_texts'}),
    (['wait'], [False], {'reflection_ratio_in_correct_answers', 'correct_ratio_in_no_reflection_texts'}),
    (['six'], [True], {'reflection_ratio_in_incorrect_answers', 'correct_ratio_in_reflection_texts'}),
    (['wait', 'six'], [True, False], set())])
def test_an_empty_denominator_is_none(responses, correct, empty):
    assert {name for name, value in ratios(tally(responses, correct)).items() if value is None} == empty


@pytest.mark.parametrize('text, substring, word', [
    ('WAIT', {'wait': 1}, {'wait': 1}),
    ('waiting, await', {'wait': 2}, {}),
    ('wait-list', {'wait': 1}, {}),
    ("wait's wait’s o'wait o’wait", {'wait': 4}, {}),
    ("'wait' wait-- wait... wait", {'wait': 4}, {'wait': 4}),
    ('Let me re-check, then recheck.', {'re-check': 1, 'recheck': 1}, {'re-check': 1, 'recheck': 1}),
    ('recheck again', {'recheck': 1, 'check again': 1}, {'recheck': 1}),
    ('double-verify', {'verify': 1}, {}),
    ('try\nagain', {}, {'try again': 1}),
    ('reevaluation', {'reevaluation': 1}, {'reevaluation': 1}),
    ('re-evaluated', {'re-evaluate': 1}, {}),
    ('verify_it 2verify', {'verify': 2}, {}),
    ('', {}, {})])
def test_substring_and_word(text, substring, word):
    assert counted(text, 'substring') == substring
    assert counted(text, 'word') == word


def test_an_unknown_match_and_uneven_batches_are_errors():
    with pytest.raises(ValueError, match="got 'words'"):
        count_words('wait', 'words')
    with pytest.raises(ValueError, match='zip'):
        tally(['a', 'b'], [True])


def test_pooled_counts_are_merged_counts():
    texts, right = map(list, zip(*BATCH, strict=True))
    whole, one, two = tally(texts, right), tally(texts[:1], right[:1]), tally(texts[1:], right[1:])
    assert add(one, two) == add(two, one, tally([], [])) == whole
    a, b = ratios(one)['reflection_ratio'], ratios(two)['reflection_ratio']
    assert ratios(whole)['reflection_ratio'] != (a + b) / 2      # the mean of the ranks' ratios is another number


def write(path, rows):
    path.write_text('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows) + '\n')
    return path


def run(*arguments):
    command = [sys.executable, ROOT / 'reflection.py', *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_command_prints_counts_and_ratios(tmp_path):
    path = write(tmp_path / 'samples.jsonl', [{'response': t, 'correct': c, 'step': 0} for t, c in BATCH] + ['', ''])
    assert tally_file(path) == tally(*zip(*BATCH, strict=True))
    status, out, err = run(path)
    printed = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if '=' not in line and 'knobs' not in line)
    assert status == 0 and err == ''
    assert printed['N'] == '5' and printed['wait'] == '2' and printed['try again'] == '1'
    assert printed['reflection_ratio'] == '0.6000' and printed['correct_ratio_in_reflection_texts'] == '0.3333'
    write(path, [{'response': 'awaiting', 'correct': True}])
    status, out, _ = run('--match=word', path)
    assert status == 0 and '  0.0000' in out and '    null' in out


@pytest.mark.parametrize('line, message', [
    ('{"response": ', ':2: not JSON'),
    ('[1]', ':2: must be an object like {"response": ...}, got [1]'),
    ('{"correct": true}', ':2: response must be a text, no such key; --text_key names another'),
    ('{"response": "a", "correct": "no"}', ":2: correct must be true or false, or 1 or 0, got 'no'"),
    ('{"response": null, "correct": true}', ':2: response must be a text, got None')])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / 'samples.jsonl', [{'response': 'a', 'correct': True}, line])
    with pytest.raises(ValueError) as error:
        tally_file(path)
    assert str(error.value).startswith(f'{path}{message}')


def test_command_errors_are_one_line_and_status_2(tmp_path):
    path = write(tmp_path / 'samples.jsonl', ['{'])
    for arguments, message in [
            ((), 'which responses?'), ((path,), 'samples.jsonl:1: not JSON'),
            ((tmp_path / 'no.jsonl',), 'cannot be read'),
            ((path, '--match=all'), "match must be 'substring' or 'word', got 'all'"), ((path, path), 'set twice')]:
        status, _, err = run(*arguments)
        assert status == 2 and message in err and err.count('\n') == 1, (arguments, err)


def test_other_peoples_keys(tmp_path):
    rows = [{'completion': t, 'reward': float(c), 'response': 7} for t, c in BATCH]
    path = write(tmp_path / 'other.jsonl', rows)
    assert tally_file(path, text_key='completion', correct_key='reward') == tally(*zip(*BATCH, strict=True))
    status, out, _ = run(path, '--text_key=completion', '--correct_key=')
    printed = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if '=' not in line and 'knobs' not in line)
    assert status == 0 and printed['N_ref'] == '3' and printed['reflection_ratio'] == '0.6000'
    assert printed['N_correct'] == printed['correct_ratio_in_reflection_texts'] == 'null'  # nobody said what is right
    write(path, [{'completion': 'a', 'reward': 0.5}])
    status, _, err = run(path, '--text_key=completion', '--correct_key=reward')
    assert status == 2 and 'other.jsonl:1: reward must be true or false, or 1 or 0, got 0.5' in err


def test_real_responses_equal_the_count_by_hand():
    folder = os.environ.get('NANOMAYE_REAL_DATA')
    if not folder:
        pytest.skip('NANOMAYE_REAL_DATA is not set')
    path = f'{folder}/judge/responses_a.jsonl'
    # by hand: grep -ciE of the 15 words shows four lines: "Let's recheck the sums", "have not yet received" with "counted
    # yet", the name "Yett", and "Let's reevaluate our steps"; none of them says "correct": true, as 170 others do
    status, out, err = run(path, '--text_key=response', '--correct_key=correct')
    printed = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if '=' not in line and 'knobs' not in line)
    assert status == 0 and err == ''
    assert [printed[name] for name in ('N', 'N_ref', 'N_correct', 'N_ref_correct')] == ['1508', '4', '170', '0']
    assert [printed[word] for word in ('recheck', 'yet', 'reevaluate', 'wait')] == ['1', '3', '1', '0']
    assert printed['reflection_ratio'] == f'{4 / 1508:.4f}' and printed['correct_ratio_in_reflection_texts'] == '0.0000'
    assert printed['reflection_ratio_in_incorrect_answers'] == f'{4 / 1338:.4f}'


def test_a_large_file_takes_no_more_memory_than_a_small_one(tmp_path):
    peaks = []
    for megabytes in (1, 100):
        with open(tmp_path / 'big.jsonl', 'w') as file:
            line = json.dumps({'response': 'six and seven. ' * 600 + 'wait', 'correct': True}) + '\n'
            for _ in range(megabytes * 1_000_000 // len(line) + 1):
                file.write(line)
        code = ("import reflection, re; reflection.tally_file('big.jsonl');"
                "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {'PYTHONPATH': str(ROOT)}, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 2_000, peaks            # kB


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reflection, 'MAX_LINE_BYTES', 1000)
    path = write(tmp_path / 'long.jsonl', [{'response': 'a', 'correct': True}, {'response': 'a' * 1000, 'correct': True}])
    with pytest.raises(ValueError, match='long.jsonl:2: longer than'):
        tally_file(path)


def test_words_are_found_where_they_stand():
    text = 'İ😀 Wait: recheck again. YET'                # İ lowers to two characters, recheck again holds two words
    assert [text[a:b] for a, b in find_words(text)] == ['Wait', 'recheck again', 'YET'] and find_words('six') == []


@given(st.lists(st.sampled_from([*WORDS, 'Wait', 'İ', 'K', '😀', ' ', 'check', 'again', 're', 'x', 'ß'])).map(''.join))
def test_words_are_found_exactly_where_they_are_counted(text):
    spans = find_words(text)
    assert bool(spans) == any(count_words(text).values())
    assert all(any(count_words(text[a:b]).values()) for a, b in spans)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    outside = ''.join(c if not any(a <= i < b for a, b in spans) else '\n' for i, c in enumerate(text))
    assert not any(count_words(outside).values())


@pytest.mark.parametrize('response, final, found', [
    (r'It is \boxed{12}. Wait, the side is 5. So \boxed{20}.', '20', (4, '12', 'Wait')),
    (r'The answer is 12. Let me re-check: 4*5=20. \boxed{20}', '20', (3, '12', 're-check')),
    (r'16+4=21. Let me verify: 16+4=20. The answer is \boxed{20}.', '20', (2, '21', 'verify')),
    (r'23-9=15. 15-5=10. Let me verify: 23-9=14. 14-5=9. \boxed{9}.', '9', (2, '15', 'verify')),
    (r'16+4=20. Let me verify: 16+4=21. \boxed{20}.', '20', None),              # what it said first was right
    (r'16+4=20. Let me verify: 16+4=21. Wait, \boxed{20}.', '20', (1, '21', 'Wait')),
    (r'x = 7. Wait. The sides sum to 9. \boxed{9}', '9', (1, '7', 'Wait')),
    (r'8+8=16. Let me verify: 8+8=16. 16+4=20. \boxed{20}', '20', None),        # 16 is used: a step, not an error
    (r'16+4=20. Let me verify: 16+4=20. \boxed{20}.', '20', None),              # a check that finds nothing
    (r'The answer is 20. Let me verify: 16+4=20. \boxed{20.0}', '20.0', None),  # the same value, written otherwise
    (r'x = 1,000. Wait. \boxed{1000}', '1000', None),
    (r'x = 7. So it is 9. \boxed{9}', '9', None),                               # no reflection
    (r'x = 7. \boxed{9} Wait.', '9', None),                                     # reflects after the end
    ('x = 7. Wait, 9.', '', None)])
def test_aha_moments(response, final, found):
    moment = aha_moment(response, final)
    assert (moment and moment[:3]) == found
    assert moment is None or response[moment[3]:].startswith(moment[2])


def test_aha_moments_take_linear_time_in_hostile_text():
    import time
    seconds = []
    for n in (20_000, 80_000):
        start = time.process_time()
        for text in ('1=2 wait ', 'wait', 'a=', '\\boxed{', 'answer is ', '1,', '= '):
            aha_moment(text * n + r'\boxed{3}', '3')
        seconds.append(time.process_time() - start)
    assert seconds[1] < 12 * seconds[0], seconds         # four times the text; quadratic time would be 16 times

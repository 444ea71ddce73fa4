"""reflection.py on numbers worked by hand."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import reflection
from reflection import WORDS, add, count_words, metrics, ratios, tally, tally_file

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
    ('{"correct": true}', ':2: response must be a text, got no such key'),
    ('{"response": "a", "correct": "no"}', ":2: correct must be true or false, got 'no'"),
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

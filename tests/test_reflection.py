"""reflection.py on numbers worked by hand."""
import json
import re

import pytest

from configurator import UserError
from reflection import TOTALS, WORDS, count_words, metrics, ratios, tally, tally_file
from test_reward import run

#            reflects?  correct?
BATCH = [("Wait, wait. Let me re-check.", True),         # 2 wait, 1 re-check
         ("It is 5, yet I verify it.", False),           # yet, verify
         ("Hence the answer is 7.", True),
         ("No idea.", False),
         ("Try again: 9", False)]
RESPONSES, CORRECT = zip(*BATCH)
COUNTS = dict.fromkeys(TOTALS + WORDS, 0) | {"N": 5, "N_ref": 3, "N_correct": 2, "N_ref_correct": 1}
COUNTS |= {"wait": 2, "re-check": 1, "yet": 1, "verify": 1, "try again": 1}


def test_the_words_are_the_papers_fifteen():
    assert set(WORDS) == {
        "re-check", "re-evaluate", "re-examine", "re-think", "recheck", "reevaluate", "reexamine", "rethink",
        "reevaluation", "check again", "think again", "try again", "verify", "wait", "yet"}
    assert len(WORDS) == 15


def test_a_batch_as_worked_by_hand_and_an_uneven_one_is_an_error():
    counts = tally(RESPONSES, CORRECT)
    assert counts == COUNTS
    assert ratios(counts) == {
        "reflection_ratio": 3 / 5,
        "reflection_ratio_in_correct_answers": 1 / 2, "reflection_ratio_in_incorrect_answers": 2 / 3,
        "correct_ratio_in_reflection_texts": 1 / 3, "correct_ratio_in_no_reflection_texts": 1 / 2}
    logged = metrics(RESPONSES, CORRECT)
    assert logged["reflection/reflection_ratio"] == 3 / 5 and logged["reflection_words/wait"] == 2
    assert len(logged) == 5 + 15
    with pytest.raises(ValueError):
        tally(["a", "b"], [True])


@pytest.mark.parametrize("responses, correct, empty", [
    ([], [], set(ratios(COUNTS))),
    (["wait"], [True], {"reflection_ratio_in_incorrect_answers", "correct_ratio_in_no_reflection_texts"}),
    (["wait"], [False], {"reflection_ratio_in_correct_answers", "correct_ratio_in_no_reflection_texts"}),
    (["six"], [True], {"reflection_ratio_in_incorrect_answers", "correct_ratio_in_reflection_texts"})])
def test_an_empty_denominator_is_none(responses, correct, empty):
    assert {name for name, value in ratios(tally(responses, correct)).items() if value is None} == empty


@pytest.mark.parametrize("text, substring, word", [
    ("WAIT", {"wait": 1}, {"wait": 1}),
    ("waiting, await", {"wait": 2}, {}),
    ("wait-list", {"wait": 1}, {}),
    ("wait's wait’s o'wait o’wait", {"wait": 4}, {}),
    ("'wait' wait-- wait... wait", {"wait": 4}, {"wait": 4}),
    ("Let me re-check, then recheck.", {"re-check": 1, "recheck": 1}, {"re-check": 1, "recheck": 1}),
    ("recheck again", {"recheck": 1, "check again": 1}, {"recheck": 1}),
    ("double-verify", {"verify": 1}, {}),
    ("try\nagain", {}, {"try again": 1}),
    ("verify_it 2verify", {"verify": 2}, {})])
def test_substrings_and_whole_words(text, substring, word):
    for match, expected in (("substring", substring), ("word", word)):
        assert {name: n for name, n in count_words(text, match).items() if n} == expected


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("line, message", [
    (b'{"response": ', "Expecting value: line 1"),
    (b'{"response": "\xff", "correct": true}', "'utf-8'"),
    (b"[1]", "must be an object, got [1]"),
    (b'{"response": 7, "correct": true}', "response must be a text, got 7; --text_key names another key"),
    (b'{"response": "a", "correct": 0.5}', "correct must be true or false, got 0.5; or --correct_key")])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"response": "a", "correct": true}\n' + line)
    with pytest.raises(UserError) as error:
        tally_file(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_the_command_prints_counts_and_ratios_of_other_peoples_rows_too(tmp_path):
    rows = [{"completion": text, "reward": float(right), "response": 7} for text, right in BATCH]
    path = write(tmp_path / "samples.jsonl", *rows)
    done = run("reflection.py", path, "--text_key=completion", "--correct_key=reward")
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("N +5", "wait +2", "try again +1", "correct_ratio_in_reflection_texts +0.3333"):
        assert re.search(f"^{line}$", done.stdout, re.M), line
    write(path, {"response": "awaiting", "correct": True})
    printed = run("reflection.py", "--match=word", path).stdout
    assert re.search("^reflection_ratio +0.0000$", printed, re.M)
    assert re.search("^correct_ratio_in_reflection_texts +null$", printed, re.M)
    done = run("reflection.py", "no.jsonl")
    assert done.returncode == 2 and done.stderr.startswith("command line: no file 'no.jsonl'; python reflec")

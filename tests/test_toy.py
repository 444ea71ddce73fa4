"""The toy's splits, solutions and pictures, and its committed base model."""
import ast
import hashlib
import json
import random
import re

import pytest
from PIL import Image, ImageChops
from transformers import Qwen2_5_VLForConditionalGeneration

import configurator
import reward
from conftest import ROOT
from toy import draw, make_base


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(the folder, {name: rows}) of data/toy."""
    folder = tmp_path_factory.mktemp("drawn") / "toy"
    draw.make_toy(str(folder))
    return folder, {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def stages():
    """({stage: its rows}, the numbers of every picture, the families) of the base's stages."""
    seen, families, figure = [], set(), draw.figure
    with pytest.MonkeyPatch.context() as patch:
        for module in (draw, make_base):  # nothing is drawn: it would take most of the time
            patch.setattr(module, "picture", lambda *parts: seen.append([int(text) for text, _ in parts[2]]))
        patch.setattr(draw, "figure", lambda family, *rest: families.add(family) or figure(family, *rest))
        return {stage: make_base.stage_rows(stage) for stage in make_base.STAGES}, seen, families


def numbers_of(row):
    """The printed numbers of a drawn row, from `I read 9, 2, 5.`"""
    return [int(n) for n in re.match(r"I read ([\d, ]+)\.", row["solution"])[1].split(",")]


def mistakes(text):
    facts = re.findall(r"(\d+[-+*]\d+)=(\d+)", text)
    return [(x, y) for x, y in facts if configurator.literal(ast.parse(x, mode="eval").body) != int(y)]


def test_tuples_are_disjoint_over_all_stages_and_families_of_test_are_in_none(drawn, stages):
    tuples = {split: {tuple(sorted(numbers_of(row))) for row in drawn[1][split]} for split in draw.SIZES}
    assert min(map(len, tuples.values())) > 60 and len(stages[1]) > 16000
    trained = tuples["train"] | {tuple(sorted(numbers)) for numbers in stages[1] if len(numbers) > 2}
    assert not tuples["val"] & trained
    assert not (tuples["test"] | tuples["hard"]) & (trained | tuples["val"])
    assert stages[2] == set(draw.TRAIN_FAMILIES) and not stages[2] & set(draw.TEST_FAMILIES)


def test_drawn_answers_are_right_by_recomputation_and_judged_so(drawn):
    for row in sum(drawn[1].values(), []):
        numbers, answer, solution = numbers_of(row), int(row["answer"]), row["solution"]
        assert not mistakes(solution) and solution.endswith(f"The answer is \\boxed{{{answer}}}."), row
        if "area" in row["question"]:
            assert answer == numbers[0] * (numbers[1] + numbers[2])
        elif "whole" in row["question"]:
            assert answer == numbers[0] - numbers[1] - numbers[2] > 1
        else:
            assert answer == sum(numbers)
        if "hard" in row["id"]:  # two digits first; every sum is one that the base was shown
            assert 10 <= numbers[0] <= 16 and answer - numbers[-1] <= max(x for x, *_ in make_base.FACTS)
    assert reward.judge(solution, str(answer)) and not reward.judge(solution, str(answer + 1))


def test_the_stages_teach_no_wrong_answer_and_mend_every_slip(stages):
    rows = sum(stages[0].values(), [])
    for _, answer, solution, _ in rows:
        first, _, check = solution.partition("Let me verify:")
        assert len(mistakes(first)) == ("Wait" in check) and not mistakes(check), solution
        assert "boxed" not in solution or solution.endswith(f"\\boxed{{{answer}}}."), solution
    assert sum("Wait" in row[2] for row in rows) > 500
    assert 0.6 < sum(row[2].startswith("The answer") for row in stages[0]["base_3_habit"]) / 4096 < 0.8


def test_text_variant_says_the_numbers_and_shares_the_picture(drawn):
    for row, text in zip(drawn[1]["val"], drawn[1]["text_val"], strict=True):
        question = f"{row['question']} The labels are {str(numbers_of(row))[1:-1]}."
        assert text == row | {"question": question, "id": text["id"]} and text["id"] != row["id"]


def test_pictures_have_84_pixels_and_labels_stay_in_their_cell_of_28(drawn):
    for row in drawn[1]["train"][:60] + drawn[1]["test"][:40]:
        image = Image.open(drawn[0] / row["image"])
        assert image.size == (84, 84) and image.mode == "RGB"
    for family in draw.TRAIN_FAMILIES + draw.TEST_FAMILIES:
        cells = draw.layout(family, 3, random.Random(family))[2]
        assert cells == sorted(set(cells), key=lambda cell: (cell[1], cell[0])), family  # in reading order
        for x, y in cells:
            image = draw.picture([], [], [("27", (x, y))])
            left, top, right, bottom = ImageChops.invert(image).getbbox()
            assert left // 28 == (right - 1) // 28 and top // 28 == (bottom - 1) // 28, (family, x, y)


def test_the_drawn_problems_are_those_behind_the_committed_results(drawn):
    rows = b"".join((drawn[0] / f"{split}.jsonl").read_bytes() for split in draw.SIZES)
    assert hashlib.sha256(rows).hexdigest().startswith("e22b356db6dcfd24")


def test_committed_base_loads_and_its_tokenizer_is_the_one_that_make_base_builds(tmp_path):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(make_base.BASE)
    assert 1.0e6 < model.num_parameters() < 1.2e6 and str(model.dtype) == "torch.bfloat16"
    tokenizer = make_base.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / "toy/base" / path.name).read_bytes(), path
    assert [tokenizer.decode(i) for i in tokenizer.encode("I read 12.")] == ["I", " read", " ", "1", "2", "."]
    longest = make_base.checked_solution("path", [9, 8, 7, 9], slip=(2, 1))
    assert len(tokenizer.encode(longest)) < 96  # max_new_tokens of config/toy.py, EOS included

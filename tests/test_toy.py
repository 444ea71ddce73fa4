"""The toy's splits, solutions, pictures and random model."""
import hashlib
import json
import os
import random
import re
from multiprocessing import get_context

import pytest
from PIL import Image, ImageChops

import reward
import toy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """data/toy, and the base's stages, drawn once for this file."""
    root = tmp_path_factory.mktemp("toy")
    toy.make_toy(str(root / "toy"))
    toy.make_base_data(str(root / "base"))
    return root / "toy", root / "base"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers_of(row):
    """The printed numbers of a row, from its solution: 'I read 9, 2, 5.'; [] for a drill."""
    read = re.match(r"I read ([\d, ]+)\.", row["solution"])
    return [int(n) for n in read[1].split(",")] if read else []


def recompute(text):
    """[(x, operator, y, result, true result)] of every equation in a text."""
    found = [(int(x), op, int(y), int(result)) for x, op, y, result in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", text)]
    return [(x, op, y, result, {"+": x + y, "-": x - y, "*": x * y}[op]) for x, op, y, result in found]


def test_number_tuples_of_val_and_test_are_in_no_stage_of_training(folders):
    data, base = folders
    seen = {name: {tuple(sorted(numbers_of(row))) for row in rows_of(data / f"{name}.jsonl")} for name in toy.SIZES}
    trained = set(seen["train"])
    for stage in toy.BASE_STAGES:
        trained |= {tuple(sorted(numbers_of(row))) for row in rows_of(base / f"{stage}.jsonl") if len(numbers_of(row)) > 2}
    assert min(len(tuples) for tuples in seen.values()) > 60, {name: len(tuples) for name, tuples in seen.items()}
    assert not seen["val"] & trained and not seen["test"] & trained and not seen["val"] & seen["test"]


def test_short_answers_of_the_base_are_about_train_tuples_too():
    """A short answer does not say its numbers, so the generator is watched: every tuple it draws belongs to train."""
    drawn, real = [], toy.problem

    def watch(family, split, rng):
        p = real(family, split, rng)
        drawn.append((family, split, toy.split_of(p[0])))
        return p
    toy.problem = watch
    try:
        rng = random.Random(0)
        rows = [toy.solve_row(rng, habit={family: 0.7 for family in toy.TRAIN_FAMILIES}) for _ in range(300)]
    finally:
        toy.problem = real
    assert {(split, of) for _, split, of in drawn} == {("train", "train")}
    assert {family for family, _, _ in drawn} == set(toy.TRAIN_FAMILIES)
    assert 0.6 < sum(not row[2].startswith("I read") for row in rows) / len(rows) < 0.8


def test_split_is_by_sorted_numbers_whatever_the_family_and_facts_always_train():
    assert toy.split_of([9, 2, 5]) == toy.split_of([2, 5, 9]) and toy.split_of([9, 2]) == "train"
    shares = [toy.split_of([a, b, c]) for a in range(2, 10) for b in range(a, 10) for c in range(b, 10)]
    assert len(shares) == 120 and 0.5 < shares.count("train") / 120 < 0.7 and shares.count("val") > 15 < shares.count("test")


def test_families_of_test_are_in_no_stage(folders):
    data, base = folders
    def wording(row):      # letters and numbers aside
        return re.sub(r"\b[A-Z]{2,5}\b|\d+", "#", row["question"].split(" The labels are")[0])
    trained = {wording(row) for row in rows_of(data / "train.jsonl")}
    for stage in toy.BASE_STAGES:
        trained |= {wording(row) for row in rows_of(base / f"{stage}.jsonl")}
    fresh = {wording(row) for row in rows_of(data / "test.jsonl")} - trained
    assert len(fresh) == 1 and not set(toy.TEST_FAMILIES) & set(toy.TRAIN_FAMILIES)  # the question of spokes

    def cells(family):
        return {tuple(toy.layout(family, 3, random.Random(i))[2]) for i in range(200)}
    # the other three ask a known question about a layout that it never had
    assert not cells("vertical") & cells("segment") and not (cells("closed") | cells("quadrilateral")) & cells("path")


def test_golden_solutions_are_right_by_recomputation_and_judged_so(folders):
    data, _ = folders
    pairs = []
    for name in ("train", "val", "test", "text_train", "text_val", "text_test"):
        for row in rows_of(data / f"{name}.jsonl"):
            numbers, equations = numbers_of(row), recompute(row["solution"])
            assert all(result == true for *_, result, true in equations), row
            assert row["solution"].endswith(f"The answer is \\boxed{{{row['answer']}}}.")
            assert equations[-1][3] == int(row["answer"])
            if "area" in row["question"]:
                assert int(row["answer"]) == numbers[0] * (numbers[1] + numbers[2])
            elif "whole" in row["question"]:
                assert int(row["answer"]) == numbers[0] - numbers[1] - numbers[2] > 1
            else:
                assert int(row["answer"]) == sum(numbers)
            pairs.append((row["solution"], row["answer"]))
    assert all(v.correct for v in reward.judge_batch(pairs[::40]))
    assert not reward.judge(pairs[0][0], str(int(pairs[0][1]) + 1))


def test_the_bases_data_teach_no_wrong_answer_and_mend_every_slip(folders):
    _, base = folders
    slips = 0
    for stage in toy.BASE_STAGES:
        for row in rows_of(base / f"{stage}.jsonl"):
            first, _, check = row["solution"].partition("Let me verify:")
            wrong = [e for e in recompute(first) if e[3] != e[4]]
            slips += bool(wrong)
            assert len(wrong) == ("Wait" in row["solution"]) and all(e[3] == e[4] for e in recompute(check)), row
            if check:  # it works the problem again, to the right answer
                assert len(recompute(check)) == len(recompute(first)) and recompute(check)[-1][3] == int(row["answer"])
    assert slips > 500


def test_text_variant_says_the_numbers_and_shares_the_picture(folders):
    data, _ = folders
    for row, text in zip(rows_of(data / "val.jsonl"), rows_of(data / "text_val.jsonl")):
        assert text["question"] == row["question"] + f" The labels are {', '.join(map(str, numbers_of(row)))}."
        assert text["id"] != row["id"]
        assert (text["image"], text["answer"], text["solution"]) == (row["image"], row["answer"], row["solution"])


def test_rows_have_the_papers_keys_and_unique_ids_and_84_pixel_pictures(folders):
    data, base = folders
    for folder, name in ((data, "train"), (data, "test"), (base, "base_1_read"), (base, "base_3_habit")):
        rows = rows_of(folder / f"{name}.jsonl")
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows[:50]:
            assert list(row) == ["question", "answer", "solution", "id", "image"] and row["question"].startswith("<image>")
            with Image.open(folder / row["image"]) as image:
                assert image.size == (84, 84) and image.mode == "RGB"


@pytest.mark.parametrize("family", toy.TRAIN_FAMILIES + toy.TEST_FAMILIES)
def test_labels_stand_in_their_cells_inside_the_picture_in_reading_order(family):
    rng = random.Random(family)
    for _ in range(30):
        numbers = toy.draw_numbers(family, rng)
        _, corners, cells, _ = toy.layout(family, len(numbers), rng)
        assert len(set(cells)) == len(cells) == len(numbers)
        assert cells == sorted(cells, key=lambda p: (p[1], p[0]))
        assert all(v in (14, 42, 70) for cell in cells for v in cell)
        assert all(3 <= v <= 80 for corner in corners for v in corner)
        for x, y in cells:  # a wide label, alone: its ink stays in the cell of 28 pixels
            left, top, right, bottom = ImageChops.invert(toy.picture([], [], [("27", (x, y))]).convert("L")).getbbox()
            assert x - 14 <= left < right <= x + 14 and y - 14 <= top < bottom <= y + 14


def digest(folder):
    """{path below folder: SHA-256 of the file}."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def test_drawing_is_deterministic_and_safe_in_several_processes(folders, tmp_path):
    root = tmp_path / "toy"
    context = get_context("spawn")
    workers = [context.Process(target=toy.make_toy, args=(str(root),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert digest(root) == digest(folders[0])
    assert os.listdir(tmp_path) == ["toy"]  # no temporary folder is left


def test_random_model_is_small_and_reproducible_and_has_the_hubs_names(tmp_path):
    from safetensors import safe_open
    from transformers import AutoTokenizer
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        toy.build_base_model(str(tmp_path / name), seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a")["model.safetensors"] != digest(tmp_path / "c")["model.safetensors"]
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as f:
        names = list(f.keys())
        assert 1.0e6 < sum(f.get_tensor(name).numel() for name in names) < 1.2e6
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "visual.merger.ln_q.weight"} <= set(names)
    assert json.load(open(tmp_path / "a" / "generation_config.json"))["eos_token_id"] == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.convert_ids_to_tokens([2, 0]) == ["<|im_end|>", "<|endoftext|>"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("I read 12.")] == ["I", " read", " ", "1", "2", "."]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi."}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi.<|im_end|>\n<|im_start|>assistant\n"


def test_longest_solution_fits_the_response_budget():
    tokenizer = toy.toy_tokenizer()
    longest = max(len(tokenizer.encode(toy.solution("path", [9, 8, 7, 9], slip=(i, 1)))) for i in range(3))
    assert longest + 1 <= 96, longest  # max_new_tokens of config/toy.py, EOS included

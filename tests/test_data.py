"""data.py: what a row may be, what is made of it, and what a user is told."""
import importlib.util
import io
import json
import pathlib
import random
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

import data
import fetch
from configurator import UserError

LIMITS = dict(min_pixels=56 * 56, max_pixels=256 * 28 * 28, max_prompt_tokens=2000)
GOOD = dict(question="<image>What is 1+1?", answer="2", solution="It is \\boxed{2}.", image="a.png")


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return data.load_processor(tiny_model_dir)


def write(folder, rows, name="rows.jsonl"):
    """The path of a jsonl: bytes as they are, a dict filled up to a good row, without what is None."""
    Image.new("RGB", (84, 84), "white").save(folder / "a.png")
    lines = []
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            row = GOOD | dict(id=f"row-{i}") | row
            row = json.dumps({key: value for key, value in row.items() if value is not None}).encode()
        lines.append(row)
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / name)


def load(path, processor, **knobs):
    return data.Dataset(path, *processor, **(LIMITS | knobs))


def complaint(path, processor, **knobs):
    with pytest.raises(UserError) as error:
        load(path, processor, **knobs)
    return str(error.value)


def test_good_rows_load_whatever_their_pictures_bom_crlf_blank_lines_and_numbers(tmp_path, processor):
    path = write(tmp_path, [
        {}, b"", dict(answer=12, id=7), dict(answer=2.5, solution=None, extra=[1, float("nan")]),
        dict(image=None, question="?"), b'{"id": 5, "question":"?", "answer":2, "image": null, "images": []}',
        dict(images=["a.png", "./a.png"], question="<image>, <image>"), dict(image=None, images=["a.png"])])
    raw = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    samples = load(path, processor).samples
    assert [sample.answer for sample in samples] == ["2", "12", "2.5", "2", "2", "2", "2"]
    assert [sample.id for sample in samples] == ["row-0", "7", "row-3", "row-4", "5", "row-6", "row-7"]
    assert samples[0].images == samples[6].images == (str(tmp_path / "a.png"),) and samples[2].solution == ""
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 0, 0, 2, 1]
    assert samples[5].fields() == dict(id="row-6", image=str(tmp_path / "a.png"), images=samples[5].images,
                                       question="<image>, <image>", answer="2")
    assert samples[3].fields()["image"] is None


BAD_ROWS = [  # a row, and what its line says
    (dict(question=None), "no question"), (dict(answer=None, id=" "), "no id; no answer"),
    (dict(answer=True), "answer is a bool"), (dict(id=1.5, images="a.png"), "id is a float; images is a str"),
    (dict(answer=float("nan")), "no answer"),
    (dict(images=["a.png", 2], question="<image><image>"), "images must be a list of paths"),
    (dict(images=["b.png"]), "the first one that of image"),
    (dict(question="<image><image>?"), "the question has 2 <image> for 1 pictures"),
    (dict(question="<image><|image_pad|><|im_end|>"), "tokens in the text: <|im_end|> <|image_pad|>"),
    (dict(question="<image>\ud800?"), "surrogates not allowed"),
    (dict(answer="\\frac{1}{"), r"the judge cannot read the answer '\\frac{1}{'"),
    (dict(image="/etc/hostname"), "path '/etc/hostname' leaves the folder of its file"),
    (dict(image=None, images=["a.png", "../a.png"], question="<image><image>"), "leaves the folder"),
    (dict(image="b.png"), "No such file or directory: "), (dict(image="a\0.png"), "null byte"),
    (b"{", "Expecting"), (b"[]", "not a JSON object but a list"), (b"[" * 100_000, "recursion")]


def test_bad_rows_are_named_at_once_with_line_and_reason_and_then_counted(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(data, "SHOWN", 100)
    path = write(tmp_path, [{}, b""] + [row for row, _ in BAD_ROWS])
    title, *lines = complaint(path, processor).split("\n")
    assert title == f"{path}: {len(BAD_ROWS)} of {len(BAD_ROWS) + 1} rows are bad:"
    for i, (line, (_, what)) in enumerate(zip(lines, BAD_ROWS, strict=True)):
        assert line.startswith(f"{path}:{i + 3}: ") and what in line, (line, what)
    monkeypatch.setattr(data, "SHOWN", 3)
    assert complaint(path, processor).split("\n") == [title, *lines[:3], f"... and {len(BAD_ROWS) - 3} more"]


def test_solutions_are_checked_only_where_they_are_needed(tmp_path, processor):
    for row, what in ((dict(solution=None), "no solution"), (dict(solution="<|im_end|>"), "special token")):
        path = write(tmp_path, [row])
        assert len(load(path, processor)) == 1
        assert what in complaint(path, processor, need_solution=True)


def test_missing_and_empty_files_and_limits_are_one_line_that_says_what_to_do(tmp_path, processor):
    assert "`python fetch.py geo3k` makes it" in complaint("data/geometry3k/no_such_file.jsonl", processor)
    assert "`python fetch.py mm_math` makes it" in complaint(f"{tmp_path}/mm_math5k/x.jsonl", processor)
    assert "no such file; give the path" in complaint(str(tmp_path / "x.jsonl"), processor)
    assert "no rows" in complaint(write(tmp_path, [b" "]), processor)
    path = write(tmp_path, [{}])
    for knobs in (dict(min_pixels=1), dict(max_pixels=10**9), dict(min_pixels=9000, max_pixels=8000)):
        assert re.fullmatch("min_pixels=.*784..1003520, or the.*", complaint(path, processor, **knobs))


def test_the_toy_is_drawn_on_first_use_and_only_then(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("toy.draw.make_toy", made.append)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        data.ensure("./data/toy/train.jsonl")  # this make_toy draws nothing
    pathlib.Path("data/toy").mkdir(parents=True)
    pathlib.Path("data/toy/train.jsonl").touch()
    data.ensure("data/toy/train.jsonl")
    assert made == ["data/toy"]


def test_prompt_is_the_chat_template_around_question_and_instruction_and_no_text_is_code(processor):
    prompt = data.prompt_text(processor[0], "<image>What is {{ 1+1 }}, with <image>?")
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt == (f"<|im_start|>user\n{one}What is {{{{ 1+1 }}}}, with {one}? Solve the problem step by "
                      "step. Put the final answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")


def test_a_query_has_a_token_for_each_merged_patch_of_each_picture(mixed_jsonl, processor, monkeypatch):
    dataset = load(mixed_jsonl, processor)
    assert dataset.grids(2).tolist() == [[1, 10, 4], [1, 6, 6], [1, 4, 8]]  # 56x140, 84x84, 112x56 by 14
    for i, count in enumerate([1, 0, 3, 1] * 2):
        query, expanded = dataset.query(i), dataset.prompt(i)
        assert query.grids.shape == (count, 3) and query.grids.dtype == torch.int64 and query.features == []
        assert expanded.count("<|image_pad|>") == len(query.images) == count
        for image, (_, rows, columns) in zip(query.images, query.grids.tolist()):
            assert image.mode == "RGB" and image.size == (columns * 14, rows * 14)
            expanded = expanded.replace("<|image_pad|>", "#" * (rows * columns // 4), 1)
        assert query.ids == processor[0](expanded.replace("#", "<|image_pad|>"))["input_ids"]
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", None)  # neither of these opens a picture
            assert dataset.ids(i) == query.ids and torch.equal(dataset.grids(i), query.grids)


def test_prompts_are_counted_with_their_pictures_and_never_cut(tmp_path, processor):
    path = write(tmp_path, [dict(images=["a.png", "a.png"], question="<image><image>?")])
    count = len(load(path, processor).query(0).ids)
    assert len(load(path, processor, max_prompt_tokens=count).query(0).ids) == count > 18
    assert f"prompt of {count} tokens, over max_" in complaint(path, processor, max_prompt_tokens=count - 1)


def test_banned_ids_are_the_vision_tokens_and_eos_ids_come_from_both_files(processor, tiny_model_dir):
    names = processor[0].convert_ids_to_tokens(data.special_token_ids(processor[0], "")[1])
    assert sorted(names) == sorted(data.VISION_TOKENS)
    eos = data.special_token_ids(processor[0], tiny_model_dir)[0]
    assert processor[0].convert_ids_to_tokens(eos) == ["<|endoftext|>", "<|im_end|>"]
    assert data.special_token_ids(processor[0], "no folder")[0] == [processor[0].eos_token_id]


def test_orders_and_63_bit_seeds_are_pure_and_each_argument_counts():
    assert data.order(10, seed=1, epoch=2) == [3, 5, 4, 8, 9, 7, 2, 1, 6, 0]
    assert len({tuple(data.order(100, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert data.request_seed(0, 1, "a", 2) == 5373156998694678871
    several = {data.request_seed(seed, step, name, k) for seed in (0, 1) for step in (0, 1) for name in "ab"
               for k in (0, 1)}
    assert len(several) == 16 and all(0 <= seed < 2**63 for seed in several)


def test_final_size_is_one_that_the_image_processor_keeps():
    rng, kept = random.Random(0), 0
    for _ in range(10_000):
        low = rng.choice([784, 3136, 56 * 56 * 4])
        high = low + rng.choice([3136, 7056, 200_000, 12_845_056])
        w, h = round(2 ** rng.uniform(0, 13)), round(2 ** rng.uniform(0, 13))
        try:
            size = data.final_size(w, h, 28, low, high)
        except ValueError:
            continue
        kept += 1
        assert qwen2_vl.smart_resize(*size[::-1], 28, low, high) == size[::-1]
    assert kept > 7_000


def test_image_processors_leave_a_final_picture_alone(tmp_path, processor, tiny_model_dir):
    processors = [processor[1]]
    if importlib.util.find_spec("torchvision"):  # what vLLM uses, where there is one
        processors.append(AutoImageProcessor.from_pretrained(tiny_model_dir, backend="torchvision"))
    for size in [(54, 40), (3, 9), (640, 480), (2000, 15), (31, 1999), (1111, 777)]:
        Image.effect_noise(size, 50).save(tmp_path / "a.png")
        image = data.read_image(tmp_path / "a.png", 28, 3136, 200_704)
        kept = processor[1](images=[image], do_resize=False, return_tensors="pt")
        for other in processors:
            resized = other(images=[image], return_tensors="pt")
            assert torch.equal(resized["image_grid_thw"], kept["image_grid_thw"])
            torch.testing.assert_close(resized["pixel_values"], kept["pixel_values"], atol=1e-5, rtol=0)


def encoded(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def see(path, content):
    """The picture of a file's content at its final size as int64, after the check said the same size."""
    path.write_bytes(content)
    image = data.read_image(path, 28, 784, 10**6)
    assert image.mode == "RGB" and data.check_image(path, 28, 784, 10**6) == image.size
    return np.asarray(image).astype(int)


def test_every_kind_of_picture_is_shown_upright_in_rgb(tmp_path):
    blue, drawn, exif = *(Image.new("RGB", (112, 56), name) for name in ("blue", "white")), Image.Exif()
    drawn.paste("red", (0, 0, 56, 28))
    shown = [encoded(drawn.convert(mode)) for mode in ("RGB", "P", "RGBA")] + [encoded(drawn, "BMP")]
    shown.append(encoded(drawn.convert("CMYK"), "JPEG", quality=95))
    shown += [encoded(drawn, kind, save_all=True, append_images=[blue]) for kind in ("GIF", "PNG", "WEBP")]
    exif[0x0112] = 6  # as the camera was turned
    turned = drawn.transpose(Image.Transpose.ROTATE_90)
    shown += [encoded(turned, kind, exif=exif, quality=95) for kind in ("JPEG", "PNG")]
    for content in shown:
        picture = see(tmp_path / "any.name", content)
        assert picture.shape == (56, 112, 3) and np.abs(picture - np.asarray(drawn)).mean() < 3


def test_transparent_parts_are_white_and_16_bit_grey_is_scaled(tmp_path):
    black = encoded(Image.new("P", (84, 84)), transparency=0)
    for clear in (black, encoded(Image.new("RGBA", (84, 84))), encoded(Image.new("LA", (84, 84)))):
        assert see(tmp_path / "a", clear).min() == 255
    half, grey = Image.new("RGBA", (84, 84), (0, 0, 0, 128)), np.full((84, 84), 257 * 100, np.uint16)
    assert abs(see(tmp_path / "a", encoded(half)) - 127).max() <= 1
    assert abs(see(tmp_path / "a", encoded(Image.fromarray(grey))) - 100).max() <= 1


def test_broken_and_oversized_pictures_are_named(tmp_path, processor, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 50_000_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    noise = Image.effect_noise((90, 60), 50)
    broken = {b"": "cannot identify", b"<svg/>": "cannot identify", encoded(noise, "EPS"): "cannot identify",
              encoded(noise)[:2000]: "truncated", encoded(noise, "JPEG")[:500]: "truncated",
              encoded(noise.resize((1000, 110))): "decompression bomb",
              encoded(noise.resize((2050, 10))): "aspect ratio must be smaller than 200"}
    for i, content in enumerate(broken):
        (tmp_path / f"{i}.png").write_bytes(content)
    path = write(tmp_path, [dict(image=f"{i}.png") for i in range(len(broken))])
    lines = complaint(path, processor).split("\n")[1:]
    for i, (line, what) in enumerate(zip(lines, broken.values(), strict=True)):
        assert line.startswith(f"{path}:{i + 1}: image {tmp_path}/{i}.png: ") and what in line


def test_what_is_there_twice_is_warned_of_with_counts(tmp_path, processor, capsys):
    Image.new("RGB", (84, 84), "red").save(tmp_path / "c.png")
    text = dict(image=None, question="?")
    train = write(tmp_path, [{}, text], "train.jsonl")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    rows = [dict(image="copy.png"), dict(question="<image>And this?"), dict(image="c.png"), text]
    paths = dict(train=train, validation="", test=write(tmp_path, [*rows, text | dict(question="Another?")]))
    first, others = data.open_datasets(paths, *processor, 3136, 28224, 2048)
    assert (len(first), {split: len(rows) for split, rows in others.items()}) == (2, {"test": 5})
    assert capsys.readouterr().out.splitlines() == [
        "warning: of 5 problems of test, 2 are in train too (question and pictures), "
        "and 2 have a picture of train"]


def test_real_problems_load(real_data, processor, tmp_path):
    fetch.convert("geo3k_raw", str(real_data / "geometry3k_raw"), str(tmp_path))
    dataset = load(str(tmp_path / "geometry3k" / "geometry3k_rl_v0.jsonl"), processor)
    assert [sample.answer for sample in dataset.samples][::4] == ["80", "5\\sqrt{3}", "\\frac{2\\sqrt{2}}{5}"]

"""data.py: rows, prompts, images and conversions."""
import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

import data
from configurator import UserError

LIMITS = dict(min_pixels=56 * 56, max_pixels=256 * 28 * 28, max_prompt_tokens=2000)


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return data.load_processor(tiny_model_dir)


def write(folder, rows, name="rows.jsonl", image=True):
    """A jsonl of the rows (dict, or str or bytes as they are), each dict filled up to a good row; its path."""
    good = dict(question="<image>What is 1+1?", answer="2", solution="It is \\boxed{2}.", image="a.png")
    if image:
        Image.new("RGB", (84, 84), "white").save(folder / "a.png")
    lines = []
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            row = json.dumps({k: v for k, v in (good | dict(id=f"row-{i}") | row).items() if v is not None})
        lines.append(row if isinstance(row, bytes) else row.encode())
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / name)


def load(path, processor, **knobs):
    return data.Dataset(path, *processor, **(LIMITS | knobs))


def complaint(path, processor, **knobs):
    with pytest.raises(UserError) as error:
        load(path, processor, **knobs)
    return str(error.value)


# ---- rows

def test_good_rows_load_with_bom_crlf_blank_lines_and_numbers(tmp_path, processor):
    path = write(tmp_path, [{}, "", dict(answer=12, id=7), dict(answer=2.5, solution=None)])
    raw = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    dataset = load(path, processor)
    assert [s.answer for s in dataset.samples] == ["2", "12", "2.5"] and len(dataset) == 3
    assert [s.id for s in dataset.samples] == ["row-0", "7", "row-3"]
    assert dataset.samples[2].solution == "" and dataset.samples[0].image == str(tmp_path / "a.png")


def test_solutions_are_checked_only_where_they_are_needed(tmp_path, processor):
    for row, what in ((dict(solution=None), "no solution"), (dict(solution=" "), "empty solution"),
                      (dict(solution="<|im_end|>"), "special token")):
        path = write(tmp_path, [row])
        assert load(path, processor).samples[0].answer == "2"
        assert what in complaint(path, processor, need_solution=True)


def test_missing_empty_and_misnumbered_input_is_one_line_that_says_what_to_do(tmp_path, processor):
    assert "python data.py geo3k`" in complaint("data/geometry3k/no_such_file.jsonl", processor)
    assert "python data.py mm_math`" in complaint(str(tmp_path / "mm_math5k" / "x.jsonl"), processor)
    assert "no such file; give the path" in complaint(str(tmp_path / "x.jsonl"), processor)
    assert "no rows" in complaint(write(tmp_path, []), processor)
    path = write(tmp_path, [{}])
    for knobs in (dict(min_pixels=1), dict(max_pixels=10**9), dict(min_pixels=9000, max_pixels=8000),
                  dict(max_pixels=783)):
        message = complaint(path, processor, **knobs)
        assert "min_pixels=" in message and "784..1003520" in message and "\n" not in message


def test_a_folder_without_a_qwen_vl_processor_is_refused(tmp_path, tiny_model_dir):
    with pytest.raises(UserError, match="no tokenizer and image processor"):
        data.load_processor(str(tmp_path / "no_model"))
    shutil.copytree(tiny_model_dir, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(dict(size=dict(shortest_edge=224))))
    with pytest.raises(UserError, match="is another one"):
        data.load_processor(str(tmp_path / "clip"))
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        data.load_processor(str(tmp_path / "base"))


def test_the_toy_is_made_on_first_use_and_only_then(tmp_path, monkeypatch):
    import toy
    made = []

    def make_toy(root):
        made.append(root)
        os.makedirs(root)
        (pathlib.Path(root) / "train.jsonl").write_text("{}")
    monkeypatch.setattr(toy, "make_toy", make_toy)
    monkeypatch.chdir(tmp_path)
    data.ensure("data/toy/train.jsonl")
    data.ensure("data/toy/train.jsonl")
    assert made == [os.path.join("data", "toy")]
    monkeypatch.setattr(toy, "make_toy", made.append)
    with pytest.raises(UserError, match="no such file; `python data.py toy`"):
        data.ensure("./data/toy/other.jsonl")


# ---- prompts

def test_prompt_is_the_chat_template_around_question_and_instruction(processor):
    prompt = data.prompt_text(processor[0], "<image>What is 1+1?")
    assert prompt == ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is 1+1? Solve the problem "
                      "step by step. Put the final answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")


def test_query_ids_hold_one_token_for_each_merged_patch_of_the_grid(tiny_jsonl, processor):
    tokenizer, image_processor = processor
    dataset = load(tiny_jsonl, processor)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for i in range(len(dataset)):
        x = dataset.inputs(i)
        t, h, w = x.grid_thw[0].tolist()
        assert x.grid_thw.shape == (1, 3) and x.grid_thw.dtype == torch.int64 and x.pixel_values.dtype == torch.float32
        assert x.pixel_values.shape == (t * h * w, 3 * 2 * 14 * 14)
        assert x.image.size == (w * 14, h * 14) and x.image.mode == "RGB"
        assert x.query_ids.count(pad) == t * h * w // 4 and x.prompt.count("<|image_pad|>") == 1
        assert [token for token in x.query_ids if token != pad] == \
            [token for token in tokenizer(x.prompt)["input_ids"] if token != pad]
        start = x.query_ids.index(pad)
        assert x.query_ids[start:start + t * h * w // 4] == [pad] * (t * h * w // 4)


def test_prompts_are_counted_with_the_image_and_never_cut(tmp_path, processor):
    path = write(tmp_path, [{}])
    count = len(load(path, processor).inputs(0).query_ids)
    assert len(load(path, processor, max_prompt_tokens=count).inputs(0).query_ids) == count
    message = complaint(path, processor, max_prompt_tokens=count - 1)
    assert f"has {count} tokens, over max_prompt_tokens={count - 1}" in message


def test_order_is_a_pure_permutation_that_changes_with_seed_and_epoch():
    assert data.order(10, seed=1, epoch=2) == data.order(10, seed=1, epoch=2) == [3, 5, 4, 8, 9, 7, 2, 1, 6, 0]
    assert sorted(data.order(1000, 0, 0)) == list(range(1000))
    assert len({tuple(data.order(100, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    state = random.getstate()
    data.order(10, 0, 0)
    assert random.getstate() == state and data.order(0, 0, 0) == []


# ---- images

def test_final_size_is_one_that_the_image_processor_keeps():
    rng = random.Random(0)
    kept = 0
    for _ in range(20_000):
        low = rng.choice([1, 784, 3136, 56 * 56 * 4])
        high = low + rng.choice([3136, 7056, 200_000, 12_845_056])
        w, h = round(2 ** rng.uniform(0, 13)), round(2 ** rng.uniform(0, 13))
        try:
            size = data.final_size(w, h, 28, low, high)
        except ValueError:
            continue
        kept += 1
        assert low <= size[0] * size[1] <= high and size[0] % 28 == size[1] % 28 == 0
        assert qwen2_vl.smart_resize(size[1], size[0], 28, low, high) == size[::-1]
        assert qwen2_vl.smart_resize(size[1], size[0], 28, 1, 2 * high) == size[::-1]  # one with a wider range as well
        once = qwen2_vl.smart_resize(h, w, 28, low, high)
        if max(once) <= 200 * min(once) and qwen2_vl.smart_resize(*once, 28, low, high) == once:
            assert size == once[::-1]       # where one pass is stable, it is Qwen's own size
    assert kept > 15_000


def test_image_processor_leaves_a_final_image_alone(tmp_path, processor):
    for i, (w, h) in enumerate([(54, 40), (3, 9), (84, 84), (640, 480), (2000, 15), (31, 1999), (1111, 777)]):
        Image.effect_noise((w, h), 50).save(tmp_path / f"{i}.png")
        image = data.read_image(tmp_path / f"{i}.png", 28, LIMITS["min_pixels"], LIMITS["max_pixels"])
        own = qwen2_vl.Qwen2VLImageProcessorPil(min_pixels=LIMITS["min_pixels"], max_pixels=LIMITS["max_pixels"])
        for image_processor in (own, processor[1]):
            resized = image_processor(images=[image], return_tensors="pt")     # do_resize is on here
            kept = image_processor(images=[image], do_resize=False, return_tensors="pt")
            assert resized["image_grid_thw"].tolist() == [[1, image.height // 14, image.width // 14]]
            assert torch.equal(resized["pixel_values"], kept["pixel_values"])


def test_the_torchvision_processor_gives_the_same_pixels(tmp_path, tiny_model_dir, processor):
    pytest.importorskip("torchvision")
    from transformers import AutoImageProcessor
    Image.effect_noise((300, 200), 50).convert("RGB").save(tmp_path / "a.png")
    x = load(write(tmp_path, [{}], image=False), processor).inputs(0)
    other = AutoImageProcessor.from_pretrained(tiny_model_dir, backend="torchvision")
    theirs = other(images=[x.image], return_tensors="pt")
    assert torch.equal(theirs["image_grid_thw"], x.grid_thw)
    torch.testing.assert_close(theirs["pixel_values"], x.pixel_values, atol=1e-5, rtol=0)


def test_transparency_is_white_grey_is_scaled_and_rotation_is_applied(tmp_path):
    def read(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return np.asarray(data.read_image(tmp_path / name, 28, 784, 84 * 84)).astype(int)
    assert read(Image.new("RGBA", (84, 84), (255, 0, 0, 0))).min() == 255
    half = read(Image.new("RGBA", (84, 84), (0, 0, 0, 128)))
    assert abs(half - 127).max() <= 1
    palette = Image.new("P", (84, 84), 0)
    palette.putpalette([9, 9, 9])
    assert read(palette, transparency=0).min() == 255 and read(palette).max() == 9
    grey = read(Image.fromarray(np.full((84, 84), 257 * 100, np.uint16)))
    assert abs(grey - 100).max() <= 1
    assert abs(read(Image.new("CMYK", (84, 84), (0, 0, 0, 0)), "a.jpg") - 255).max() <= 1
    upright = Image.new("RGB", (112, 28), "white")
    upright.paste("black", (0, 0, 56, 28))          # the left half is black
    exif = Image.Exif()
    exif[0x0112] = 6                                # the camera was turned: show it rotated by 270 degrees
    for name in ("turned.jpg", "turned.png"):
        shown = read(upright, name, exif=exif)
        assert shown.shape == (112, 28, 3) and shown[:40].max() < 60 and shown[72:].min() > 200  # now the upper half is
        assert data.check_image(tmp_path / name) == (28, 112)


def test_a_large_jpeg_is_decoded_small(tmp_path):
    """The peak over that of a small picture: full decoding (21 million pixels, 82 MB) would break the bound."""
    Image.new("L", (2520, 8526), 200).convert("RGB").save(tmp_path / "large.jpg")
    Image.new("RGB", (532, 1820)).save(tmp_path / "small.jpg")
    assert peak_mb(tmp_path / "large.jpg") - peak_mb(tmp_path / "small.jpg") < 45


def peak_mb(path):
    """Peak memory of a process that checks and reads one picture. (Its ru_maxrss would start at our own size.)"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc")
    code = ("import re, sys, data; data.check_image(sys.argv[1]); data.read_image(sys.argv[1], 28, 3136, 1003520);"
            "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    run = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, check=True)
    return int(run.stdout) / 1024


# ---- conversions

def picture(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (90, 60), (shade, 0, 0)).save(file, "png")
    return file.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else
                     "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data, "SIZES", {"mm_math5k": (4, 2, 1), "geometry3k": (3, 2, 1)})


def rows_of(files):
    return [[json.loads(line) for line in open(path, encoding="utf-8")] for path in files]


def check_converted(files, processor):
    """Every file loads; every picture is its own row's (its red channel is the row's answer)."""
    for path in files:
        dataset = load(path, processor)
        for i, sample in enumerate(dataset.samples):
            assert sample.image.endswith(f"{sample.id}.png")
            assert dataset.inputs(i).image.getpixel((0, 0))[0] == int(sample.answer)


def test_the_authors_geometry3k_is_converted(tmp_path, small, processor):
    folder, i = tmp_path / "hub" / "geometry3k", 0
    for name, size in zip(data.NAMES["geometry3k"], (3, 2, 1)):
        rows = []
        for _ in range(size):
            i += 1
            put(folder / "geometry3k_images" / f"geometry3k_{i}.png", picture(i))
            rows.append(dict(question=f"<image>Find $x_{i}$.", answer=str(i), solution=f"\\boxed{{{i}}}",
                             id=f"geometry3k_{i}", image=f"geometry3k_images/geometry3k_{i}.png"))
        put(folder / f"{name}.jsonl", rows)
    files = data.convert("geo3k", str(tmp_path / "hub"), str(tmp_path / "data"))
    assert {os.path.relpath(k, tmp_path): v for k, v in files.items()} == {
        "data/geometry3k/geometry3k_rl_v0.jsonl": 3, "data/geometry3k/geometry3k_validation_v0.jsonl": 2,
        "data/geometry3k/geometry3k_test_v0.jsonl": 1}
    assert rows_of(files)[2] == [dict(question="<image>Find $x_6$.", answer="6", solution="\\boxed{6}",
                                      id="geometry3k_6", image="images/geometry3k_6.png")]
    check_converted(files, processor)
    with pytest.raises(UserError, match="is there already"):
        data.convert("geo3k", str(tmp_path / "hub"), str(tmp_path / "data"))


def make_maye_mm_math(folder, image="images/{}.png"):
    for name, ids in (("mm_math_rl_v0", (1, 2, 3, 4)), ("mm_math_validation_v0", (5, 6)), ("math_verse_test_v0", (7,))):
        rows = []
        for i in ids:
            put(folder / "mm_math" / "images" / f"{i}.png", picture(i))
            rows.append(dict(question=f"<image>Für {i}", answer=i, id=f"mm_{i}", image=image.format(i)))
            if i < 7:       # the files' columns differ
                rows[-1] |= dict(solution=f"\\boxed{{{i}}}." if i == 3 else f"So \\boxed{{{i}}}", level=1)
        put(folder / "mm_math" / f"{name}.jsonl", rows)


def test_the_authors_mm_math_is_converted_with_the_rows_that_sft_can_learn_from(tmp_path, small, processor):
    make_maye_mm_math(tmp_path / "hub")
    files = data.convert("mm_math", str(tmp_path / "hub"), str(tmp_path / "data"))
    assert [(os.path.basename(k), v) for k, v in files.items()] == [
        ("mm_math_rl_v0.jsonl", 4), ("mm_math_validation_v0.jsonl", 2), ("mm_math_test_v0.jsonl", 1),
        ("mm_math_sft_v0.jsonl", 3)]
    assert rows_of(files)[2][0]["solution"] == "\\boxed{7}"
    assert [row["id"] for row in rows_of(files)[3]] == ["mm_1", "mm_2", "mm_4"]
    check_converted(files, processor)


def test_split_sizes_other_than_the_papers_are_an_error_with_both_numbers(tmp_path, monkeypatch):
    make_maye_mm_math(tmp_path / "hub")
    assert data.SIZES == {"mm_math5k": (5000, 100, 100), "geometry3k": (2101, 300, 601)}
    with pytest.raises(UserError, match="train split of mm_math5k has 5000 rows in the paper, here 4"):
        data.convert("mm_math", str(tmp_path / "hub"), str(tmp_path / "data"))
    monkeypatch.setattr(data, "SIZES", {"mm_math5k": (4, 2, 3)})
    with pytest.raises(UserError, match="test split of mm_math5k has 3 rows in the paper, here 1"):
        data.convert("mm_math", str(tmp_path / "hub"), str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data") == [] if (tmp_path / "data").exists() else True


@pytest.mark.parametrize("image", ["../../{}.png", "/etc/hostname", "missing/{}.png"])
def test_a_source_that_climbs_out_or_lacks_a_picture_leaves_nothing_behind(tmp_path, small, image):
    make_maye_mm_math(tmp_path / "hub", image)
    with pytest.raises(UserError, match="not the layout that mm_math reads"):
        data.convert("mm_math", str(tmp_path / "hub"), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists() or os.listdir(tmp_path / "data") == []


def make_mm_math_hub(folder, climb=False):
    folder.mkdir()
    with zipfile.ZipFile(folder / "MM_Math.zip", "w") as archive:
        for i in range(12):
            archive.writestr(f"MM_Math/{i}.png", picture(i))
        if climb:
            archive.writestr("../evil.png", picture(0))
    rows = [dict(question=f"As shown, find the angle {i}.", file_name=f"{i}.png",
                 solution=f"Step. So it is \\boxed{{{i}}}.", year="nine", difficult="hard", knowledge=["angle"])
            for i in range(8)]
    rows[0]["solution"] = "\\boxed{y=2x+1}"       # not a number
    rows[1]["file_name"] = "none.png"             # no picture
    put(folder / "MM_Math.jsonl", rows)


def test_mm_math_from_the_hub_is_drawn_from_its_numeric_problems(tmp_path, small, processor):
    make_mm_math_hub(tmp_path / "hub")
    files = data.convert("mm_math_hub", str(tmp_path / "hub"), str(tmp_path / "data"))
    assert [(os.path.basename(k), v) for k, v in files.items()] == [
        ("mm_math_rl_v0.jsonl", 4), ("mm_math_validation_v0.jsonl", 2), ("mm_math_sft_v0.jsonl", 4)]
    train, validation, sft = rows_of(files)  # no test: that is MathVerse
    assert sorted(row["answer"] for row in train + validation) == ["2", "3", "4", "5", "6", "7"] and train == sft
    assert train[0]["question"].startswith("<image>As shown")
    check_converted(files, processor)


def test_an_archive_with_a_member_that_climbs_out_is_refused(tmp_path, small):
    make_mm_math_hub(tmp_path / "hub", climb=True)
    with pytest.raises(UserError, match=r"evil.png.* leaves the folder"):
        data.convert("mm_math_hub", str(tmp_path / "hub"), str(tmp_path / "data"))


def test_two_rows_with_one_id_are_not_given_one_picture(tmp_path, small):
    make_maye_mm_math(tmp_path / "hub")
    path = tmp_path / "hub" / "mm_math" / "mm_math_validation_v0.jsonl"
    path.write_text(path.read_text().replace("mm_5", "mm_1"))
    with pytest.raises(UserError, match="two rows have the id 'mm_1'"):
        data.convert("mm_math", str(tmp_path / "hub"), str(tmp_path / "data"))


def test_numeric_answers():
    assert all(map(data.is_numeric, ["5", "-2.5", "\\frac{3}{4}", "2\\sqrt{3}", "60^\\circ", "60^{\\circ}", "12\\pi"]))
    assert not any(map(data.is_numeric, ["", "x", "y=2x+1", "AB", "1, 2", "3 cm", "\\sqrt{a}", "yes", "\\pi", "5:4"]))


def test_geometry3k_from_the_hub_is_converted(tmp_path, small, processor):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    (tmp_path / "hub" / "data").mkdir(parents=True)
    i = 0
    for split, size in (("train", 3), ("validation", 2), ("test", 1)):
        rows = []
        for _ in range(size):
            i += 1
            rows.append(dict(images=[dict(bytes=picture(i), path=None)], problem="<image>Find x.", answer=str(i), id=i,
                             choices=["1", "2", "3", "4"], ground_truth="A"))
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    files = data.convert("geo3k_hub", str(tmp_path / "hub"), str(tmp_path / "data"))
    assert list(files.values()) == [3, 2, 1] and rows_of(files)[2][0]["id"] == "geometry3k_6"
    check_converted(files, processor)


def test_geometry3k_from_the_hub_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        data.convert("geo3k_hub", str(tmp_path), str(tmp_path / "data"))


def test_geometry3k_in_its_own_layout_is_converted(tmp_path, small, processor):
    for i, split in enumerate(["train", "train", "val", "test", "val", "train"]):
        choices = [str(50 + i), str(i), "7 \\sqrt { 2 }", "9"]
        put(tmp_path / "raw" / split / str(i) / "img_diagram.png", picture(i))
        put(tmp_path / "raw" / split / str(i) / "data.json",
            [dict(id=i, data_type=split, annotat_text="Find x.", answer="B", choices=choices)])
    files = data.convert("geo3k_raw", str(tmp_path / "raw"), str(tmp_path / "data"))
    assert [[row["id"] for row in rows] for rows in rows_of(files)] == [
        ["geometry3k_0", "geometry3k_1", "geometry3k_5"], ["geometry3k_2", "geometry3k_4"], ["geometry3k_3"]]
    check_converted(files, processor)


def test_command_line_errors_are_one_line_and_status_2(tmp_path):
    for args, what in ((["nosuch"], "usage: python data.py NAME"), (["geo3k_raw"], "give the folder"),
                       (["geo3k", str(tmp_path)], "not the layout that geo3k reads"),
                       (["geo3k"], "cannot fetch ManTle/MAYE")):
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
        run = subprocess.run([sys.executable, data.__file__, *args], cwd=tmp_path, env=env,
                             capture_output=True, text=True)
        assert run.returncode == 2 and what in run.stderr and run.stderr.count("\n") == 1, run.stderr


# ---- real data

def test_real_problems_load_and_their_largest_picture_costs_little(real_data, processor):
    limits = dict(min_pixels=56 * 56, max_pixels=1280 * 784, max_prompt_tokens=4096)
    folder = real_data / "mathvision"
    for name, rows in (("rl", 400), ("validation", 50), ("test", 110), ("sft", 116)):
        dataset = load(str(folder / f"mathvision_{name}.jsonl"), processor, need_solution=True, **limits)
        assert len(dataset) == rows
        assert max(len(dataset.inputs(i).query_ids) for i in range(0, rows, 10)) <= 4096
    assert Image.open(folder / "images" / "2935.jpg").size == (2520, 8526)
    assert peak_mb(folder / "images" / "2935.jpg") - peak_mb(folder / "images" / "2880.jpg") < 45


def test_real_geometry3k_problems_are_converted(real_data, tmp_path, monkeypatch, processor):
    monkeypatch.setattr(data, "SIZES", {"geometry3k": (10, 0, 0)})
    files = data.convert("geo3k_raw", str(real_data / "geometry3k_raw"), str(tmp_path))
    dataset = load(next(iter(files)), processor)
    assert [s.answer for s in dataset.samples] == ["80", "13", "9", "48", "5\\sqrt{3}", "10", "120", "22",
                                                   "\\frac{2\\sqrt{2}}{5}", "16"]
    assert dataset.samples[0].question.startswith("<image>In $\\odot X, A B=30, C D=30,$ and $m \\widehat{C Z}=40$.")

"""fetch.py: what it makes of the authors' files and of Geometry3K's own layout."""
import json
import os

import pytest
from PIL import Image

import fetch
from configurator import UserError
from test_evaluate import read
from test_reward import run


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (90, 60), (shade, 0, 0)).save(path)


def check_pictures(folder):
    """Every row's picture is its own: its red is the row's answer."""
    for path in folder.glob("*.jsonl"):
        for row in read(path):
            assert Image.open(folder / row["image"]).getpixel((0, 0))[0] == int(row["answer"])


def make_maye(folder, image="images/{}.png"):
    """The authors' mm_math in small: 4, 2 and 1 problems."""
    for name, ids in ("mm_math_rl", (1, 2, 3, 4)), ("mm_math_validation", (5, 6)), ("math_verse_test", (7,)):
        text = ""
        for i in ids:
            picture(folder / "mm_math" / "images" / f"{i}.png", i)
            row = dict(question=f"Für <image>{i}<image>", answer=i, id=f"mm/{i}", image=image.format(i))
            if i < 7:  # the files' columns differ
                row |= dict(solution=f"\\boxed{{{i}}}." if i == 3 else f"So \\boxed{{{i}}}", level=1)
            text += json.dumps(row, ensure_ascii=False) + "\n"
        (folder / "mm_math" / f"{name}_v0.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


def test_the_authors_files_are_converted_with_the_rows_that_sft_can_learn_from(tmp_path, capsys):
    fetch.convert("mm_math", make_maye(tmp_path / "hub"), str(tmp_path / "data"))
    folder = tmp_path / "data" / "mm_math5k"
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/mm_math_rl_v0.jsonl: 4 rows",
        f"{folder}/mm_math_validation_v0.jsonl: 2 rows",
        f"{folder}/mm_math_test_v0.jsonl: 1 rows",
        f"{folder}/mm_math_sft_v0.jsonl: 3 rows"]
    row = dict(id="mm/7", question="<image>Für  7", answer="7", solution="\\boxed{7}")
    assert read(folder / "mm_math_test_v0.jsonl") == [row | {"image": "images/test-00000.png"}]
    assert [row["id"] for row in read(folder / "mm_math_sft_v0.jsonl")] == ["mm/1", "mm/2", "mm/4"]
    check_pictures(folder)
    assert os.listdir(tmp_path / "data") == ["mm_math5k"] and folder.stat().st_mode & 0o777 == 0o755
    with pytest.raises(UserError, match="is there already"):
        fetch.convert("mm_math", str(tmp_path / "hub"), str(tmp_path / "data"))


@pytest.mark.parametrize("image", ["../mm_math/images/{}.png", "/etc/hostname", "missing/{}.png"])
def test_a_source_that_climbs_out_or_lacks_a_picture_leaves_nothing_behind(tmp_path, image):
    with pytest.raises(UserError, match="not the layout that mm_math reads"):
        fetch.convert("mm_math", make_maye(tmp_path / "hub", image), str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data") == []


def test_geometry3k_in_its_own_layout_is_converted_in_the_order_of_its_ids(tmp_path):
    for i, split in enumerate(["train", "train", "val", "test", "val", "train"]):
        row = dict(id=i, data_type=split, annotat_text="Find x.", answer="B", choices=["50", "6", "7"],
                   compact_choices=["50", str(i), "7"])
        picture(tmp_path / "raw" / split / str(i) / "img_diagram.png", i)
        (tmp_path / "raw" / split / str(i) / "data.json").write_text(json.dumps(row))
    fetch.convert("geo3k_raw", str(tmp_path / "raw"), str(tmp_path / "data"))
    folder = tmp_path / "data" / "geometry3k"
    assert [[row["id"][-1] for row in read(folder / f"geometry3k_{split}_v0.jsonl")]
            for split in ("rl", "validation", "test")] == [["0", "1", "5"], ["2", "4"], ["3"]]
    check_pictures(folder)


def test_the_command_says_what_it_takes_and_what_is_wrong_with_status_2(tmp_path):
    assert fetch.__doc__ in run(fetch.__file__, "--help").stdout
    for args, what in ((["nosuch"], "invalid choice: 'nosuch'"), (["geo3k_raw"], "is on no hub"),
                       (["geo3k_raw", tmp_path], "no problem found"),
                       (["geo3k"], "cannot fetch ManTle/MAYE from the hub")):
        done = run(fetch.__file__, *args, folder=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
        assert done.returncode == 2 and what in done.stderr and "Traceback" not in done.stderr

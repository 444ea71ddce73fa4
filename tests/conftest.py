"""Shared by all tests: the repository root on sys.path, and tiny random models with real tokenizers and image processors."""
import json
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at test time; a slip is an error, not a wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU machine too: the figures here are those of float32 on a CPU
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import pytest  # noqa: E402

from tiny import make_tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A random Qwen2.5-VL of some 60k parameters, tied embeddings, in the hub's format."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl", "qwen2_5_vl", tied=True)


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory):
    """A random Qwen2-VL, untied embeddings."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "qwen2_vl", "qwen2_vl", tied=False)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real problems that NANOMAYE_REAL_DATA names; the test skips where it is unset."""
    if "NANOMAYE_REAL_DATA" not in os.environ:
        pytest.skip("NANOMAYE_REAL_DATA is unset")
    return pathlib.Path(os.environ["NANOMAYE_REAL_DATA"])


@pytest.fixture(scope="session")
def tiny_jsonl(tmp_path_factory):
    """12 problems in the paper's jsonl format with images of several sizes: the path of the jsonl."""
    from PIL import Image
    folder = tmp_path_factory.mktemp("tiny_data")
    (folder / "images").mkdir()
    with open(folder / "tiny.jsonl", "w", encoding="utf-8") as file:
        for i in range(12):
            size = [(84, 84), (112, 56), (56, 140)][i % 3]
            Image.new("RGB", size, (20 * i, 255 - 20 * i, 90)).save(folder / "images" / f"{i}.png")
            row = dict(question="<image>What is " + "1+" * (i % 4) + f"{i}?", answer=str(i + i % 4), id=f"tiny-{i}",
                       solution=f"It is \\boxed{{{i + i % 4}}}.", image=f"images/{i}.png")
            file.write(json.dumps(row) + "\n")
    return str(folder / "tiny.jsonl")

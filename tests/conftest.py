"""Shared by all tests: the repository root on sys.path, tiny random models, and problems for them."""
import json
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: a slip is an error, not a wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other cost more here
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU machine too: the figures are those of float32 on a CPU
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import distributed  # noqa: E402
from data import Dataset, load_processor  # noqa: E402
from tiny import make_tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A random Qwen2.5-VL of some 60k parameters, tied embeddings, in the hub's format."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl", "qwen2_5_vl", tied=True)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real problems that NANOMAYE_REAL_DATA names; the test skips where it is unset."""
    if "NANOMAYE_REAL_DATA" not in os.environ:
        pytest.skip("NANOMAYE_REAL_DATA is unset")
    return pathlib.Path(os.environ["NANOMAYE_REAL_DATA"])


def problems(folder, sizes):
    """The path of a jsonl with a problem for each list of picture sizes in sizes, and as many pictures."""
    (folder / "images").mkdir()
    with open(folder / "tiny.jsonl", "w", encoding="utf-8") as file:
        for i, of_row in enumerate(sizes):
            images = [f"images/{i}-{j}.png" for j in range(len(of_row))]
            for j, size in enumerate(of_row):
                Image.new("RGB", size, (20 * i, 255 - 20 * i, 90 + 40 * j)).save(folder / images[j])
            pictures = {"image": images[0]} if len(images) == 1 else {"images": images}
            row = dict(question="<image>" * len(images) + "What is " + "1+" * (i % 4) + f"{i}?",
                       answer=str(i + i % 4), solution=f"It is \\boxed{{{i + i % 4}}}.", id=f"tiny-{i}")
            file.write(json.dumps(row | pictures) + "\n")
    return str(folder / "tiny.jsonl")


@pytest.fixture(scope="session")
def tiny_jsonl(tmp_path_factory):
    """12 problems in the paper's format, one picture each, of several sizes: the path of the jsonl."""
    return problems(tmp_path_factory.mktemp("tiny_data"), [[(84, 84)], [(112, 56)], [(56, 140)]] * 4)


@pytest.fixture(scope="session")
def mixed_jsonl(tmp_path_factory):
    """8 problems with one, none and three pictures, of different sizes: the path of the jsonl."""
    rows = [[(84, 84)], [], [(56, 140), (84, 84), (112, 56)], [(112, 84)]]
    return problems(tmp_path_factory.mktemp("mixed_data"), rows * 2)


@pytest.fixture(scope="session")
def mixed(tiny_model_dir, mixed_jsonl):
    """Those as a Dataset, for the tiny model."""
    return Dataset(mixed_jsonl, *load_processor(tiny_model_dir), 3136, 28224, 512)


@pytest.fixture(scope="module")
def world():
    """A process group of one."""
    yield distributed.start()
    torch.distributed.destroy_process_group()

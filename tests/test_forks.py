"""Each forks/NAME.patch fits the scripts as they are, is short, and by its command trains otherwise."""
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from test_evaluate import read


def step_of(out_dir, command, tiny_model_dir, tiny_jsonl):
    """The metrics of one step on the tiny model that have a value, without times."""
    tiny = dict(model=tiny_model_dir, train_data=tiny_jsonl, val_data="", test_data="", batch_size=8,
                minibatch_size=4, max_steps=1, max_new_tokens=24, max_tokens_per_microbatch=256,
                eval_every_epochs=0)
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    words = [*command.split(), *(f"--{key}={value}" for key, value in tiny.items()), f"--out_dir={out_dir}"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = read(out_dir / "metrics.jsonl")
    return {key: row[key] for key in row if not key.startswith(("time/", "memory/")) and row[key] is not None}


@pytest.fixture(scope="module")
def usual(tmp_path_factory, tiny_model_dir, tiny_jsonl):
    command = "python train_rl.py config/toy.py --old_logprobs_from=trainer"
    return step_of(tmp_path_factory.mktemp("usual"), command, tiny_model_dir, tiny_jsonl)


@pytest.mark.parametrize("path", sorted(ROOT.glob("forks/*.patch")), ids=lambda path: path.stem)
def test_a_fork_is_short_and_trains_otherwise(path, usual, tmp_path, tiny_model_dir, tiny_jsonl):
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", text, re.M)) <= 25, "lines changed"
    command = re.search(r"^Command: (bash forks/run\.sh (\w+).*)", text, re.M)
    assert command[2] == path.stem
    row = step_of(tmp_path, command[1], tiny_model_dir, tiny_jsonl)
    assert row["policy/updates"] == 2 and row != pytest.approx(usual, rel=1e-4, abs=1e-6)

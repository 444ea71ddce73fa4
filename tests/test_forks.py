"""Each forks/NAME.patch fits the scripts as they are, is short, and trains by its header's own command."""
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from test_evaluate import read


@pytest.mark.parametrize("path", sorted(ROOT.glob("forks/*.patch")), ids=lambda path: path.stem)
def test_a_fork_is_short_and_trains_a_step(path, tiny_model_dir, tiny_jsonl, tmp_path):
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", text, re.M)) <= 25, "lines changed"
    command = re.search(r"^Command: (bash forks/run\.sh (\w+).*)", text, re.M)
    assert command[2] == path.stem
    tiny = dict(model=tiny_model_dir, train_data=tiny_jsonl, val_data="", test_data="", batch_size=8,
                minibatch_size=4, max_steps=1, max_new_tokens=24, eval_every_epochs=0, out_dir=tmp_path)
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run([*command[1].split(), *(f"--{key}={value}" for key, value in tiny.items())],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["policy/updates"] for row in read(tmp_path / "metrics.jsonl")] == [2]

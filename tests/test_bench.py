"""bench.py: what it prints and writes, and that the plain way it compares with computes the same numbers."""
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import compare, split_arguments, summarise
from bench_sides import model_flops
from model import load_config, on_meta
from tiny import make_tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent


def bench(tmp_path, *arguments):
    return subprocess.run([sys.executable, "bench.py", f"--out={tmp_path}/bench.json", *arguments], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_jsonl):
    """(what is printed, what is written) of two steps against the plain way. All responses earn the score
    of one that never ended; gamma spreads it unevenly, so that there are advantages and the weights move."""
    folder = tmp_path_factory.mktemp("bench")
    model = make_tiny(folder / "model")
    done = bench(folder, f"--model={model}", f"--train_data={tiny_jsonl}", f"--val_data={tiny_jsonl}", "--against=plain",
                 "--steps=2", "--warmup_steps=0", "--eval_problems=2", "--rollout=hf", "--batch_size=4", "--minibatch_size=2",
                 "--response_tokens=12", "--frozen=False", "--learning_rate=1e-3", "--kl_loss_coeff=0.1",
                 "--max_tokens_per_microbatch=400", "--gamma=0.9", "--sizes=num_hidden_layers=3 vision.depth=3")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads((folder / "bench.json").read_text())


def test_table_and_json_have_every_part(run):
    printed, written = run
    parts = ["data", "vision", "rollout", "old_logprobs", "ref_logprobs", "reward", "update", "sync", "evaluation", "step"]
    summary = written["sides"]["ours"]["summary"]
    assert list(summary) == parts and list(written["sides"]["plain"]["summary"]) == [p for p in parts if p != "evaluation"]
    for part in parts:
        assert f"\n{part} " in printed
        assert summary[part]["s"]["median"] > 0 and summary[part]["peak_gb"] > 0.1 and len(summary[part]["s"]["all"]) == 2
    assert 0 < summary["update"]["utilisation"] < 1
    assert list(written["ratios"]["plain"]) == ["step, time", "step, CPU time", "III and IV, time", "III and IV, CPU time",
                                                "peak_gb"]


def test_every_response_has_the_asked_length(run):
    for side in run[1]["sides"].values():
        assert [(s["response_tokens"], s["longest"]) for s in side["steps"]] == [(48, 12)] * 2


def test_the_plain_way_computes_what_train_rl_computes(run):
    ours, plain = (run[1]["sides"][name]["steps"] for name in ("ours", "plain"))
    for a, b in zip(ours, plain):
        for name in ("logprobs", "ref_logprobs", "entropy", "losses", "grad_norms"):
            assert len(a["check"][name]) == (2 if name in ("losses", "grad_norms") else 48)
            assert a["check"][name] == pytest.approx(b["check"][name], abs=1e-4), name
    assert ours[1]["check"]["logprobs"] != pytest.approx(ours[1]["check"]["ref_logprobs"], abs=1e-2)  # the weights moved


def test_a_flag_goes_to_the_script_that_has_the_knob():
    assert split_arguments(["config/toy.py", "--steps", "3", "--batch_size", "8", "--against=trl", "--typo=1"],
                           {"steps": 5, "against": ""}) == (["--steps", "3", "--against=trl"],
                                                            ["config/toy.py", "--batch_size", "8", "--typo=1"])


@pytest.mark.parametrize("argument, message", [
    ("--sizes=layers=3", "sizes: 'layers=3' is no name=number"),
    ("--batch_sice=8", "unknown knob batch_sice, did you mean batch_size?")])
def test_user_errors_are_one_line(tmp_path, argument, message):
    done = bench(tmp_path, "config/toy.py", argument)
    assert done.returncode == 2 and message in done.stderr.strip().splitlines()[-1], done.stderr[-2000:]


def test_flops_by_hand(tmp_path):
    """2 layers of hidden 32 (2 heads, 1 of keys and values, MLP 64), a vocabulary of 265; a query of 8, a response of 4."""
    hf = on_meta(load_config(make_tiny(tmp_path)))
    flops = model_flops(hf, [SimpleNamespace(ids=[1] * 8, grid_thw=torch.tensor([[1, 4, 4]]))], [4])
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    language = 2 * layers * 12 + 4 * 2 * 32 * (12 * 13 // 2) + 2 * 32 * 265 * 4  # a token sees itself and those before it
    tower = 16 * 2 * (2 * (4 * 32 * 32 + 3 * 32 * 64) + 1176 * 32) + 4 * 2 * (128 * 128 + 128 * 32)
    tower += 4 * 32 * 16 * (16 + 16)  # one block sees all 16 patches; a window has 56 / 14 squared, 16 as well
    assert flops == {"rollout": language, "vision": tower, "old_logprobs": language, "ref_logprobs": language,
                     "update": 3 * language}


def test_ratios_and_sums_leave_the_evaluation_out():
    def record(s, tokens, **more):
        parts = {"rollout": s, "update": 2 * s} | more
        return {"parts": {name: {"s": t, "cpu_s": t, "peak_gb": t} for name, t in parts.items()}, "response_tokens": tokens}
    ours, theirs = [record(1, 10, evaluation=100), record(2, 10, evaluation=100)], [record(2, 10), record(8, 20)]
    assert compare(ours, theirs)["all"] == [2, 2]  # the second made twice the tokens in four times the time
    assert summarise(ours)["step"]["s"]["all"] == [3, 6] and summarise(ours)["step"]["peak_gb"] == 3

"""evaluate.py: the numbers against known values, evaluate() by an engine of known luck, and the command."""
import itertools
import json
import pathlib
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distributed
import evaluate
import rollout
from configurator import UserError
from conftest import ROOT
from data import Completion, Sampling
from evaluate import bootstrap, parse_settings, pass_at_k, wilson

PAPER = ((8, 1.0, 1.0), (1, 0.6, 1.0), (1, 0.01, 0.001))


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one():
    for n, c in itertools.combinations_with_replacement(range(6, 0, -1), 2):
        for k in range(1, n + 1):
            draws = [any(draw) for draw in itertools.combinations([True] * c + [False] * (n - c), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))
    assert pass_at_k(10_000, 1, 5000) == 0.5, "exact where binomials overflow a float"


def test_wilsons_interval():
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4), "Newcombe (1998), table I"
    assert wilson(0, 12, z=2) == [0, pytest.approx(4 / 16)], "z^2 / (n + z^2)"


def test_the_bootstrap_is_the_plain_one_and_always_the_same():
    values, rng = np.random.default_rng(3).integers(0, 5, 80) / 4, np.random.default_rng(7)
    plain = np.quantile([rng.choice(values, 80).mean() for _ in range(10_000)], [0.025, 0.975])
    assert bootstrap(values) == pytest.approx(plain, abs=0.006)
    assert bootstrap(values) == bootstrap(values[::-1]) and bootstrap([1.0] * 9) == [1, 1]
    assert bootstrap([0.0] * 70 + [1.0] * 30) == [0.21, 0.39], "quantiles of a binomial draw of 100 at 0.3"


def test_settings_that_can_be_read():
    text = (ROOT / "evaluate.py").read_text(encoding="utf-8")
    assert parse_settings(re.search('^settings = "(.*?)"', text, re.M)[1]) == evaluate.EVALS == PAPER
    assert parse_settings(" pass@16  T=0.7   top_p=0.95 ,") == ((16, 0.7, 0.95),)
    assert parse_settings("pass@8/1 T=2, pass@1 T=0.01") == ((8, 2, 1), (1, 2, 1), (1, 0.01, 1))


@pytest.mark.parametrize("text, said", [
    ("", "none given"), ("pass@1 T=1, pass@1 T=1.0 top_p=1", "of them twice"), ("pass@8/1/8 T=1", "twice"),
    *[(text, f"{text!r} cannot be read: write 'pass@8 T=1 top_p=1'") for text in (
        "pass@8", "pass@1/ T=1", "pass@1 T=1.1.1", "pass@1 T=1 top_k=5")],
    *[(text, f"{text!r}: k from 1, T from 0.01 to 2, top_p above 0 and at most 1") for text in (
        "pass@0 T=1", "pass@1 T=0", "pass@1 T=2.1", "pass@1 T=1 top_p=0", "pass@1 T=1 top_p=1.01")],
    ("pass@0/8 T=1", "k from 1")])
def test_settings_that_cannot_be_read_say_why(text, said):
    with pytest.raises(UserError, match="^settings: .*" + re.escape(said)):
        parse_settings(text)


class Lucky:
    """An engine whose response is right, and ends, where modulus divides its seed."""
    def __init__(self, modulus=3):
        self.modulus, self.asked, self.close = modulus, [], lambda: None

    def generate(self, dataset, rows, seeds, sampling):
        self.asked.append((list(rows), list(seeds), sampling))
        texts = [f"{seed} is luck" if seed % self.modulus else rf"\boxed{{{dataset.samples[row].answer}}}"
                 for row, seed in zip(rows, seeds)]
        return [Completion(dataset.tokenizer.encode(text), [], "stop" if text[0] == "\\" else "length")
                for text in texts]


@pytest.fixture
def ask(mixed, monkeypatch):
    """ask(evals, samples_per_problem): (what the engine was asked, rows, samples), of one process."""
    def act(evals, samples_per_problem=0):
        engine, world = Lucky(), SimpleNamespace(rank=0, world_size=1)
        monkeypatch.setattr(evaluate, "gather_json", lambda obj: [obj])
        rows, samples = evaluate.evaluate(engine, mixed, 16, 7, world, evals, samples_per_problem)
        return engine.asked, rows, samples
    return act


def test_rows_are_those_of_the_samples_and_these_of_the_settings(ask, mixed):
    asked, rows, samples = ask(PAPER)
    assert [len(seeds) for _, seeds, _ in asked] == [64, 8, 8] and len(samples) == 80
    assert len({seed for _, seeds, _ in asked for seed in seeds}) == 80, "no two responses share their luck"
    assert [sampling for _, _, sampling in asked] == [Sampling(t, p, 16) for _, t, p in PAPER]
    assert [(row["k"], row["temperature"], row["top_p"]) for row in rows] == list(PAPER)
    for row in rows:
        mine = [s for s in samples if s["setting"] == row["setting"]]
        right = [any(s["correct"] for s in mine if s["id"] == sample.id) for sample in mixed.samples]
        assert row["accuracy"] == sum(right) / 8 and row["ci95"] == wilson(sum(right), 8) and row["n"] == 8
        assert row["response_length"] == sum(s["length"] for s in mine) / len(mine)
        assert row["clip_ratio"] == sum(not s["correct"] for s in mine) / len(mine)
        assert row["judge_errors"] == 0 and row["samples_per_problem"] == row["k"]
    assert 0 < rows[1]["accuracy"] < 1 and [len(s["images"]) for s in samples[64:72]] == [1, 0, 3, 1] * 2
    assert [s["id"] for s in samples[:64:8]] == [sample.id for sample in mixed.samples]


def test_several_k_share_the_responses_of_the_largest(ask):
    asked, rows, samples = ask(((1, 1.0, 1.0), (8, 1.0, 1.0), (2, 1.0, 1.0)))
    assert asked == ask(((8, 1.0, 1.0),))[0] and {s["setting"] for s in samples} == {"pass@8 T=1 top_p=1"}
    assert [(row["k"], row["samples_per_problem"]) for row in rows] == [(1, 8), (8, 8), (2, 8)]
    right = [sum(s["correct"] for s in samples[8 * i:8 * i + 8]) for i in range(8)]
    for row in rows:
        solved = [pass_at_k(8, c, row["k"]) for c in right]
        assert row["accuracy"] == pytest.approx(sum(solved) / 8)
        assert row["ci95"] == (wilson(sum(solved), 8) if row["k"] == 8 else bootstrap(solved)), "or fractions"
    (few,), (more,) = (ask(((2, 1.0, 1.0),), samples_per_problem=n)[0] for n in (0, 6))
    assert more[0] == [row for row in range(8) for _ in range(6)]
    assert few[1] == [seed for i in range(8) for seed in more[1][6 * i:][:2]], "the same ones, and more"


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets it
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    monkeypatch.setattr(distributed, "end", torch.distributed.destroy_process_group)
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_differences_are_paired_and_splits_are_read_from_the_files_names(
        tiny_model_dir, tiny_jsonl, tmp_path, monkeypatch, capsys):
    other = str(shutil.copytree(tiny_model_dir, tmp_path / "step_000007"))
    shutil.copytree(pathlib.Path(tiny_jsonl).parent / "images", tmp_path / "images")
    splits = dict(mm_math_validation_v0="validation", text_val="validation", geometry3k_rl_v0="train",
                  constrained="test", mathvision_test="test")
    files = [shutil.copy(tiny_jsonl, f"{tmp_path}/{name}.jsonl") for name in splits]
    monkeypatch.setattr(rollout, "open_engine", lambda _, folder, *__, **___: Lucky(2 + (folder == other)))
    run_main(monkeypatch, f"--ckpt={tiny_model_dir},{other}", f"--data={','.join(files)}",
             "--settings=pass@1/2 T=1", "--samples_per_problem=4", f"--out_dir={tmp_path}/out")
    rows, samples, solved = read(tmp_path / "out/eval.jsonl"), read(tmp_path / "out/samples.jsonl"), {}
    assert [row["split"] for row in rows[:10:2]] == list(splits.values())
    for row in rows:
        right = [s["correct"] for s in samples if (s["ckpt"], s["data"]) == (row["ckpt"], row["data"])]
        ours = np.array([pass_at_k(4, sum(right[4 * i:4 * i + 4]), row["k"]) for i in range(12)])
        first = solved.setdefault((row["data"], row["k"]), ours)
        assert row["accuracy"] == ours.mean() and row["difference"] == pytest.approx((ours - first).mean())
        assert row["difference95"] == pytest.approx(bootstrap(ours - first))
        assert row["step"] == (7 if row["ckpt"] == other else None), "the folder's, of a run's checkpoint"
        assert row["epoch"] is None and row["n"] == 12
    assert len(rows) == 20 and all(row["difference"] < 0 for row in rows[10:])
    assert f"points to {tiny_model_dir}, 95% -" in capsys.readouterr().out


def test_two_equal_checkpoints_give_the_same_responses(
        tiny_model_dir, mixed_jsonl, tmp_path, monkeypatch, capsys):
    checkpoints = tiny_model_dir, str(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    run_main(monkeypatch, f"--ckpt={', '.join(checkpoints)}", f"--data={mixed_jsonl}", "--rollout=hf",
             "--settings=pass@2 T=1, pass@1 T=0.6 top_p=0.9", "--max_new_tokens=4",
             f"--out_dir={tmp_path}/out")
    printed = " ".join(capsys.readouterr().out.split())
    rows, samples = read(tmp_path / "out/eval.jsonl"), read(tmp_path / "out/samples.jsonl")
    assert [(row["ckpt"], row["k"]) for row in rows] == [(name, k) for name in checkpoints for k in (2, 1)]
    assert all(f"{row['ckpt']} {row['data']} {row['setting']} 0.0%" in printed for row in rows)
    ours, theirs = ([s["response"] for s in samples if s["ckpt"] == c] for c in checkpoints)
    assert ours == theirs and len(ours) == (2 + 1) * 8 and len(set(ours)) > 16
    assert "max_new_tokens = 4\n" in (tmp_path / "out/config.py").read_text(encoding="utf-8")


def test_user_errors_come_before_any_model(tiny_model_dir, tiny_jsonl, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    ckpt, data, out = f"--ckpt={tiny_model_dir}", f"--data={tiny_jsonl}", f"--out_dir={tmp_path / 'out'}"
    monkeypatch.setattr(distributed, "start", lambda: pytest.fail("went on"))
    for arguments, said in [
            ([data, out], "ckpt and data are needed"), ([ckpt, out], "ckpt and data are needed"),
            ([ckpt, data, f"--out_dir={tmp_path}"], "holds a run, whose eval.jsonl would be lost"),
            ([ckpt, data, out, "--samples_per_problem=4"], "config: pass@8 needs 8 responses to a problem"),
            ([ckpt, data, out, "--samples_per_problem=-1"], "samples_per_problem must be at least 0, got -1"),
            ([ckpt, data, out, "--max_new_tokens=0"], "config: max_new_tokens must be at least 1, got 0")]:
        with pytest.raises(UserError, match=re.escape(said)):
            run_main(monkeypatch, *arguments)
    assert not (tmp_path / "out").exists()

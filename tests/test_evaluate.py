"""pass@k, its intervals, the settings' grammar, and whole evaluations: several checkpoints and files in one call."""
import hashlib
import itertools
import json
import os
import pathlib
import random
import runpy
import shutil
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import distributed
import evaluate
import toy
from configurator import UserError, read_knobs
from evaluate import bootstrap, find_checkpoints, parse_settings, pass_at_k, split_names, wilson
from rollout import Completion

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = "pass@1/2/4 T=1, pass@3 T=0.6 top_p=0.9"


# ---- pass@k and intervals

def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5, "of 6 pairs, 3 hold the right one"
    assert pass_at_k(5, 2, 3) == 0.9, "of 10 threes, 1 misses both"
    assert pass_at_k(8, 0, 8) == 0 and pass_at_k(8, 1, 8) == 1 and pass_at_k(8, 5, 4) == 1


@pytest.mark.parametrize("n, k", [(n, k) for n in range(1, 8) for k in range(1, n + 1)])
def test_pass_at_k_is_the_mean_over_all_draws(n, k):
    for c in range(n + 1):
        draws = [any(draw) for draw in itertools.combinations([True] * c + [False] * (n - c), k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


def test_pass_at_k_is_exact_for_many_responses():
    assert all(pass_at_k(10_000, c, 1) == c / 10_000 for c in (0, 1, 3333, 10_000))
    assert pass_at_k(100_000, 1, 50_000) == 0.5, "numbers of 30,000 digits in between"
    assert pass_at_k(2000, 1, 1000) < pass_at_k(2000, 2, 1000) < pass_at_k(2000, 40, 1000) <= 1


def test_outcomes_are_those_of_each_problem():
    samples = [dict(correct=c) for c in (True, False, False, False, False, False, True, True, False, True, True, True)]
    assert evaluate.outcomes(samples, 4, 2).tolist() == [0.5, 5 / 6, 1.0], "1, 2 and 3 right of 4"
    assert evaluate.outcomes(samples, 4, 1).tolist() == [0.25, 0.5, 0.75]


def test_wilson_by_hand():
    assert wilson(0, 12, z=2) == pytest.approx([0, 4 / 16]), "z^2 / (n + z^2)"
    assert wilson(5, 10, z=2) == pytest.approx([0.5 - 14 ** 0.5 / 14, 0.5 + 14 ** 0.5 / 14])


def test_bootstrap_is_the_plain_one_and_always_the_same():
    values = np.random.default_rng(3).integers(0, 5, 80) / 4
    rng = np.random.default_rng(7)
    plain = np.quantile([rng.choice(values, 80).mean() for _ in range(10_000)], [0.025, 0.975])
    assert bootstrap(values) == pytest.approx(plain, abs=0.006)
    assert bootstrap(values) == bootstrap(values[::-1]) == bootstrap(values.copy())
    assert bootstrap([0.0] * 70 + [1.0] * 30) == [0.21, 0.39], "the quantiles of a binomial draw of 100 at 0.3"
    assert bootstrap([1.0] * 9) == [1, 1] and bootstrap([0.25]) == [0.25, 0.25]


def test_bootstrap_intervals_hold_the_truth_in_about_95_of_100():
    """Problems of unlike difficulty, 4 responses to each: the mean over all problems that could have been drawn is 0.4."""
    rng, held = np.random.default_rng(5), 0
    for _ in range(400):
        low, high = bootstrap(rng.binomial(4, rng.beta(2, 3, 100)) / 4, resamples=1000)
        held += low <= 0.4 <= high
    assert 0.92 <= held / 400 <= 0.975, held / 400


def test_bootstrap_fits_in_memory():
    values = np.random.default_rng(0).random(2000)  # all distinct: 160 MB at once
    tracemalloc.start()
    low, high = bootstrap(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6 and 0.02 < high - low < 0.03  # 2 x 1.96 x 0.289 / sqrt(2000) = 0.025


# ---- settings

def test_the_default_settings_are_the_papers():
    default = read_knobs(str(ROOT / "evaluate.py"))[0]["settings"]
    assert parse_settings(default) == evaluate.EVALS == ((8, 1.0, 1.0), (1, 0.6, 1.0), (1, 0.01, 0.001))


@pytest.mark.parametrize("text, samples, expected", [
    ("pass@1 T=1", 0, ((1, 1.0, 1.0),)),
    (" pass@16  T=0.7   top_p=0.95 ,", 16, ((16, 0.7, 0.95),)),
    ("pass@8/1/64 T=1e-1", 64, (((8, 1, 64), 0.1, 1.0),)),
    ("pass@1 T=1, pass@4 T=1", 9, ((1, 1.0, 1.0), (4, 1.0, 1.0))),
])
def test_settings_that_can_be_read(text, samples, expected):
    assert parse_settings(text, samples) == expected


@pytest.mark.parametrize("text, samples, words", [
    ("", 0, ["none given", "pass@8 T=1 top_p=1"]),
    ("pass@8", 0, ["'pass@8' cannot be read"]),
    ("pass@8 top_p=1 T=1", 0, ["cannot be read"]),
    ("pass@x T=1", 0, ["'pass@x T=1' cannot be read"]),
    ("pass@1/ T=1", 0, ["cannot be read"]),
    ("pass@1 T=warm", 0, ["cannot be read"]),
    ("pass@1 T=1 top_p=1 top_k=5", 0, ["cannot be read"]),
    ("pass@1 T=1, pass@0 T=0.6", 0, ["'pass@0 T=0.6'", "k must be at least 1, got 0"]),
    ("pass@1 T=0", 0, ["T must be between 0.01 and 2, got 0", "greedy"]),
    ("pass@1 T=-1", 0, ["T must be", "got -1"]),
    ("pass@1 T=nan", 0, ["T must be"]),
    ("pass@1 T=1 top_p=0", 0, ["top_p must be above 0 and at most 1, got 0"]),
    ("pass@1 T=1 top_p=1.01", 0, ["top_p must be", "got 1.01"]),
    ("pass@1 T=1, pass@1 T=1.0 top_p=1", 0, ["pass@1 T=1 top_p=1 is there twice"]),
    ("pass@8/1/8 T=1", 0, ["pass@8 T=1 top_p=1 is there twice"]),
    ("pass@1/8 T=1", 7, ["needs 8 responses", "samples_per_problem=7"]),
])
def test_settings_that_cannot_be_read_say_why(text, samples, words):
    with pytest.raises(UserError) as error:
        parse_settings(text, samples)
    message = str(error.value)
    assert message.startswith("settings:") and "\n" not in message and all(word in message for word in words), message


# ---- evaluate(): what it asks the engine for, and what it makes of the answers

class Engine:
    """Answers with the last digit of the seed, and writes down what it was asked for."""

    def __init__(self):
        self.asked = []

    def generate(self, dataset, indices, seeds, sampling):
        self.asked.append([list(indices), list(seeds), list(sampling)])
        return [Completion([s % 10], [0.0], "stop" if s % 3 else "length") for s in seeds]


class Problems:
    samples = [SimpleNamespace(id=f"q{i}", answer=str(i), question=f"{i}?", image="x.png") for i in range(5)]

    def __len__(self):
        return len(self.samples)


@pytest.fixture
def alone():
    """A process group of one, which evaluate() gathers over."""
    started = not dist.is_initialized()
    if started:
        distributed.start()
    yield
    if started:
        dist.destroy_process_group()


def ask(evals, samples=0):
    """(what the engine was asked for, rows, samples)"""
    engine, tokenizer = Engine(), SimpleNamespace(decode=lambda ids, **_: f"\\boxed{{{ids[0]}}}")
    world = distributed.World(0, 1, 0, 1, None, torch.device("cpu"))
    return engine.asked, *evaluate.evaluate(engine, Problems(), tokenizer, 16, 0, world, evals, samples)


def test_default_requests_are_those_of_the_published_results(alone):
    """results/ was made with these seeds: any other key for them is another evaluation."""
    asked, rows, samples = ask(evaluate.EVALS)
    assert asked[0][1][:2] == [2093272613015177829, 5894786866628258335]
    assert asked[1][1][0] == 8502089838642838399 and asked[2][1][4] == 6969111278238651125
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] == "5a7c149245d50136"
    assert hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:16] == "93447c3f23b32e1a"
    assert [(r["setting"], r["accuracy"], r["n"], r["samples_per_problem"], r["clip_ratio"]) for r in rows] == [
        ("pass@8 T=1 top_p=1", 0.4, 5, 8, 0.35), ("pass@1 T=0.6 top_p=1", 0.0, 5, 1, 0.4),
        ("pass@1 T=0.01 top_p=0.001", 0.4, 5, 1, 0.4)]
    assert all(row["ci95"] == wilson(round(5 * row["accuracy"]), 5) for row in rows)
    assert [row["bootstrap95"] for row in rows] == [[0, 0.8], [0, 0], [0, 0.8]]


def test_several_k_share_the_responses_of_the_largest(alone):
    several, rows, samples = ask([((1, 8, 2), 1.0, 1.0)])
    assert several == ask([(8, 1.0, 1.0)])[0]
    assert [row["k"] for row in rows] == [1, 8, 2] and {row["samples_per_problem"] for row in rows} == {8}
    assert {s["setting"] for s in samples} == {"pass@8 T=1 top_p=1"} and len(samples) == 40
    right = [[s["correct"] for s in samples[8 * i:8 * i + 8]] for i in range(5)]
    for row in rows:
        draws = [any(draw) for of_problem in right for draw in itertools.combinations(of_problem, row["k"])]
        assert row["accuracy"] == pytest.approx(sum(draws) / len(draws))
    assert rows[0]["ci95"] == rows[0]["bootstrap95"] != wilson(1, 5), "fractions: Wilson does not apply"
    assert rows[1]["ci95"] == wilson(2, 5) != rows[1]["bootstrap95"], "any of all is 0 or 1"


def test_more_samples_begin_with_the_same_responses(alone):
    (indices, seeds, _), = ask([(2, 1.0, 1.0)])[0]
    (more_indices, more_seeds, _), = ask([(2, 1.0, 1.0)], samples=6)[0]
    assert more_indices == [i for i in range(5) for _ in range(6)] and len(set(more_seeds)) == 30
    assert seeds == [s for i in range(5) for s in more_seeds[6 * i:6 * i + 2]]


# ---- checkpoints and files

def test_checkpoints_of_a_folder_come_in_order_with_their_steps(tiny_model_dir, tmp_path):
    for name in ("step_10", "step_9", "step_000100", "step_11.partial"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{tiny_model_dir}/config.json", tmp_path / name)
    (tmp_path / "latest").symlink_to("step_000100")
    assert [(name, step) for name, _, step in find_checkpoints([f"{tmp_path}/"])] == [
        (f"{tmp_path}/step_9", 9), (f"{tmp_path}/step_10", 10), (f"{tmp_path}/step_000100", 100)]
    assert find_checkpoints([f"{tmp_path}/latest/"]) == [(f"{tmp_path}/latest", f"{tmp_path}/latest", 100)]
    assert find_checkpoints([tiny_model_dir]) == [(tiny_model_dir, tiny_model_dir, None)]
    with pytest.raises(UserError, match=r"latest is the same folder as .*step_000100, keep one"):
        find_checkpoints([str(tmp_path), f"{tmp_path}/latest"])


def test_one_engine_for_checkpoints_that_differ_in_values_alone(tiny_model_dir, tiny_qwen2_dir, tmp_path):
    def changed(name, **values):
        shutil.copytree(tiny_model_dir, tmp_path / str(len(os.listdir(tmp_path))))
        path = max(tmp_path.iterdir(), key=lambda p: int(p.name)) / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
        return evaluate.engine_needs(path.parent)
    needs = evaluate.engine_needs(tiny_model_dir)
    assert changed("config.json", dtype="bfloat16") == needs
    assert changed("config.json", rms_norm_eps=0.1) != needs and changed("generation_config.json", eos_token_id=[3]) != needs
    assert changed("tokenizer_config.json", chat_template="") != needs != evaluate.engine_needs(tiny_qwen2_dir)


def test_all_that_is_stored_goes_to_the_engine_but_a_head_that_is_tied(tiny_model_dir, tiny_qwen2_dir, tmp_path):
    """A tied head is the embedding: a stored one, whatever it holds, must not overwrite that."""
    shutil.copytree(tiny_model_dir, tmp_path / "tied")
    tensors = load_file(f"{tiny_model_dir}/model.safetensors")
    embedding = next(t for name, t in tensors.items() if "embed_tokens" in name)
    save_file(tensors | {"lm_head.weight": 0 * embedding}, tmp_path / "tied/model.safetensors", metadata={"format": "pt"})
    names = {name for name, _ in evaluate.stored_weights(tmp_path / "tied")}
    assert names == {name for name, _ in evaluate.stored_weights(tiny_model_dir)} and "lm_head.weight" not in names
    assert len(names) == len(tensors) and any(name.startswith("visual.blocks.1") for name in names)
    assert "lm_head.weight" in dict(evaluate.stored_weights(tiny_qwen2_dir))


@pytest.mark.parametrize("split, expected", [
    ("", ["validation", "train", "train", "test"]), ("validation", ["validation"] * 4),
    ("test, train,test,validation", ["test", "train", "test", "validation"])])
def test_split_is_given_or_read_from_the_files_names(split, expected):
    paths = ["train/text_val.jsonl", "data/toy/train.jsonl", "a/geometry3k_rl_v0.jsonl", "val/mm_math_test_v0.jsonl"]
    assert split_names(paths, split) == expected
    assert split_names(["constrained_test.jsonl", "retrieval.jsonl", "my-val.jsonl"], "") == ["test", "test", "validation"]


def test_a_training_run_is_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="holds a training run, its eval.jsonl would be lost"):
        run_main(monkeypatch, "--ckpt=a", "--data=b", f"--out_dir={tmp_path}")


@pytest.mark.parametrize("split", ["val", "train,test", "train,test,valid"])
def test_a_split_that_is_none_is_an_error(split):
    with pytest.raises(UserError, match=f"one for each of the 3, got '{split}'"):
        split_names(["a", "b", "c"], split)


def run_main(monkeypatch, *arguments):
    """evaluate.py in this process, up to where it would start an engine."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets it
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    monkeypatch.setattr(distributed, "start", lambda: pytest.fail("went on to load the model"))
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def test_user_errors_come_before_any_model(tiny_model_dir, tiny_jsonl, tmp_path, monkeypatch):
    for name in ("bad", "worse"):
        (tmp_path / f"{name}.jsonl").write_text("not json\n[]\n", encoding="utf-8")
    ckpt, data = f"--ckpt={tiny_model_dir}", f"--data={tiny_jsonl}"
    for arguments, words in [
        ([data], ["ckpt is empty"]), ([ckpt], ["data is empty"]),
        ([ckpt, data, "--samples_per_problem=4"], ["pass@8 T=1 top_p=1", "samples_per_problem=4"]),
        ([ckpt, data, "--samples_per_problem=-1"], ["samples_per_problem must be at least 0"]),
        ([ckpt, data, "--settings=greedy"], ["'greedy' cannot be read"]),
        ([ckpt, data, "--split=val"], ["got 'val'"]),
        ([ckpt, "--data", tiny_jsonl, tiny_jsonl], ["tiny.jsonl is there twice"]),
        (["--ckpt", tiny_model_dir, tiny_model_dir, data], ["is the same folder as"]),
        (["--ckpt", tiny_model_dir, str(tmp_path), data], ["config.json cannot be read"]),
        ([ckpt, "--data", f"{tmp_path}/bad.jsonl", tiny_jsonl, f"{tmp_path}/worse.jsonl", f"{tmp_path}/none.jsonl"],
         ["bad.jsonl:1", "bad.jsonl:2", "worse.jsonl:1", "worse.jsonl:2", "none.jsonl: no such file"]),
    ]:
        with pytest.raises(UserError) as error:
            run_main(monkeypatch, *arguments, f"--out_dir={tmp_path / 'out'}")
        assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


# ---- whole evaluations

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of toy_base as step 9; all its weights moved as step 10; those with the tower of step 9 as step 11."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (9, 10, 11):
        shutil.copytree(ROOT / "toy_base", folder / f"step_{step:06d}")
    generator = torch.Generator().manual_seed(0)
    old = load_file(ROOT / "toy_base/model.safetensors")
    new = {name: t.float() * (1 + 0.05 * torch.randn(t.shape, generator=generator)) for name, t in old.items()}
    mixed = {name: old[name].float() if "visual" in name else t for name, t in new.items()}
    assert any("visual" in name for name in old)
    for step, tensors in ((10, new), (11, mixed)):
        save_file(tensors, folder / f"step_{step:06d}/model.safetensors", metadata={"format": "pt"})
    (folder / "latest").symlink_to("step_000011")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """16 and 6 problems of the toy: val.jsonl and test.jsonl."""
    folder, rng = tmp_path_factory.mktemp("toy_problems"), random.Random(0)
    (folder / "images").mkdir()
    for split, size in (("val", 16), ("test", 6)):
        families, rows = toy.TEST_FAMILIES if split == "test" else toy.TRAIN_FAMILIES, []
        for i in range(size):
            numbers, question, image = toy.problem(families[i % len(families)], split, rng)
            family = families[i % len(families)]
            rows.append((question, toy.steps(family, numbers)[-1][3], toy.solution(family, numbers), image))
        toy.save_rows(str(folder), split, rows)
    return [str(folder / "val.jsonl"), str(folder / "test.jsonl")]


def command(out_dir, files, *ckpt, ranks=1):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "evaluate.py", "--ckpt", *map(str, ckpt), "--data", *files, f"--settings={SETTINGS}",
            "--samples_per_problem=4", "--rollout=hf", "--max_new_tokens=64", f"--out_dir={out_dir}"]


def launch(*arguments, **keywords):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command(*arguments, **keywords), cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=env | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def curve(checkpoints, files, tiny_qwen2_dir, tmp_path_factory):
    """(out_dir, stdout): three checkpoints of a run by one engine, then another architecture by another."""
    out_dir = tmp_path_factory.mktemp("curve")
    return out_dir, launch(out_dir, files, checkpoints, tiny_qwen2_dir)


def test_rows_are_as_promised_and_the_samples_say_the_same(curve, checkpoints, files, tiny_qwen2_dir):
    rows, samples = read(curve[0], "eval"), read(curve[0], "samples")
    names = [f"{checkpoints}/step_{step:06d}" for step in (9, 10, 11)] + [tiny_qwen2_dir]
    settings = [f"pass@{k} T=1 top_p=1" for k in (1, 2, 4)] + ["pass@3 T=0.6 top_p=0.9"]
    assert [(row["ckpt"], row["data"], row["setting"]) for row in rows] == list(itertools.product(names, files, settings))
    assert [row["step"] for row in rows[::8]] == [9, 10, 11, None] and {row["epoch"] for row in rows} == {None}
    assert {(row["data"], row["split"], row["n"]) for row in rows} == {(files[0], "validation", 16), (files[1], "test", 6)}
    assert len(samples) == 4 * 2 * 22 * 4 and all(s["step"] == 9 for s in samples[:2 * 22 * 4])
    solved = {}  # by the slow way, from what is on disk
    for row in rows:
        largest = row["setting"].replace("@1 ", "@4 ").replace("@2 ", "@4 ")
        right = [s["correct"] for s in samples
                 if (s["ckpt"], s["data"], s["setting"]) == (row["ckpt"], row["data"], largest)]
        problems = [right[i:i + 4] for i in range(0, len(right), 4)]
        draws = [[any(draw) for draw in itertools.combinations(problem, row["k"])] for problem in problems]
        solved[row["ckpt"], row["data"], row["setting"]] = np.array([sum(d) / len(d) for d in draws])
    for row in rows:
        ours = solved[row["ckpt"], row["data"], row["setting"]]
        first = solved[names[0], row["data"], row["setting"]]
        assert row["accuracy"] == pytest.approx(ours.mean()) and row["samples_per_problem"] == 4 and len(ours) == row["n"]
        if row["ckpt"] == names[0]:
            assert row["difference"] is None and row["difference95"] is None
        else:
            assert row["difference"] == pytest.approx((ours - first).mean())
            assert row["difference95"] == pytest.approx(bootstrap(ours - first))
    assert sum(0 < row["accuracy"] < 1 for row in rows) > 12 and len({row["difference"] for row in rows}) > 4


def test_the_table_at_the_end_is_aligned_and_has_every_row(curve):
    rows, table = read(curve[0], "eval"), curve[1].rpartition("\n\n")[2].splitlines()
    assert len(table) == 1 + len(rows) and table[0].split()[:3] == ["checkpoint", "data", "setting"]
    for name in ("accuracy", "n", "samples", "length", "clipped", "difference"):
        assert name in table[0].split()
    for line, row in zip(table[1:], rows):
        assert line.index(row["setting"]) == table[0].index("setting")
        assert f" {row['accuracy']:.1%}  " in line and f"{row['n']}        4" in line
        assert (row["difference"] is None) or f" {100 * row['difference']:+.1f}  " in line
    assert curve[1].count("reflection_ratio ") == 4 * 2 * 2, "for each checkpoint, file and setting"


def test_a_checkpoint_has_the_same_rows_in_any_company(curve, checkpoints, files, tiny_qwen2_dir, tmp_path):
    """Here each opens an engine of its own; in the curve the weights of step 10, tower included, went into step 9's."""
    names = [tiny_qwen2_dir, f"{checkpoints}/step_000010"]
    launch(tmp_path, files, *names)
    for kind, size in (("eval", 2 * 4), ("samples", 2 * 22 * 4)):
        alone, together = ([{k: v for k, v in row.items() if not k.startswith("difference")} for row in read(folder, kind)]
                           for folder in (tmp_path, curve[0]))
        for name in names:
            mine = [row for row in alone if row["ckpt"] == name]
            assert len(mine) == size and mine == [row for row in together if row["ckpt"] == name], (kind, name)
    responses = {step: [s["response"] for s in read(curve[0], "samples") if s["step"] == step] for step in (9, 10, 11)}
    assert responses[9] != responses[10] != responses[11], "the language model's weights, the tower's weights: both tell"


def test_nothing_depends_on_the_ranks(curve, checkpoints, files, tiny_qwen2_dir, tmp_path):
    launch(tmp_path, files, checkpoints, tiny_qwen2_dir, ranks=2)
    assert read(tmp_path, "eval") == read(curve[0], "eval") and read(tmp_path, "samples") == read(curve[0], "samples")


def test_a_call_that_is_killed_keeps_what_it_has(curve, checkpoints, files, tmp_path):
    """Killed as its first setting is printed, long before the last."""
    process = subprocess.Popen(command(tmp_path, files, checkpoints), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert any("pass@4 T=1 top_p=1 " in line and "%" in line for line in process.stdout)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    rows, samples = read(tmp_path, "eval"), read(tmp_path, "samples")
    assert 3 <= len(rows) < 24 and rows == read(curve[0], "eval")[:len(rows)]
    assert 64 <= len(samples) < 528 and samples == read(curve[0], "samples")[:len(samples)]

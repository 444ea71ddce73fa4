"""Numbers that are not finite, wherever they come from: that update is left out, and only that; and the health warnings."""
import json
import math
import sys

import pytest
from test_runs import TORCHRUN, finish, launch, metrics_of, read

from health import Health

UPDATES = 2  # a step, of 4 responses each; 3 steps


@pytest.fixture(scope="module")
def run(tiny_model_dir, tiny_jsonl, tmp_path_factory):
    """run(hook, *knobs): the folder of a run with that hook, which must finish; each is made once."""
    done = {}

    def start(hook, *extra, launcher=(sys.executable,)):
        key = (hook, *extra, *launcher)
        if key not in done:
            out_dir = tmp_path_factory.mktemp("numbers")
            command = [*launcher, "tests/patched_run.py", f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}",
                       "--rollout=hf", "--batch_size=8", "--minibatch_size=4", "--max_new_tokens=32", "--max_steps=3",
                       "--eval_every_epochs=0", "--learning_rate=1e-3", "--activation_checkpointing=False", "--seed=3",
                       "--no_eos_score=0", "--language_reward_coeff=1", f"--out_dir={out_dir}", *extra]
            done[key] = finish(command, NANOMAYE_HOOK=hook), out_dir
        return done[key]
    return start


def weights(out_dir):
    return (out_dir / "checkpoints" / "latest" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("hook", ["nan:4", "nan_gradient:4"])
def test_the_weights_are_those_of_the_update_left_out(run, hook):
    """The fourth update, the second of step 2, has a NaN: everything after it is as if the optimizer had not been called."""
    (done, ours), (_, theirs), (_, sound) = run(hook), run("left_out:4"), run("left_out:99")
    assert weights(ours) == weights(theirs) != weights(sound)
    assert [row["policy/skipped"] for row in read(ours / "metrics.jsonl")] == [0, 1, 0]
    assert [row["policy/updates"] for row in read(ours / "metrics.jsonl")] == [2, 1, 2]
    assert read(ours / "samples.jsonl") == read(theirs / "samples.jsonl"), "training went on, with the same responses"
    assert done.stdout.count("update SKIPPED") == 1
    rows = read(ours / "skipped.jsonl")
    assert [(row["step"], row["update"], row["not_finite"]) for row in rows] == [(2, 2, [])] * 4
    sampled = [row for row in read(ours / "samples.jsonl") if row["step"] == 2][4:]
    assert [(row["id"], row["response"]) for row in rows] == [(row["id"], row["response"]) for row in sampled]
    assert all((row["loss"] is None) == (hook == "nan:4") and row["grad_norm"] is None for row in rows)


@pytest.mark.parametrize("hook, name, extra", [
    ("nan_reward:11", "scores", []),
    ("nan_old:4", "logprobs", ["--kl_reward_coeff=0.01"]), ("nan_old:5", "ref_logprobs", [])])
def test_one_bad_row_spoils_its_own_minibatch_and_no_other(run, hook, name, extra):
    """A NaN reward or log-probability of step 2 does not reach the other minibatch through the whitening."""
    _, out_dir = run(hook, *extra)
    metrics = read(out_dir / "metrics.jsonl")
    assert [(row["policy/updates"], row["policy/skipped"]) for row in metrics] == [(2, 0), (1, 1), (2, 0)]
    rows = read(out_dir / "skipped.jsonl")
    assert sorted(row["not_finite"] for row in rows) == [[], [], [], [name]] and {row["step"] for row in rows} == {2}
    assert metrics[1]["policy/loss"] is not None and metrics[2]["policy/loss"] is not None
    assert "NaN" not in (out_dir / "metrics.jsonl").read_text() + (out_dir / "samples.jsonl").read_text()
    if name == "scores":
        assert metrics[1]["train/score"] is None and rows[[row["not_finite"] for row in rows].index([name])]["score"] is None


def test_two_ranks_leave_out_the_same_update(run):
    _, out_dir = run("nan:4", launcher=(*TORCHRUN,))
    assert [row["policy/skipped"] for row in read(out_dir / "metrics.jsonl")] == [0, 1, 0]
    assert len(read(out_dir / "skipped.jsonl")) == 4


def test_a_run_of_skipped_updates_stops_with_its_samples(tiny_model_dir, tiny_jsonl, tmp_path):
    command = [sys.executable, "tests/patched_run.py", f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}",
               "--rollout=hf", "--batch_size=8", "--minibatch_size=4", "--max_new_tokens=16", "--max_steps=9",
               "--eval_every_epochs=0", "--activation_checkpointing=False", f"--out_dir={tmp_path}",
               "--max_skipped_updates=3", "--save_every_steps=1"]
    done = launch(command, NANOMAYE_HOOK="nan:0")
    assert done.returncode == 2
    assert "step 2: 3 updates in a row were skipped" in done.stderr.splitlines()[-1]
    assert f"{tmp_path}/skipped.jsonl" in done.stderr.splitlines()[-1]
    assert len(read(tmp_path / "skipped.jsonl")) == 12 and len(metrics_of(tmp_path)) == 1
    row = metrics_of(tmp_path)[0]
    assert row["policy/skipped"] == 2 and row["policy/updates"] == 0 and row["policy/loss"] is None
    # the count goes on over a resume: one more is the third in a row again
    again = launch([*command, "--init_from=resume"], NANOMAYE_HOOK="nan:0")
    assert again.returncode == 2 and "step 2: 3 updates in a row" in again.stderr
    assert len(read(tmp_path / "skipped.jsonl")) == 12, "those after the checkpoint stand once"


# ---------------------------------------------------------------------------------------------------------------------

def rows(n=8, **last):
    sound = {"response/clip_ratio": 0.1, "train/accuracy": 0.5, "policy/entropy": 0.5, "rollout/logprob_diff": 0.005,
             "policy/grad_norm": 1.0}
    made = [{"step": i + 1, **sound} for i in range(n)]
    made[-1] |= {key.replace("_", "/", 1): value for key, value in last.items()}
    return made


def warned(metrics):
    health = Health([])
    return [line for row in metrics for line in health.check(row)]


@pytest.mark.parametrize("last, said", [
    (dict(response_clip_ratio=0.51), ["51% of the responses were cut", "max_new_tokens", "samples.jsonl"]),
    (dict(train_accuracy=0.0), ["no response was right", "judge/errors"]),
    (dict(train_accuracy=1.0), ["every response was right", "eval.jsonl"]),
    (dict(policy_entropy=0.049), ["fell to 0.049", "learning_rate"]),
    (dict(policy_grad_norm=10.1), ["10.1, over ten times its median 1", "clip_grad_norm"])])
def test_each_warning_names_the_step_and_what_to_look_at(last, said):
    line, = warned(rows(**last))
    assert line.startswith("health, step 8: ") and all(part in line for part in said)
    assert warned(rows(**last) + rows(**last)) == [line], "once in a run"
    for key, value in last.items():
        assert warned(rows(**{key: {0.51: 0.5, 0.0: 0.01, 1.0: 0.99, 0.049: 0.051, 10.1: 9.9}[value]})) == []
    health = Health(rows(**last))
    assert health.check(rows(**last)[-1]) == [], "a run that goes on does not say it again"


def test_a_rising_difference_between_trainer_and_engine():
    steady = rows(20)
    assert warned(steady) == []
    for i, row in enumerate(steady[8:]):
        row["rollout/logprob_diff"] = 0.005 * 1.3**i
    line, = warned(steady)
    assert "rollout/logprob_diff rose from 5.0e-03" in line
    for row in steady:
        row["rollout/logprob_diff"] /= 1000
    assert warned(steady) == [], "far below what matters"


def test_null_is_no_reason_and_the_first_steps_are_only_looked_at():
    empty = [{"step": i, **dict.fromkeys(rows()[0].keys() - {"step"})} for i in range(9)]
    assert warned(empty) == [] and warned([{"step": 1}]) == []
    assert warned(rows(3, policy_grad_norm=100.0)) == [] and warned(rows(3, policy_entropy=0.001)) == []


def test_sound_runs_are_not_warned_about():
    for i in range(3):
        assert warned(read(f"results/toy-{i}/metrics.jsonl")) == []


def test_sft_leaves_out_an_update_as_well(tiny_model_dir, tiny_jsonl, tmp_path):
    """A learning rate that drives the weights to infinity: from then on every update is left out, and the run stops."""
    done = launch([sys.executable, "train_sft.py", f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}", "--val_data=",
                   "--batch_size=4", "--max_steps=30", "--eval_every_epochs=0", "--learning_rate=1e30",
                   "--clip_grad_norm=0", f"--out_dir={tmp_path}", "--max_skipped_updates=3", "--warmup_ratio=0"])
    assert done.returncode == 2 and "3 updates in a row were skipped" in done.stderr.splitlines()[-1], done.stderr[-2000:]
    skipped = read(tmp_path / "skipped.jsonl")
    assert len(skipped) == 12 and {"id", "question", "solution", "loss", "grad_norm"} <= skipped[0].keys()
    metrics = read(tmp_path / "metrics.jsonl")
    assert [row["policy/skipped"] for row in metrics[-2:]] == [1, 1] and metrics[-1]["policy/loss"] is None
    assert all(math.isfinite(value) for row in metrics for value in row.values() if value is not None)
    assert "NaN" not in json.dumps(metrics)

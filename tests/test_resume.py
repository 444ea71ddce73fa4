"""A run that is stopped or killed, wherever, and goes on: it leaves the files of one that was not. Checkpoints on disk."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from test_runs import ROOT, TORCHRUN, finish, launch, metrics_of, read

import checkpoint
import distributed
import logs
from configurator import UserError

KILLS = int(os.environ.get("NANOMAYE_KILLS", 4))  # of the run that is killed at random moments; 20 were tried


@pytest.fixture
def world():
    yield distributed.start()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def rl(tiny_model_dir, tiny_jsonl):
    """6 steps of 4 updates; 3 evaluations of 12 problems. 12 rows make an epoch of one step of 8."""
    return ["train_rl.py", f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}", f"--val_data={tiny_jsonl}",
            "--rollout=hf", "--batch_size=8", "--minibatch_size=2", "--max_new_tokens=24", "--max_steps=6",
            "--eval_every_epochs=3", "--learning_rate=1e-3", "--activation_checkpointing=False", "--save_every_steps=1",
            "--keep_checkpoints=2"]


@pytest.fixture(scope="module")
def sft(tiny_model_dir, tiny_jsonl):
    return ["train_sft.py", f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}", f"--val_data={tiny_jsonl}",
            "--rollout=hf", "--batch_size=4", "--max_new_tokens=24", "--max_steps=7", "--eval_every_epochs=2",
            "--learning_rate=1e-3", "--activation_checkpointing=False", "--save_every_steps=2"]


@pytest.fixture(scope="module")
def unbroken(rl, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("unbroken")
    finish([sys.executable, *rl, f"--out_dir={out_dir}"])
    return out_dir


@pytest.fixture(scope="module")
def unbroken_sft(sft, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("unbroken_sft")
    finish([sys.executable, *sft, f"--out_dir={out_dir}"])
    return out_dir


def same_files(ours, theirs):
    """The three logs are equal, times and memory aside; what is not a time is equal byte for byte."""
    assert metrics_of(ours) == metrics_of(theirs)
    for name in ("eval", "samples"):
        assert (ours / f"{name}.jsonl").read_bytes() == (theirs / f"{name}.jsonl").read_bytes(), name


def all_load(out_dir):
    """Every folder that is a checkpoint by its name is whole."""
    for _, _, folder in checkpoint.checkpoints_of(out_dir):
        assert json.loads((folder / "trainer" / "state.json").read_text())["files"]
        for path in [*folder.glob("*.safetensors"), *folder.glob("trainer/*.safetensors")]:
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())


def signal_at(script, where, n, number=signal.SIGTERM):
    """A command that runs the script and sends itself the signal when it calls `where` for the n-th time."""
    code = f"""
import os, runpy, sys
import torch
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
import checkpoint, rollout
calls = 0
def hooked(act):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == {n}:
            os.kill(os.getpid(), {int(number)})
        return act(*args, **kwargs)
    return wrapped
if {where!r} == "update": torch.optim.AdamW.step = hooked(torch.optim.AdamW.step)
if {where!r} == "draw": rollout.draw = hooked(rollout.draw)
if {where!r} == "publish": checkpoint.publish = hooked(checkpoint.publish)
if {where!r} == "rename": checkpoint.pathlib.Path.rename = hooked(checkpoint.pathlib.Path.rename)
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
"""
    return [sys.executable, "-c", code, script]


@pytest.mark.parametrize("where, n, left", [
    ("update", 10, "step_000002_update_0002"),      # the update is finished, the step is not
    ("update", 12, "step_000003"),                  # the last update of a step: then the step is finished as well
    ("draw", 5, "step_000000"),                     # the evaluation before the first step: it begins anew
    ("draw", 110, None)])                           # while responses are sampled: the step begins anew
def test_a_run_that_is_told_to_stop_goes_on_as_if_it_never_had(rl, unbroken, tmp_path, where, n, left):
    stopped = launch([*signal_at("train_rl.py", where, n), *rl[1:], f"--out_dir={tmp_path}"])
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr[-2000:]
    assert "stopped by signal 15; --init_from=resume goes on" in stopped.stdout.splitlines()[-1]
    latest = (tmp_path / "checkpoints" / "latest").resolve()
    assert left is None or latest.name == left
    all_load(tmp_path)
    done = finish([sys.executable, *rl, f"--out_dir={tmp_path}", "--init_from=resume"])
    assert f"goes on from {latest}" in done.stdout
    same_files(tmp_path, unbroken)
    # and its last weights are those of the unbroken run, bit for bit
    names = [folder / "checkpoints" / "latest" / "model.safetensors" for folder in (tmp_path, unbroken)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_run_stopped_within_a_step_goes_on_with_other_ranks(rl, unbroken, tmp_path):
    stopped = launch([*signal_at("train_rl.py", "update", 10), *rl[1:], f"--out_dir={tmp_path}"])
    assert stopped.returncode == 143
    finish([*TORCHRUN, *rl, f"--out_dir={tmp_path}", "--init_from=resume"])
    assert read(tmp_path / "samples.jsonl") == read(unbroken / "samples.jsonl")
    for ours, theirs in zip(metrics_of(tmp_path), metrics_of(unbroken), strict=True):
        for key, value in theirs.items():
            assert ours[key] == value if value is None else ours[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_two_ranks_stop_together_and_go_on_as_one(rl, unbroken, tmp_path):
    """torchrun gets the SIGTERM, as from a scheduler, and hands it on to both."""
    with subprocess.Popen([*TORCHRUN, *rl, f"--out_dir={tmp_path}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        wait_for(lambda: lines(tmp_path / "metrics.jsonl") >= 2, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode and "stopped by signal 15" in out, err[-2000:]
    assert 2 <= lines(tmp_path / "metrics.jsonl") < 6
    all_load(tmp_path)
    finish([sys.executable, *rl, f"--out_dir={tmp_path}", "--init_from=resume"])
    assert read(tmp_path / "samples.jsonl") == read(unbroken / "samples.jsonl")
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_a_run_killed_at_random_moments_leaves_the_files_of_one_that_was_not(rl, unbroken, tmp_path):
    """SIGKILL at KILLS moments: some time after a step was logged, or while a checkpoint is being written."""
    rng, kills, in_saves, rounds = random.Random(0), 0, 0, 1
    out_dir = tmp_path / "1"
    while kills < KILLS:
        command = [sys.executable, *rl, f"--out_dir={out_dir}", "--init_from=resume"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            if rng.random() < 0.6:  # a save of a random step to come
                wait_for(lambda out_dir=out_dir: any(out_dir.glob("checkpoints/*.partial")), process)
                time.sleep(rng.random() * 0.15)
            else:
                seen = lines(out_dir / "metrics.jsonl")
                wait_for(lambda seen=seen, out_dir=out_dir: lines(out_dir / "metrics.jsonl") != seen, process)
                time.sleep(rng.random() * 0.8)
            in_saves += any(out_dir.glob("checkpoints/*.partial"))
            process.kill()
            process.wait()
        kills += 1
        all_load(out_dir)
        if kills == KILLS or lines(out_dir / "metrics.jsonl") == 6:  # nothing left to kill: once more from the start
            finish(command)
            same_files(out_dir, unbroken)
            rounds, out_dir = rounds + 1, tmp_path / str(rounds + 1)
    print(f"{kills} kills of {rounds - 1} runs, {in_saves} of them within a save")


@pytest.mark.parametrize("where, n, number", [("publish", 2, signal.SIGKILL), ("rename", 3, signal.SIGKILL),
                                              ("update", 4, signal.SIGTERM), ("draw", 150, signal.SIGTERM)])
def test_sft_goes_on_as_if_it_never_had_stopped(sft, unbroken_sft, tmp_path, where, n, number):
    stopped = launch([*signal_at("train_sft.py", where, n, number), *sft[1:], f"--out_dir={tmp_path}"])
    assert stopped.returncode == (143 if number == signal.SIGTERM else -9), stopped.stderr[-2000:]
    all_load(tmp_path)
    finish([sys.executable, *sft, f"--out_dir={tmp_path}", "--init_from=resume"])
    same_files(tmp_path, unbroken_sft)


def test_a_finished_run_has_nothing_left_to_do_and_can_be_made_longer(sft, unbroken_sft, tmp_path):
    import shutil
    shutil.copytree(unbroken_sft, tmp_path / "run", symlinks=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = [sys.executable, *sft, f"--out_dir={tmp_path / 'run'}", "--init_from=resume"]
    assert "nothing left to do: 7 of 7 updates are done" in finish(again).stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    finish([word.replace("--max_steps=7", "--max_steps=8") for word in again])
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_another_run_is_not_written_over(sft, unbroken_sft):
    done = launch([sys.executable, *sft, f"--out_dir={unbroken_sft}"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "holds a run; go on with it by --init_from=resume, choose another --out_dir, or lose it by" in done.stderr


# --- the files, one by one

def fake(out_dir, *names):
    for name in names:
        folder = out_dir / "checkpoints" / name / "trainer"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    return out_dir


def kept(out_dir):
    return [folder.name for _, _, folder in checkpoint.checkpoints_of(out_dir)]


def test_the_oldest_are_removed_but_not_the_best_and_what_stopped_within_a_step_when_it_is_past(tmp_path):
    fake(tmp_path, "step_000001", "step_000002", "step_000002_update_0003", "step_000010", "step_1000000")
    assert kept(tmp_path) == ["step_000001", "step_000002", "step_000002_update_0003", "step_000010", "step_1000000"]
    checkpoint.prune(tmp_path, tmp_path / "checkpoints" / "step_1000000", 2, {"step": 1})
    assert kept(tmp_path) == ["step_000001", "step_1000000"]
    fake(tmp_path, "step_1000001", "step_1000002")
    checkpoint.prune(tmp_path, tmp_path / "checkpoints" / "step_1000002", 2, None)
    assert kept(tmp_path) == ["step_1000001", "step_1000002"]
    checkpoint.prune(tmp_path, tmp_path / "checkpoints" / "step_1000002", 0, None)
    assert len(kept(tmp_path)) == 2


def test_what_killed_saves_leave_is_cleared_away(world, tmp_path):
    fake(tmp_path, "step_000001", "step_000002.old", "step_000003.partial", "step_000004", "step_000004.old")
    (tmp_path / "checkpoints" / "latest.partial").symlink_to("step_000009")
    assert checkpoint.find_checkpoint(tmp_path).name == "step_000004"
    assert kept(tmp_path) == ["step_000001", "step_000002", "step_000004"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000002", "step_000004"]
    assert checkpoint.find_checkpoint(tmp_path / "nothing") is None


def test_a_model_without_a_trainer_and_a_broken_state_are_named(world, tmp_path):
    (tmp_path / "checkpoints" / "step_000005").mkdir(parents=True)
    with pytest.raises(UserError, match="step_000005 has no trainer/state.json"):
        checkpoint.find_checkpoint(tmp_path)
    fake(tmp_path, "step_000006")
    (tmp_path / "checkpoints" / "step_000006" / "trainer" / "state.json").write_text('{"step": 6, "upd')
    with pytest.raises(UserError, match="cannot be read .*; remove .*step_000006 to go on from the checkpoint before it"):
        checkpoint.read_state(tmp_path / "checkpoints" / "step_000006")


def test_logs_are_cut_to_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"1\n2\n3\n4")
    log = logs.Logs(tmp_path, "none", {}, {"metrics": 4, "eval": 0}, 3, main=True)
    assert log.read("metrics") == [1, 2]
    log.write("metrics", [{"step": 3, "loss": math.nan, "all": [1.5, -math.inf]}])
    written = b'1\n2\n{"step": 3, "loss": null, "all": [1.5, null]}\n'
    assert log.sizes() == {"metrics": len(written), "eval": 0, "samples": 0, "skipped": 0}
    assert (tmp_path / "metrics.jsonl").read_bytes() == written
    with pytest.raises(UserError, match="metrics.jsonl is shorter than at the checkpoint"):
        logs.Logs(tmp_path, "none", {}, {"metrics": 70}, 3, main=True)
    other = logs.Logs(tmp_path, "none", {}, {}, 1, main=False)  # a rank that is not the first touches nothing
    other.write("metrics", [{}])
    assert other.sizes() == {} and other.read("metrics") == [] and (tmp_path / "metrics.jsonl").read_bytes() == written


def test_a_folder_that_cannot_be_written_to_is_known_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        checkpoint.check_out_dir(f"{tmp_path}/file/run", "pretrained", False, "model")
    fake(tmp_path, "step_000001")
    with pytest.raises(UserError, match="holds a run"):
        checkpoint.check_out_dir(str(tmp_path), "pretrained", False, "model")
    with pytest.raises(UserError, match="lies in out_dir"):
        checkpoint.check_out_dir(str(tmp_path), "pretrained", True, f"{tmp_path}/checkpoints/step_000001")
    with pytest.raises(UserError, match="init_from must be"):
        checkpoint.check_out_dir(str(tmp_path), "scratch", False, "model")


def test_a_second_signal_ends_the_process_at_once_but_torchruns_echo_of_ctrl_c_does_not():
    code = ("import signal, sys, time, checkpoint; stop = checkpoint.Stop(); print('ready', flush=True)\n"
            "while True: time.sleep(0.01)")
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **quiet) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        time.sleep(checkpoint.AGAIN_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_random_generators_go_on(world):
    import numpy
    state = json.loads(json.dumps(checkpoint.random_state(world.device)))
    first = random.random(), numpy.random.rand(), torch.rand(1).item()
    checkpoint.set_random_state(state, world.device)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == first

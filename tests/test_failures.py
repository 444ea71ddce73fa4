"""What goes wrong outside of the numbers: a process that raises, is killed or hangs, torchrun gone, a disk that is full or
read-only. After each nothing runs any more, the cause is said last, and the checkpoint before is whole. vLLM's process is in
test_vllm.py."""
import contextlib
import ctypes
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
from test_resume import all_load, kept, lines, same_files, wait_for
from test_runs import ROOT, TORCHRUN, finish

import watch

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes that lose their parent become children of this one
END_S = 30.0  # after a failure nothing may run any more


class Done(NamedTuple):
    status: int
    output: str
    last: str  # its last line, without torchrun's rule below it
    seconds: float  # from what the hook did to the end


def children():
    """{pid: command line} of the processes below this one, zombies aside."""
    found, parents = {os.getpid()}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    for _ in range(5):
        found |= {pid for pid, parent in parents.items() if parent in found}
    names = {}
    for pid in found - {os.getpid()}:
        with contextlib.suppress(OSError):
            if watch.running(pid):
                names[pid] = pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return names


@contextlib.contextmanager
def nothing_left_running():
    """All processes that the block started, their orphans too, are gone END_S after it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("orphans are found on Linux only")
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    before = children()
    yield
    until = time.monotonic() + END_S
    while (left := {pid: name for pid, name in children().items() if pid not in before}) and time.monotonic() < until:
        time.sleep(0.1)
    ctypes.CDLL(None).prctl(SUBREAPER, 0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # orphans of ours that are zombies now
            pass
    assert not left


def run(command, hook="none:1", act=None, **environment):
    """The Done of a command that ends by itself, or by act(process). stdout and stderr as one text."""
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with nothing_left_running():
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=ours | {"OMP_NUM_THREADS": "1", "NANOMAYE_HOOK": hook} | environment) as process:
            started = time.time()
            if act:
                started = act(process) or started
            output = process.communicate(timeout=200)[0]
        started = float((re.findall(r"HOOK (\S+)", output) or [started])[-1])
        seconds = time.time() - started
    last = [line.strip() for line in output.splitlines() if line.strip("= \n")][-1]
    return Done(process.returncode, output, last.removeprefix("traceback : "), seconds)


@pytest.fixture(scope="module")
def knobs(tiny_model_dir, tiny_jsonl):
    """3 steps of 4 updates, a checkpoint after each."""
    return [f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}", "--rollout=hf", "--batch_size=8",
            "--minibatch_size=2", "--max_new_tokens=24", "--max_steps=3", "--eval_every_epochs=0", "--learning_rate=1e-3",
            "--activation_checkpointing=False", "--save_every_steps=1", "--keep_checkpoints=2"]


@pytest.fixture(scope="module")
def unbroken(knobs, tmp_path_factory):
    """The files of two ranks' run that nothing happened to."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    finish([*TORCHRUN, "train_rl.py", *knobs, f"--out_dir={out_dir}"])
    (out_dir / "eval.jsonl").touch()
    return out_dir


PATCHED = [*TORCHRUN, "tests/patched_run.py"]


def test_one_rank_raises_and_all_stop_with_its_error_last_and_once(knobs, tmp_path):
    done = run([*PATCHED, *knobs, f"--out_dir={tmp_path}"], "raise:6")
    assert done.status == 1 and done.seconds < END_S, done
    assert done.last == "ValueError: boom of the last rank", done.output
    assert done.output.count("ValueError: boom") == 1 and "Connection closed" not in done.output
    assert kept(tmp_path) == ["step_000001"]
    all_load(tmp_path)


def test_a_killed_rank_ends_the_other_which_says_so(knobs, tmp_path):
    done = run([*PATCHED, *knobs, f"--out_dir={tmp_path}"], "kill:6")
    assert done.status == 1 and done.seconds < END_S, done
    assert done.last == "step 2: 4) Policy Update: rank 1 is gone without a word (killed? out of memory?)", done.output
    assert "Connection closed" not in done.output and "(SIGKILL)" in done.output
    assert kept(tmp_path) == ["step_000001"]
    all_load(tmp_path)


def test_a_rank_that_hangs_ends_the_run_with_who_waits_for_whom(knobs, tmp_path):
    done = run([*PATCHED, *knobs, f"--out_dir={tmp_path}", "--timeout_minutes=0.1"], "hang:6")
    assert done.status == 1 and 6 < done.seconds < 6 + END_S, done
    message = done.output[done.output.rindex("traceback : "):]
    assert "step 2: 4) Policy Update: no process got any further for 0.1 minutes (timeout_minutes)\n" in message
    assert re.search(r"rank 0: step 2: 4\) Policy Update, waits for another process in \w+ \(checkpoint.py:\d+\), for \d+ s\n"
                     r" +rank 1: step 2: 4\) Policy Update, is in module \(train_rl.py:\d+\), for \d+ s", message), message
    assert done.output.count("timeout_minutes)") == 1
    all_load(tmp_path)


def test_ranks_that_meet_the_same_error_say_it_once(knobs):
    done = run([*TORCHRUN, "train_rl.py", *knobs, "--loss_agg=mean"])
    assert done.status == 1
    assert done.last == "config: loss_agg must be 'seq_mean' or 'token_mean', got 'mean'"
    assert done.output.count("config: loss_agg must be") == 1 and done.output.count("traceback : config") == 1


def test_without_torchrun_the_ranks_stop_with_a_checkpoint(knobs, tmp_path):
    """torchrun is killed, by whoever runs out of memory: nobody else would end its processes."""
    def kill(process):
        wait_for(lambda: lines(tmp_path / "metrics.jsonl") >= 1, process)
        process.kill()
    knobs = [knob.replace("--max_steps=3", "--max_steps=200").replace("save_every_steps=1", "save_every_steps=0")
             for knob in knobs]
    done = run([*TORCHRUN, "train_rl.py", *knobs, f"--out_dir={tmp_path}"], act=kill)
    assert done.status == -signal.SIGKILL and "torchrun is gone: the run stops" in done.output, done.output
    assert len(kept(tmp_path)) == 1 and done.seconds < 60
    all_load(tmp_path)


# --- the disk

@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of so many bytes, or changes it; where this may not mount, the tests skip."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        return folder
    yield mount
    while subprocess.run(["umount", folder], capture_output=True).returncode == 0:
        pass


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_fills_during_a_save_keeps_the_checkpoint_before_and_the_run_goes_on(knobs, unbroken, disk):
    one = size_of(unbroken / "checkpoints" / "latest" / "")
    out_dir = disk(f"size={int(1.6 * one)}") / "run"
    command = [*TORCHRUN, "train_rl.py", *knobs, f"--out_dir={out_dir}"]
    done = run(command)
    assert done.status == 1 and "more checkpoints of" in done.output, "known before"
    assert re.fullmatch(r"checkpoint step_000002 cannot be written \(.*(No space left on device|os error 28).*\); "
                        rf"{out_dir}/checkpoints/step_000001 is whole, make room and go on by --init_from=resume", done.last)
    assert done.output.count("cannot be written") == 1
    assert [path.name for path in (out_dir / "checkpoints").iterdir() if not path.is_symlink()] == ["step_000001"]
    all_load(out_dir)
    disk(f"remount,size={10 * one}")
    done = finish([*command, "--init_from=resume"])
    assert f"goes on from {out_dir}/checkpoints/step_000001\n" in done.stdout
    same_files(out_dir, unbroken)


def test_a_disk_without_room_for_a_checkpoint_is_known_before_training(knobs, unbroken, disk):
    folder = disk(f"size={int(0.9 * size_of(unbroken / 'checkpoints' / 'latest' / ''))}")
    done = run([sys.executable, "train_rl.py", *knobs, f"--out_dir={folder / 'run'}"])
    assert done.status == 2 and re.search(r"a checkpoint takes \S+ GB, \S+ GB are free; make room or choose", done.last), done
    assert not lines(folder / "run" / "metrics.jsonl")
    disk("remount,ro")
    done = run([sys.executable, "train_rl.py", *knobs, f"--out_dir={folder / 'run2'}"])
    assert done.status == 2 and "cannot be written to (Read-only file system); choose another --out_dir" in done.last, done


def test_logs_on_a_full_disk_say_what_to_do(disk):
    import logs
    from configurator import UserError
    folder = disk("size=64k")
    log = logs.Logs(folder, "none", {}, {}, 1, main=True)
    with pytest.raises(UserError, match="cannot be written .No space left on device.; make room and go on from the newest"):
        for _ in range(100):
            log.write("samples", [{"response": 4096 * "x"}])

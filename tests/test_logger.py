"""What is shown beside a run's files: TensorBoard, Weights & Biases, the bar on a terminal, and the line of a step."""
import fcntl
import html
import importlib.util
import json
import os
import pathlib
import pty
import random
import re
import struct
import subprocess
import sys
import termios
import types

import numpy
import pytest
from PIL import Image

import logger
from configurator import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_REPEATED = ("time/", "memory/")
# the script as it stands, and at its end what it imported
THEN_MODULES = """import atexit, runpy, sys
sys.argv = sys.argv[1:]
atexit.register(lambda: print("imported:", [name for name in ("tensorboard", "wandb", "torch.utils.tensorboard")
                                            if name in sys.modules]))
runpy.run_path(sys.argv[0], run_name="__main__")"""


def needs(package):
    """Skips where the package is not installed; fails if NANOMAYE_LOGGERS=required says that it must be."""
    if importlib.util.find_spec(package) is None:
        (pytest.fail if os.environ.get("NANOMAYE_LOGGERS") == "required" else pytest.skip)(f"{package} is not installed")


def environment(**more):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") and "WANDB" not in k}
    return env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def launch(*command, **more):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, env=environment(**more))


def on_a_terminal(*command):
    """(exit status, all that a terminal of 100 columns would have got) of a command."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
                               env=environment(TERM="xterm"))
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how a terminal says that its last writer is gone
            part = b""
        if not part:
            break
        text += part
    os.close(ours)
    return process.wait(timeout=60), text.decode("utf-8")


def read(path):
    rows = [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_REPEATED)} for row in rows]


def key_of(row, kind="eval"):
    """eval/<split>/<setting> of an object of eval.jsonl, worked out another way than in logger.py."""
    return f"{kind}/{row['split']}/" + "".join(c if c.isalnum() else "_" for c in row["setting"])


def expected_scalars(out_dir):
    """{(key, step): number} that a logger should show of a run's files, times included."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = {(k, row["step"]): v for row in lines for k, v in row.items() if k != "step" and v is not None}
    for row in read(out_dir / "eval.jsonl"):
        shown[key_of(row), row["step"]] = row["accuracy"]
        shown[key_of(row, "eval_length"), row["step"]] = row["response_length"]
    return shown


@pytest.fixture(scope="module")
def command(tiny_model_dir, tiny_jsonl, tmp_path_factory):
    """train_rl.py, two steps, evaluations before the first and after the second; without a reference kl is null."""
    two = tmp_path_factory.mktemp("two")
    (two / "images").symlink_to(pathlib.Path(tiny_jsonl).parent / "images")
    (two / "two.jsonl").write_text("".join(pathlib.Path(tiny_jsonl).read_text(encoding="utf-8").splitlines(True)[:2]))
    return ["train_rl.py", f"--model={tiny_model_dir}", f"--train_data={tiny_jsonl}", f"--val_data={two / 'two.jsonl'}",
            "--rollout=hf", "--batch_size=8", "--minibatch_size=8", "--max_new_tokens=16", "--max_steps=2",
            "--eval_every_epochs=2", "--kl_loss_coeff=0", "--activation_checkpointing=False", "--save_samples=10"]


@pytest.fixture(scope="module")
def plain(command, tmp_path_factory):
    """(out_dir, the finished process) of the run without a logger that the others are held against."""
    out_dir = tmp_path_factory.mktemp("plain") / "out"
    done = launch("-c", THEN_MODULES, *command, f"--out_dir={out_dir}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out_dir, done


@pytest.fixture(scope="module")
def tensorboard_run(command, tmp_path_factory):
    """(out_dir, what the terminal got) of the same run with logger='tensorboard', on a terminal."""
    needs("tensorboard")
    out_dir = tmp_path_factory.mktemp("tensorboard") / "out"
    status, text = on_a_terminal(*command, f"--out_dir={out_dir}", "--logger=tensorboard")
    assert status == 0, text[-4000:]
    return out_dir, text


@pytest.fixture(scope="module")
def wandb_run(command, tmp_path_factory):
    """The out_dir of the same run with logger='wandb', offline."""
    needs("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    done = launch(*command, f"--out_dir={folder / 'out'}", "--logger=wandb", WANDB_MODE="offline", HOME=str(folder / "home"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "out"


def same_files(ours, theirs):
    for name in ("metrics", "eval", "samples"):
        assert read(ours / f"{name}.jsonl") == read(theirs / f"{name}.jsonl"), name
    assert len(read(ours / "metrics.jsonl")) == 2 and len(read(ours / "eval.jsonl")) == 6, "there was something to compare"


def test_without_a_logger_nothing_of_one_is_imported(plain):
    assert "imported: []" in plain[1].stdout
    assert not (plain[0] / "tensorboard").exists() and not (plain[0] / "wandb").exists()


def test_step_line_in_a_file_has_the_fixed_order_a_dash_for_null_and_no_bar(plain):
    lines = [line for line in plain[1].stdout.splitlines() if line.startswith("step ")]
    number = r"-?\d+\.\d+"
    for i, line in enumerate(lines, 1):
        assert re.fullmatch(
            rf"step {i}/2 \| score {number} acc {number} \| len {number} clipped \d+% \| "
            rf"kl - clipfrac {number} ent {number} \| logp diff \de-\d\d \| "
            rf"gen {number}s traj {number}s upd {number}s \| left \d+(s|m|h\d\dm)", line), line
    assert len(lines) == 2 and lines[1].endswith("left 0s")
    assert "Data Flow" not in plain[1].stderr and "/2 [" not in plain[1].stderr, "a bar is for terminals"


def test_bar_shows_step_and_time_left_on_a_terminal_and_garbles_no_line(tensorboard_run):
    text = tensorboard_run[1]
    for stage in ("1) Data Flow", "2) Response Collection", "3) Trajectory Generation", "4) Policy Update", "evaluation"):
        assert f"step 2: {stage}:" in text
    assert re.search(r"step 2: [^\r\n]*50%\|[^\r\n]*1/2 \[\d\d:\d\d<\d\d:\d\d", text), "elapsed<left"
    seen = [line.rstrip("\r").split("\r")[-1] for line in text.split("\n")]  # what stands there when the line is done
    steps = [line for line in seen if "| score" in line]
    assert len(steps) == 2 and all(re.match(rf"step {i}/2 \| score .* left \w+$", line) for i, line in enumerate(steps, 1))
    evals = [line for line in seen if "pass@" in line]
    assert len(evals) == 6 and all(re.match(r"epoch \d validation +pass@.*length [\d.]+$", line) for line in evals)


def test_tensorboard_run_writes_the_same_files(tensorboard_run, plain):
    same_files(tensorboard_run[0], plain[0])


def test_wandb_run_writes_the_same_files(wandb_run, plain):
    same_files(wandb_run, plain[0])


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


def texts_of(events, tag):
    return {event.step: event.tensor_proto.string_val[0].decode("utf-8") for event in events.Tensors(f"{tag}/text_summary")}


def test_tensorboard_has_every_scalar_of_the_files_to_float32(tensorboard_run):
    events = accumulated(tensorboard_run[0] / "tensorboard")
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    expected = expected_scalars(tensorboard_run[0])
    assert found.keys() == expected.keys()
    assert ("train/score", 1) in found and ("eval/validation/pass_1_T_0_6_top_p_1", 0) in found, "two that must be there"
    for key, value in expected.items():
        assert found[key] == float(numpy.float32(value)), key


def test_tensorboard_has_samples_of_every_setting_with_their_images(tensorboard_run):
    events, rows = accumulated(tensorboard_run[0] / "tensorboard"), read(tensorboard_run[0] / "samples.jsonl")
    of_step = [row for row in rows if row["split"] == "train" and row["step"] == 2]
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("samples/train/")]
    assert len(of_step) == 8 and sorted(tags) == [f"samples/train/{i}" for i in range(1, 9)]
    for i, row in enumerate(of_step, 1):
        text = texts_of(events, f"samples/train/{i}")[2]
        assert row["id"] in text and row["question"] in text and ("**wrong**" in text) == (not row["correct"])
        image = events.Images(f"samples/train/{i}")[-1]
        with Image.open(row["image"]) as there:
            assert (image.step, (image.width, image.height)) == (2, there.size)
    evaluated = [tag for tag in events.Tags()["images"] if tag.startswith("samples/validation/")]
    assert len([row for row in rows if row["split"] == "validation" and row["step"] == 0]) > 8 == len(evaluated)
    settings = {row["setting"] for row in rows if row["split"] == "validation"}
    shown = [texts_of(events, tag)[0] for tag in evaluated]
    assert len(settings) == 3 and all(any(setting in text for text in shown) for setting in settings)  # some of each
    assert "batch_size = 8" in texts_of(events, "config")[0]


def wandb_records(path):
    """The protobuf records of a .wandb file: 7 bytes, then LevelDB's log format in blocks of 32768 bytes."""
    from wandb.proto import wandb_internal_pb2
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_offline_file_has_every_number_exactly_and_the_samples_with_images(wandb_run):
    [path] = (wandb_run / "wandb").glob("offline-run-*/run-*.wandb")
    found, config = {}, {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                found["/".join(item.nested_key) or item.key, record.history.step.num] = json.loads(item.value_json)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    expected = expected_scalars(wandb_run)
    assert {key: found.get(key) for key in expected} == expected
    assert len(expected) > 80 and config["batch_size"] == 8
    rows = read(wandb_run / "samples.jsonl")
    for split, step in (("validation", 0), ("train", 1), ("train", 2), ("validation", 2)):
        table = json.loads((path.parent / "files" / found[f"samples/{split}/path", step]).read_text(encoding="utf-8"))
        of_step = [row for row in rows if row["split"] == split and row["step"] == step]
        chosen = [of_step[i * len(of_step) // 8] for i in range(8)]
        assert [row[:4] for row in table["data"]] == [[r["id"], r["question"], r["answer"], r["response"]] for r in chosen]
    pictures = [file for file in (wandb_run / "wandb" / "artifacts").rglob("*") if file.is_file()
                and file.read_bytes().startswith(b"\x89PNG")]
    assert pictures, "they wait beside the run, not in the home folder, for `wandb sync`"


def test_sft_logs_too(command, tiny_jsonl, tmp_path):
    needs("tensorboard")
    done = launch("train_sft.py", *command[1:3], "--eval_every_epochs=0", "--batch_size=4", "--max_steps=3", "--log_every=2",
                  f"--out_dir={tmp_path}", "--logger=tensorboard")
    assert done.returncode == 0, done.stderr[-4000:]
    events = accumulated(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [
        (row["step"], float(numpy.float32(row["policy/loss"]))) for row in read(tmp_path / "metrics.jsonl")]
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and all(re.search(r"\| left \d+s$", line) for line in lines) and "/3 [" not in done.stderr


@pytest.mark.parametrize("script", ["train_rl.py", "train_sft.py"])
def test_unknown_logger_is_an_error_before_the_data(script):
    done = launch(script, "--model=nowhere", "--train_data=nowhere.jsonl", "--logger=wand")
    assert done.returncode == 2 and done.stderr.strip() == \
        "config: logger must be 'none', 'tensorboard' or 'wandb', got 'wand'"


@pytest.mark.parametrize("kind, modules", [("tensorboard", ["tensorboard", "torch.utils.tensorboard"]), ("wandb", ["wandb"])])
def test_missing_package_is_an_error_with_the_command(kind, modules, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    if kind == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    with pytest.raises(UserError, match=f"pip install {kind}"):
        logger.check_logger(kind)
    monkeypatch.setenv("RANK", "1")
    logger.check_logger(kind)  # only the main process logs


def test_wandb_without_a_key_is_an_error_that_names_the_offline_mode(tmp_path):
    needs("wandb")
    done = launch("-c", "from logger import check_logger; check_logger('wandb')", HOME=str(tmp_path))
    assert "UserError: logger='wandb': no API key; set WANDB_MODE=offline" in done.stderr and "wandb login" in done.stderr
    done = launch("-c", "from logger import check_logger; check_logger('wandb')", HOME=str(tmp_path), WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr


def test_wandb_with_a_key_is_asked_for_nothing_and_a_refused_key_is_an_error(monkeypatch):
    """a stand-in for the package: with a key the real one asks the server."""
    def refused(prompt):
        raise OSError("key refused")

    monkeypatch.delenv("RANK", raising=False)
    fake = types.SimpleNamespace(setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online")),
                                 login=lambda prompt: not prompt, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger.check_logger("wandb")
    fake.login = refused
    with pytest.raises(UserError, match="key refused; set WANDB_MODE=offline"):
        logger.check_logger("wandb")


def test_rerun_in_a_folder_hides_the_old_curve_from_its_first_step_on(tmp_path):
    needs("tensorboard")
    for value, first in ((10, 0), (20, 0), (30, 2)):
        log = logger.open_logger("tensorboard", str(tmp_path), {}, first)
        for step in range(max(first, 1), 4):
            log.write("metrics", [{"step": step, "a": value + step}])
        log.close()
    events = accumulated(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(1, 21), (2, 32), (3, 33)]


def test_failing_logger_is_reported_once_and_an_interrupt_passes(capsys):
    class Full(logger.Logger):
        def scalars(self, step, values):
            raise KeyboardInterrupt if step == 3 else OSError("No space left\non device")

        def end(self):
            raise RuntimeError("gone")

    log = Full()
    for step in (1, 2):
        log.write("metrics", [{"step": step, "a": 1}])
    with pytest.raises(KeyboardInterrupt):
        log.write("metrics", [{"step": 3, "a": 1}])
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Full: OSError: No space left on device; the run goes on" in lines[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_full_disk_under_tensorboard_does_not_stop_the_run(tmp_path, capsys):
    needs("tensorboard")
    log = logger.open_logger("tensorboard", str(tmp_path), {})
    [events] = (tmp_path / "tensorboard").iterdir()
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "full").replace(events)  # at once: TensorBoard's thread may be writing
    for step in range(1, 40):
        log.write("metrics", [{"step": step, "a": 1, "b": 2}])
    log.close()
    assert capsys.readouterr().err.count("TensorBoard: OSError: [Errno 28]") == 1


def test_null_is_left_out_and_no_samples_are_nothing():
    class Kept(logger.Logger):
        def scalars(self, step, values):
            kept.append((step, values))

        def show(self, rows):
            kept.append(rows)

    kept, log = [], Kept()
    log.write("metrics", [{"step": 7, "a/b": 0.25, "c": None, "d": 0}])
    log.write("samples", [])
    log.write("samples", [{"n": i} for i in range(20)])
    assert kept == [(7, {"a/b": 0.25, "d": 0}), [{"n": i} for i in (0, 2, 5, 7, 10, 12, 15, 17)]]


def test_pictures_are_shrunk_to_448_a_side_and_broken_ones_are_none(tmp_path):
    Image.new("RGB", (1200, 300)).save(tmp_path / "wide.png")
    Image.new("RGBA", (30, 20)).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:80])
    assert max(logger.picture(tmp_path / "wide.png").size) == 448
    small = logger.picture(tmp_path / "small.png")
    assert small.size == (30, 20) and small.mode == "RGB"
    assert logger.picture(tmp_path / "cut.png") is None and logger.picture(tmp_path / "none.png") is None


def test_hostile_text_shows_as_text_in_tensorboard():
    needs("tensorboard")
    from tensorboard.plugin_util import markdown_to_safe_html
    pieces = ["<script>", "</script>", "<!--", "<![CDATA[", "<?php", "</pre>", "</code>", "</td>", "<style>", "<!DOCTYPE",
              "```", "~~~", "\n~~~\n", "\n", "\n\n", "\r", "\u2028", "\x0c", "\t", "    ", "**", "[a](javascript:x)", "<",
              "![x](y)", "$\\frac{1}{2}$", "|", "# h", "> q", "&lt;", "&", "\x02wzxhzdk:0\x03", "klzzwxh:0000", "\\boxed{1}",
              "[x]: http://y", "中", "\x00", "\x1b[31m"]
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        page = markdown_to_safe_html("**right**\n\n" + logger.verbatim(text) + "\n\n" + logger.verbatim("tail"))
        assert set(re.findall(r"</?(\w+)", page)) <= {"p", "strong", "pre", "code"} and page.count("<pre>") == 2, text
        seen = html.unescape(re.sub(r"<[^>]*>", "", page))
        assert re.sub(r"[\x00-\x20\u2028]", "", text) in re.sub(r"[\x00-\x20\u2028]", "", seen), text


@pytest.mark.parametrize("seconds, done, steps, left", [(45, 1, 2, "45s"), (59.6, 1, 2, "1m"), (12, 2, 122, "12m"),
                                                        (3570, 1, 2, "1h00m"), (185 * 60, 3, 6, "3h05m"), (10, 5, 5, "0s")])
def test_time_left_is_the_mean_step_times_the_steps_to_come(seconds, done, steps, left):
    assert logger.time_left(seconds, done, steps) == left

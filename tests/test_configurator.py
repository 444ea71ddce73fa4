"""configurator.py: what it takes, and the message for all that it does not."""
import json
import os
import pathlib
import runpy
import sys
from importlib.metadata import version

import pytest

from configurator import UserError, configure, save_config
from test_reward import run

SCRIPT = '''"""A script."""
import math
other = 1
# ---------------------------------
run_name = "toy"  # a name
batch_size = 7 * 128  # queries x ranks
learning_rate = 5e-6  # AdamW
dry_run = False  # True prints and stops
offset = -1  # may be negative
UPPER = 8
# ---------------------------------
later = 2
if __name__ == "__main__":
    from configurator import configure, UserError
    config = configure(globals())
    assert run_name != "crash"
'''
DEFAULTS = {"run_name": "toy", "batch_size": 896, "learning_rate": 5e-6, "dry_run": False, "offset": -1}
WANTED = {"run_name": "a str like 'toy'", "batch_size": "an int like 896", "offset": "an int like -1",
          "learning_rate": "a float like 5e-06", "dry_run": "a bool like False"}


def config_file(text, path="config/geo3k.py"):
    pathlib.Path(path).write_text(text)
    return path


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """configure() of SCRIPT in an empty folder: resolve("toy", "--seed=1") is the dict of its knobs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    os.mkdir("config")
    pathlib.Path("train.py").write_text(SCRIPT)
    return lambda *argv, **options: configure(runpy.run_path("train.py"), list(argv), **options)


@pytest.mark.parametrize("argv, expected", [
    (["--run_name=a=b"], {"run_name": "a=b"}), (["--run_name="], {"run_name": ""}),
    (["--run_name", "it's b"], {"run_name": "it's b"}), (["--run_name=--x"], {"run_name": "--x"}),
    (["--batch_size=1e3"], {"batch_size": 1000}), (["--offset", "-7"], {"offset": -7}),
    (["--batch_size=9007199254740993"], {"batch_size": 9007199254740993}), ([], {}),
    (["--learning_rate=1"], {"learning_rate": 1.0}), (["--dry_run", "TRUE"], {"dry_run": True})])
def test_knobs_are_the_lower_case_names_between_the_rules_set_by_flags_in_both_ways(resolve, argv, expected):
    config = resolve(*argv)
    assert repr(config) == repr(DEFAULTS | expected)     # repr tells 1.0 from 1


def test_flags_win_over_files_and_later_files_over_earlier_ones(resolve):
    config_file('"""docs"""\nbatch_size = 2 * 3 - 10 // 4 + 0\noffset = -3')
    config_file('offset = 9\nrun_name = "file"', "config/two.py")
    for argv in ("--run_name=flag config/geo3k.py two", "geo3k --run_name flag config/two.py"):
        assert resolve(*argv.split()) == DEFAULTS | {"run_name": "flag", "batch_size": 4, "offset": 9}
    assert resolve("two", "geo3k")["offset"] == -3


@pytest.mark.parametrize("argument, message", [
    *[(f"--{key}=1", f"unknown knob {key}, did you mean {near}?") for key, near in [
        ("lerning_rate", "learning_rate"), ("other", "--help"), ("later", "--help"), ("UPPER", "--help")]],
    *[(f"--{key}={got}", f"{key} must be {WANTED[key]}, got '{got}'") for key, got in [
        ("batch_size", "12.5"), ("batch_size", "True"), ("batch_size", ""), ("dry_run", "1"),
        ("learning_rate", "1e309-1e309"), ("learning_rate", "-1e999")]],
    ("--run_name --offset=1", "run_name needs a value, --run_name=..."),
    ("--offset=1 --offset", "offset needs a value, --offset=..."),
    ("--offset=1 --offset 2", "offset is set twice, keep one")])
def test_messages_of_the_command_line(resolve, argument, message):
    with pytest.raises(UserError) as error:
        resolve(*argument.split())
    assert str(error.value) == f"command line: {message}"


@pytest.mark.parametrize("text, message", [
    ("open('ran', 'w')", "unknown knob open('ran', 'w'), did you mean --help?"),
    ("offset += 1", "unknown knob offset += 1, did you mean offset?"),
    *[(f"{key} = {got}", f"{key} must be {WANTED[key]}, got {got}") for key, got in [
        ("batch_size", "'8'"), ("dry_run", "'True'"), ("run_name", "5"), ("offset", "2 ** 3"),
        ("offset", "1 // 0"), ("offset", "batch_size = 1"), ("learning_rate", "1" + "0" * 400),
        ("run_name", "open('ran', 'w').name")]]])
def test_messages_of_a_config_file_which_never_runs(resolve, text, message):
    with pytest.raises(UserError) as error:
        resolve(config_file(text))
    assert str(error.value) == f"config/geo3k.py: {message}" and not os.path.exists("ran")


@pytest.mark.parametrize("data, reason", [
    (b"offset = 1\nrun_name = (", r"'\(' was never closed \(geo3k.py, line 2\)"),
    (b'run_name = "\xff"', "utf-8"), (b"offset = 1\0", "null bytes"), (None, "No such file")])
def test_a_config_file_that_cannot_be_read_is_named(resolve, data, reason):
    if data:
        pathlib.Path("config/geo3k.py").write_bytes(data)
    with pytest.raises(UserError, match=f"^config/geo3k.py: cannot be read as a config file: .*{reason}"):
        resolve("geo3k")


def test_a_bare_argument_sets_the_positional_knob(resolve):
    config = resolve("out/a.jsonl", config_file("offset = 3"), positional="run_name")
    assert config == DEFAULTS | {"run_name": "out/a.jsonl", "offset": 3}
    with pytest.raises(UserError, match="run_name is set twice"):
        resolve("a", "--run_name=b", positional="run_name")


def test_help_is_the_knob_block_as_it_stands(resolve, capsys):
    with pytest.raises(SystemExit) as stop:
        resolve("--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == SCRIPT[SCRIPT.index("# ---"):SCRIPT.index("\n# ---", 50)]


def test_the_resolved_block_is_printed_on_rank_0_only(resolve, capsys, monkeypatch):
    resolve("--offset=3")
    assert capsys.readouterr().out.splitlines() == [
        "run_name = 'toy'", "batch_size = 896", "learning_rate = 5e-06", "dry_run = False", "offset = 3"]
    monkeypatch.setenv("RANK", "1")
    resolve()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("config", [{"learning_rate": -0.0}, {
    "run_name": "a'\"\\\n\0\udcff é", "learning_rate": 0.1 + 0.2, "dry_run": True, "offset": -2**63}])
def test_a_saved_config_repeats_the_run_exactly(resolve, monkeypatch, config):
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_name=a\noffset = 77"])
    save_config(DEFAULTS | config, "out/run/config.py")
    assert repr(resolve("out/run/config.py")) == repr(DEFAULTS | config)  # repr tells -0.0 from 0.0
    text = pathlib.Path("out/run/config.py").read_text()
    assert text.startswith(f"# argv: {sys.argv!r}\n# commit: '") and f"\n# torch {version('torch')}\n" in text


def test_a_user_error_is_its_message_and_status_2_also_under_torchrun(resolve):
    message = "command line: unknown knob lerning_rate, did you mean learning_rate?\n"
    mistyped, crash = (run("train.py", flag, folder=".") for flag in ("--lerning_rate=1", "--run_name=crash"))
    assert (mistyped.returncode, mistyped.stderr) == (2, message)
    assert crash.returncode == 1 and "Traceback" in crash.stderr and "AssertionError" in crash.stderr
    under_torchrun = run("train.py", "--lerning_rate=1", folder=".", TORCHELASTIC_ERROR_FILE="error.json")
    assert under_torchrun.returncode == 2
    recorded = json.loads(pathlib.Path("error.json").read_text())
    assert recorded["message"]["extraInfo"]["py_callstack"].endswith(message)  # which torchrun prints

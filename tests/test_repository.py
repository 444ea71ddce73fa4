"""What the README and the config files say is what the scripts do, and how much there is to read."""
import ast
import importlib
import os
import pathlib
import re
import shlex
import subprocess

import pytest

import configurator
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("train_rl", "train_sft", "evaluate", "reflection")


def tracked(pattern="*"):
    listed = subprocess.run(["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [pathlib.Path(name) for name in listed.stdout.decode().split("\0")[:-1]]


def lines(path):
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_knob_has_a_comment_and_is_read_somewhere(script):
    """By its name outside of the block, or as config["name"] in checkpoint.py, to which the dict goes."""
    _, block, rest = (ROOT / f"{script}.py").read_text(encoding="utf-8").split("\n# ---", 2)
    knobs, explained = (set(re.findall(rf"^(\w+) = {comment}", block, re.M)) for comment in ("", ".*  # "))
    names = [node for node in ast.walk(ast.parse("#" + rest)) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    read |= set(re.findall(r'config\["(\w+)"\]', "\n".join(lines("checkpoint.py"))))
    assert len(knobs) > 3 and knobs == explained and not knobs - read


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_config_files_hold_only_what_differs_or_is_explained_and_commands_that_work(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)).replace("\\\n", " ")
    for script, arguments in re.findall(rf"(train_\w+)\.py (config/{path.name}.*)", docstring):
        defaults = dict(vars(importlib.import_module(script)))
        values = configurator.configure(dict(defaults), shlex.split(arguments, comments=True))
        assert values["out_dir"].startswith(f"out/{path.stem}") and values["train_data"]
    values = configurator.configure(dict(defaults), [str(path)])
    set_here = re.findall(r"^(\w+) = ", text, re.M)
    explained = set(re.findall(r"^(\w+) = .*#", text, re.M))
    same = {name for name in set_here if values[name] == defaults[name]} - explained
    assert not same, f"{path.name} repeats defaults: {same}"
    assert values["out_dir"] == f"out/{path.stem}" and len(text.splitlines()) <= 40


def test_readme_commands_name_scripts_and_knobs_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    for command in re.split(r"\s&&\s|\n", blocks):
        words = [w for w in shlex.split(command, comments=True) if not re.match("[A-Z_]+=", w)]
        if not words or words[0] in ("pip", "pytest", "rm"):
            continue
        if words[0] == "bash":
            assert (ROOT / words[1]).exists(), words
            continue
        assert words[0] in ("python", "torchrun"), words
        words = [word for word in words[1:] if word not in ("-m",)]
        while words[0].startswith("-"):  # torchrun's own
            words = words[1:]
        name, arguments = words[0].removesuffix(".py"), words[1:]
        seen.add(name)
        if name in SCRIPTS:
            module = importlib.import_module(name)
            configurator.configure(dict(vars(module)), arguments, "data" if name == "reflection" else "")
        else:
            assert (ROOT / f"{name}.py").exists() or (ROOT / name.split(".")[0]).is_dir(), name
    assert {*SCRIPTS, "fetch", "report"} <= seen


@pytest.mark.skipif("CI" not in os.environ, reason="a fork may grow")
def test_readme_has_the_files_with_their_lines():
    table = dict(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.M))
    root = [path for path in tracked("*.py") if len(path.parts) == 1]
    assert table == {path.name: str(len(lines(path))) for path in root}


def test_readme_defines_every_metric():
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("train_rl.py", "objective.py"))
    parts = "train|response|correction|policy|rollout|judge|time|tokens|memory"
    keys = set(re.findall(rf'"((?:{parts})/\w+)"', source))
    assert len(keys) > 15
    missing = [key for key in sorted(keys) if f"`{key}`" not in README]
    assert not missing, f"not defined in the README: {missing}"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.skipif("CI" not in os.environ, reason="a fork may grow")
def test_the_budget_of_reading():
    python = tracked("*.py")
    root = [path for path in python if len(path.parts) == 1]
    apart = ("tests", "config", "results")
    folders = [path for path in python if len(path.parts) > 1 and path.parts[0] not in apart]
    assert len(root) <= 14 and sum(len(lines(path)) for path in root) <= 3200
    assert len(lines("train_rl.py")) <= 400 and sum(len(lines(path)) for path in folders) <= 1900
    assert sum(len(lines(path)) for path in python if path.parts[0] == "tests") <= 3800
    assert all(len(line) <= 110 for path in python for line in lines(path))
    assert len(README.splitlines()) <= 240


def test_nothing_at_the_root_imports_a_folder_but_the_toy():
    folder = re.compile(r" *(?:import|from) (?:report|bench|tests)\b")
    for path in tracked("*.py"):
        assert len(path.parts) > 1 or not any(map(folder.match, lines(path))), path


def test_no_file_speaks_of_machines():
    words = re.compile(r"/(?:root|home)/|(?<![\w.])/wor[k]/")
    for path in tracked():
        text = (ROOT / path).read_bytes()
        if b"\0" not in text and path.name != "test_repository.py" and path.parts[:2] != ("toy", "base"):
            assert not words.search(text.decode("utf-8")), path

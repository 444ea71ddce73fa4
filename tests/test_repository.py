"""What the README and the config files say is what the scripts do."""
import ast
import pathlib
import re
import shlex
import subprocess

import pytest

import configurator

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("train_rl.py", "train_sft.py", "evaluate.py", "reflection.py", "report.py")
# how the scripts call configure()
ARGUMENTS = {"evaluate.py": {"several": ("ckpt", "data")}, "reflection.py": {"positional": "data"},
             "report.py": {"positional": "runs", "several": ("runs", "sft")}}


def commands():
    """Every command of the README's bash blocks, comments off, as lists of words."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in shlex.split(line, comments=True) and re.split(r"\s&&\s", line.split("  #")[0]):
                yield shlex.split(part, comments=True)


def names_read(source):
    """Names that the guarded body reads: a function's argument of the same name does not count."""
    body = [node for node in ast.parse(source).body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    names = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_knob_is_read(script):
    knobs = set(configurator.read_knobs(str(ROOT / script))[0])
    unread = knobs - names_read((ROOT / script).read_text(encoding="utf-8"))
    assert not unread, f"knobs that do nothing: {unread}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_knob_has_a_comment(script):
    _, block = configurator.read_knobs(str(ROOT / script))
    for line in block:
        assert not re.match(r"[a-z_0-9]+ = ", line) or "#" in line, line


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_config_files_hold_only_what_differs_or_is_explained_and_their_command(path):
    text = path.read_text(encoding="utf-8")
    script = re.search(rf"(train_rl|train_sft)\.py config/{path.stem}\.py", text).group(1) + ".py"
    defaults, _ = configurator.read_knobs(str(ROOT / script))
    values = configurator.read_config(str(path), defaults)
    assert len(text.splitlines()) <= 40
    explained = set(re.findall(r"^(\w+) = .*#", text, re.M))
    same = {name for name, value in values.items() if value == defaults[name]} - explained
    assert not same, f"{path.name} repeats defaults: {same}"
    assert values["out_dir"] == f"out/{path.stem}"


def test_readme_commands_name_scripts_and_knobs_that_exist(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for words in commands():
        if words[0] in ("pip", "pytest", "git", "cd"):
            continue
        assert words[0] in ("python", "torchrun"), words
        words = words[1:]
        while words[0].startswith("-"):
            words = words[1:]
        script, arguments = words[0], words[1:]
        assert (ROOT / script).exists(), script
        seen.add(script)
        if script not in SCRIPTS:
            continue
        configurator.configure({"__file__": str(ROOT / script)}, arguments, **ARGUMENTS.get(script, {}))
    assert set(SCRIPTS) | {"data.py"} <= seen


def test_readme_defines_every_metric():
    source = (ROOT / "train_rl.py").read_text(encoding="utf-8")
    keys = set(re.findall(r'"((?:train|reward|response|policy|rollout|judge|time|tokens|memory)/\w+)"', source))
    assert len(keys) > 20
    missing = [key for key in sorted(keys) if f"`{key}`" not in README]
    assert not missing, f"not defined in the README: {missing}"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_no_file_speaks_of_machines():
    words = re.compile(r"/(?:root|home)/|(?<![\w.])/wor[k]/")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0")[:-1]:
        text = (ROOT / name).read_bytes()
        if b"\0" not in text and name != "tests/test_repository.py" and not name.startswith("toy_base/"):
            assert not words.search(text.decode("utf-8")), name

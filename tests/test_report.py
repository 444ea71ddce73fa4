"""`python -m report`: its numbers against short independent computations, its notes and its errors."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from statistics import mean, stdev

import numpy as np
import pytest
from PIL import Image

from configurator import UserError
from conftest import ROOT
from evaluate import wilson
from reflection import WORDS, ratios
from report.__main__ import main
from report.marks import aha_moment, mark
from report.paper import paper_numbers
from report.scheme import PERIODS, averaged, pooled
from test_evaluate import read
from test_reflection import write
from test_reward import run

TOY, TOY_SFT = ([ROOT / f"results/{name}-{seed}" for seed in range(3)] for name in ("toy", "toy_sft"))
HOSTILE = "<img src=x onerror=alert(1)> ![t](http://x.png) a|b $\\frac$ `c`\nd"
REFLECTING_RIGHT = "reflection/correct_ratio_in_reflection_texts"


def rows_of(out, title):
    """(columns, rows) of one table of report.md."""
    text = (out / "report.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return columns, rows


@pytest.fixture(scope="module")
def toy_report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    main([*map(str, TOY), "--sft", *map(str, TOY_SFT), f"--out={out}"])
    return out


def test_the_accuracy_table_is_that_of_an_independent_script(toy_report):
    columns, rows = rows_of(toy_report, "Accuracy")
    assert columns == ["split", "setting", "Vanilla", "SFT mean", "RL mean", "SFT max", "RL max", "n"]
    evals = {folder: read(folder / "eval.jsonl") for folder in TOY + TOY_SFT}
    assert {(row[0], row[1]) for row in rows} == {(row["split"], row["setting"]) for row in evals[TOY[0]]}
    for split, setting, *cells, n in rows:
        picks = (TOY, max), (TOY_SFT, mean), (TOY, mean), (TOY_SFT, max), (TOY, max)
        for column, cell, (folders, pick) in zip(columns[2:], cells, picks):
            trained = column != "Vanilla"
            runs = [pick([row["accuracy"] for row in evals[folder] if row["split"] == split
                          and row["setting"] == setting and (row["epoch"] > 0) == trained])
                    for folder in folders]
            p, seeds = mean(runs), 4.303 * stdev(runs) / math.sqrt(3) if trained else 0
            low, high = wilson(p * int(n), int(n))
            low, high = p - math.hypot(seeds, p - low), p + math.hypot(seeds, high - p)
            found = [float(part) for part in cell.strip(")").replace("(", "to ").split(" to ")]
            assert found == pytest.approx([100 * p, 100 * max(low, 0), 100 * min(high, 1)], abs=0.0501)


def test_reflection_and_length_are_those_of_an_independent_script(toy_report):
    numbers = json.loads((toy_report / "numbers.json").read_text())
    for i, log in enumerate(read(folder / "metrics.jsonl") for folder in TOY):
        keys = "epoch", "reflection/reflection_ratio", "train/accuracy", REFLECTING_RIGHT, "response/length"
        epoch, ratio, right, both, lengths = np.array([[row[key] or 0.0 for row in log] for key in keys])
        n = np.diff([0] + [row["samples"] for row in log])
        for period, mask in zip(PERIODS, (epoch == epoch[0], epoch == epoch[-1], epoch >= 0)):
            n_all, n_ref, n_right, n_both = ((n * v)[mask].sum() for v in (1, ratio, right, ratio * both))
            wanted = ratios(dict(N=n_all, N_ref=n_ref, N_correct=n_right, N_ref_correct=n_both))
            for word in WORDS:
                wanted[word] = sum(row[f"reflection_words/{word}"] for row, here in zip(log, mask) if here)
            found = {name: values[period][i] for name, values in numbers["reflection"].items()}
            assert found == pytest.approx(wanted, rel=1e-12)
            assert numbers["length"][i][period] == pytest.approx(np.average(lengths[mask], weights=n[mask]))
        assert numbers["length"][i]["first step"] == lengths[0]
        assert numbers["length"][i]["r"] == pytest.approx(np.corrcoef(lengths, ratio)[0, 1])
        late = np.corrcoef(lengths[epoch == epoch[-1]], ratio[epoch == epoch[-1]])[0, 1]
        assert numbers["length"][i]["r, last epoch"] == pytest.approx(late)
    for name, *cells in rows_of(toy_report, "Reflection ratios")[1]:
        assert cells == [f"{mean(v):.3f} ± {stdev(v):.3f}" for v in numbers["reflection"][name].values()]


def test_every_figure_is_drawn_and_linked(toy_report):
    for name in ("accuracy", "training", "ratios", "words"):
        assert f"(figures/{name}.png)" in (toy_report / "report.md").read_text(encoding="utf-8")
        with Image.open(toy_report / f"figures/{name}.png") as picture:
            assert min(picture.size) > 250 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_an_interval_of_two_runs_is_wide_and_many_runs_have_one():
    assert averaged([0.5, 0.6], 100, seeds=True)["low"] == 0.0  # of two runs one knows little: t is 12.7
    assert averaged([0.5] * 40, 100, seeds=True)["mean"] == 0.5  # more than the table of t has rows


def step(number, n, n_ref, n_right, n_both, **more):
    return {"step": number, "epoch": number - 1, "samples": n * number, "n": n, "train/accuracy": n_right / n,
            "response/length": 5.0 + number, "reflection/reflection_ratio": n_ref / n,
            "reflection_words/wait": n_ref, REFLECTING_RIGHT: n_both / n_ref if n_ref else None} | more


def test_a_step_that_was_not_counted_is_in_no_pooled_ratio():
    one, two = step(1, 10, 3, 4, 2), step(2, 2, 1, 1, 0, **{"reflection/reflection_ratio": None})
    assert pooled([one, two])["reflection_ratio"] == 3 / 10


def test_the_papers_numbers_stand_beside_runs_of_its_settings_alone():
    knobs = dict.fromkeys(("train_data", "val_data", "test_data"), "'data/geometry3k/geometry3k_x_v0.jsonl'")
    knobs["model"], setting = "'Qwen/Qwen2.5-VL-7B-Instruct'", "pass@8 T=1 top_p=1"
    assert paper_numbers(knobs, "test", setting) == (69.4, None, 69.3, None, 71.8)
    assert paper_numbers(knobs, "train", setting) is paper_numbers(knobs, "test", "pass@4") is None
    for knob, value in (("model", "'Qwen/Qwen2.5-VL-3B-Instruct'"), ("test_data", "'data/mine/test.jsonl'")):
        assert paper_numbers(knobs | {knob: value}, "test", setting) is None


@pytest.mark.parametrize("response, found", [
    (r"16+4=21. Wait, 16+4=20. \boxed{20}", ("21", "Wait")), (r"16+4=21. So \boxed{20}", None),
    (r"The answer is 12. Re-check: \boxed{20}", ("12", "Re-check")), (r"x = 20.0. Wait. \boxed{20}", None),
    (r"\boxed{7} or try again: \boxed{20}", ("7", "try again")), (r"3+4=7. Wait, 7+13=20. \boxed{20}", None)])
def test_a_candidate_aha_moment_is_a_value_a_word_and_another_value(response, found):
    moment = aha_moment(response, "20")
    assert (moment and moment[:2]) == found and (moment is None or response[moment[2]:].startswith(moment[1]))
    assert bool(mark(response, True)[1]) == bool(found) and mark(response, False)[1] is None


@pytest.mark.parametrize("response, marked", [
    (r"😀 16+4=21. Wait, 16+4=20. \boxed{20}", [["Wait", "word aha"], [r"\boxed{20}", "box"]]),
    (r"\boxed{3} then \boxed{ {wait} }.", [[r"\boxed{ {", "box"], ["wait", "word box"], ["} }", "box"]]),
    (r"RECHECK it, \boxed 7", [["RECHECK", "word"], [r"\boxed 7", "box"]]), (r"none \boxed{", []), ("", [])])
def test_marks_are_the_words_and_the_last_box(response, marked):
    parts, _ = mark(response, True)
    assert "".join(text for text, _ in parts) == response and [part for part in parts if part[1]] == marked


def leave_run(folder, evals=True, **knobs):
    folder.mkdir()
    write(folder / "metrics.jsonl", step(1, 4, 2, 2, 1), step(2, 4, 2, 2, 1))
    row = {"step": 0, "split": "validation", "setting": HOSTILE, "accuracy": 0.25, "n": 4}
    if evals:
        write(folder / "eval.jsonl", row | {"epoch": 0}, row | {"epoch": 1})
    if knobs:
        (folder / "config.py").write_text("".join(f"{name} = {value!r}\n" for name, value in knobs.items()))
    return folder


def test_notes_name_what_differs_or_is_missing_and_markdown_holds_no_html(tmp_path, capsys):
    a = leave_run(tmp_path / "a", seed=0, learning_rate=1e-4)
    b = leave_run(tmp_path / "b", seed=1, learning_rate=2e-4, evals=False)
    c = leave_run(tmp_path / "c", seed=2, learning_rate=1e-4)
    first = (c / "eval.jsonl").read_text().splitlines()[0]
    (c / "eval.jsonl").write_text(first + '\n{"step": 4, "epo')  # it goes on
    main([str(a), str(b), str(c), f"--out={tmp_path}/out"])
    printed = capsys.readouterr().out
    for text in ("a, b, c are averaged but differ in learning_rate (0.0001 / 0.0002 / 0.0001)",
                 "b: no eval.jsonl", "c was not evaluated like a", "no samples.jsonl"):
        assert text in printed and text in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "seed" not in printed
    row = (tmp_path / "out/report.md").read_text(encoding="utf-8").split("| validation")[1].split("\n")[0]
    assert row.startswith(r" | \<img src=x onerror=alert(1)\> \!\[t\](http://x.png) a\|b $\\frac$ \`c\` d | ")
    assert row.endswith("), 1 of 3 runs | 4 |") and row.count("2 of 3 runs") == 1  # Vanilla's


def test_one_run_without_evaluations_config_or_lengths_still_gives_a_report(tmp_path):
    run = leave_run(tmp_path / "a", evals=False)
    write(run / "metrics.jsonl", step(1, 4, 2, 2, 1, **{"response/length": "12"}), step(2, 4, 2, 2, 1))
    main([str(run), f"--out={tmp_path}/out"])
    assert not (tmp_path / "out/figures/accuracy.png").exists()
    assert rows_of(tmp_path / "out", "Response length")[1] == [["a", "–", "–", "7.0", "7.0", "–", "–"]]


def test_methods_are_compared_by_samples_needed_final_accuracy_and_training(tmp_path):
    """Accuracies of 4 problems: of a run, and of its end, by evaluate.py in its folder."""
    curves = {"grpo-0": (0.5, 0.75), "grpo-1": (0.75, 1.0), "rloo-0": (0.5, 0.25), "rloo-1": (0.25, 0.25)}
    row = {"epoch": 0, "split": "validation", "setting": "pass@1 T=0.6 top_p=1", "n": 4}
    for name, curve in curves.items():
        run = leave_run(tmp_path / name, evals=False, learning_rate=2e-4)
        write(run / "eval.jsonl", *(row | {"step": i + 1, "accuracy": x} for i, x in enumerate(curve)))
        (run / "final").mkdir()
        others = [{"step": 2, "data": "a/hard.jsonl", "accuracy": 0.5}, {"step": None, "accuracy": 1.0}]
        write(run / "final/eval.jsonl", *(row | {"split": "test"} | other for other in others))
    (tmp_path / "base-0").mkdir()
    write(tmp_path / "base-0/eval.jsonl", row | {"step": None, "accuracy": 0.5})
    main(["--methods", *(str(tmp_path / name) for name in [*curves, "base-0"]), f"--out={tmp_path}/out"])
    assert rows_of(tmp_path / "out", "Samples until")[1] == [
        ["grpo", "8, 4", "never, 8"], ["rloo", "never, never", "never, never"], ["base", "never", "never"]]
    assert rows_of(tmp_path / "out", "Final accuracy") == (["problems, setting", "grpo", "rloo", "base"], [
        ["validation, pass@1 T=0.6 top_p=1", "87.5 (0.0 to 100.0)", "25.0 (4.6 to 69.9)",
         "50.0 (15.0 to 85.0)"],
        ["hard, pass@1 T=0.6 top_p=1", "50.0 (15.0 to 85.0)", "50.0 (15.0 to 85.0)", "–"],
        ["training, mean of all steps", "50.0 (21.5 to 78.5)", "50.0 (21.5 to 78.5)", "–"]])
    # pairs 0.75 - 0.25, 1 - 0.25; 0.75 - 0.5, 1 - 0.5: 12.706 * sd / sqrt(2) = 12.706 * 0.125
    assert rows_of(tmp_path / "out", "Difference")[1][0][1:] == [
        "+62.5 (-96.3 to +221.3), n=2", "+37.5 (-121.3 to +196.3), n=2"]
    columns, rows = rows_of(tmp_path / "out", "Training")
    assert dict(zip(columns, rows[0])) == {
        "method": "grpo", "length, last step": "7.0 (7.0 to 7.0)",
        "reflection ratio, last half": "0.500 (0.500 to 0.500)"}
    assert (tmp_path / "out/figures/methods.png").exists()


def test_the_study_is_all_there_and_its_tables_are_made_again_from_its_files(tmp_path):
    """By study.sh, which has nothing left to run. Every number of study.md with an interval is in a table."""
    study, out = ROOT / "results/study", tmp_path / "study"
    shutil.copytree(study, out)
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "study.sh", out], cwd=ROOT, env=env, capture_output=True, timeout=200)
    assert done.returncode == 0 and b"is made" not in done.stdout, done.stderr
    made = {path.name: (out / "kept" / path.name / "report.md").read_text(encoding="utf-8")
            for path in study.iterdir() if (path / "report.md").exists()}
    assert made == {name: (study / name / "report.md").read_text(encoding="utf-8") for name in made}
    page = " ".join((ROOT / "results/study.md").read_text(encoding="utf-8").split())
    cells = re.findall(r"[-+]?\d+\.\d+ \([^()]+ to [^()]+\)", page)
    assert len(cells) > 40 and not [cell for cell in cells if cell not in "".join(made.values())]


def test_user_errors_are_one_line_that_says_what_and_where(tmp_path):
    good, bad, odd = (leave_run(tmp_path / name) for name in ("good", "bad", "odd"))
    (bad / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    write(odd / "eval.jsonl", {"epoch": 1, "accuracy": "high", "n": 3})
    for arguments, message in (([], "required: RUN"), ([good, "--max_samples=a"], "invalid int value: 'a'"),
                               ([tmp_path], "no metrics.jsonl"), ([good, f"{good}/../good"], "given twice"),
                               ([bad], "metrics.jsonl:2: no obj"), ([odd], "a number for accuracy"),
                               ([good, "--sft", odd], "after --sft"),
                               (["--methods", good], "no accuracy of validation, pass@1 T=0.6")):
        with pytest.raises(UserError, match=message) as error:
            main([f"--out={tmp_path}/out", *map(str, arguments)])
        assert "\n" not in str(error.value) and not (tmp_path / "out/report.md").exists()


def test_the_command_ends_with_2_and_one_line_on_a_users_error(tmp_path):
    done = run("-m", "report", tmp_path)
    assert done.returncode == 2 and re.fullmatch(f"{tmp_path}: no metrics.*\n", done.stderr)

"""report.py: its tables against short independent computations, its notes, its figures. The page itself: test_page.py."""
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import intervals
import report
import scheme
from configurator import UserError
from figures import make_figures, series
from intervals import student, wilson
from reflection import WORDS, metrics, tally
from scheme import COLUMNS, Run, averaged, correlation_numbers, length_numbers, pooled, read_run, reflection_numbers

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOY, TOY_SFT = ([f"results/{name}-{seed}" for seed in range(3)] for name in ("toy", "toy_sft"))


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "report.py"), *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True)


@pytest.fixture(scope="session")
def toy_report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    done = run(*TOY, "--sft", *TOY_SFT, f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out


def rows_of(markdown, title):
    """{first cells: the other cells} of one table."""
    lines = markdown.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return cells[0], cells[2:]


def load(path):
    return [json.loads(line) for line in open(ROOT / path)]


def test_the_accuracy_table_is_that_of_an_independent_script(toy_report):
    header, rows = rows_of((toy_report / "report.md").read_text(), "Accuracy")
    assert header == ["split", "setting", "Vanilla", "SFT mean", "RL mean", "SFT max", "RL max", "n"]
    shown = {(split, setting): [float(cell.split()[0]) for cell in cells[:5]] for split, setting, *cells in rows}
    evals = {folder: load(f"{folder}/eval.jsonl") for folder in TOY + TOY_SFT}
    keys = dict.fromkeys((row["split"], row["setting"]) for row in evals[TOY[0]])
    assert set(shown) == set(keys) and len(keys) == 6
    for split, setting in keys:
        def over_runs(folders, pick, trained, at=(split, setting)):
            of_runs = [[100 * r["accuracy"] for r in evals[folder]
                        if (r["split"], r["setting"]) == at and (r["epoch"] > 0) == trained] for folder in folders]
            return statistics.mean(pick(values) for values in of_runs)
        wanted = [over_runs(TOY, statistics.mean, False), over_runs(TOY_SFT, statistics.mean, True),
                  over_runs(TOY, statistics.mean, True), over_runs(TOY_SFT, max, True), over_runs(TOY, max, True)]
        assert shown[split, setting] == pytest.approx(wanted, abs=0.0501)


def test_the_other_tables_are_those_of_an_independent_script(toy_report):
    markdown, logs = (toy_report / "report.md").read_text(), [load(f"{folder}/metrics.jsonl") for folder in TOY]
    _, rows = rows_of(markdown, "Reflection ratios")
    for name, of_steps in (("reflection_ratio", lambda r: (r["reflection/reflection_ratio"] * 256, 256)),
                           ("correct_ratio_in_reflection_texts", lambda r: (
                               r["reflection/correct_ratio_in_reflection_texts"] * r["reflection/reflection_ratio"] * 256,
                               r["reflection/reflection_ratio"] * 256)),
                           ("reflection_ratio_in_correct_answers", lambda r: (
                               r["reflection/reflection_ratio_in_correct_answers"] * r["train/accuracy"] * 256,
                               r["train/accuracy"] * 256))):
        shown = next(cells for ratio, *cells in rows if ratio == name)
        for cell, steps in zip(shown, (range(0, 16), range(16, 32), range(32))):
            of_runs = [[sum(part) for part in zip(*(of_steps(log[i]) for i in steps))] for log in logs]
            values = [above / below for above, below in of_runs]
            assert cell == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    _, rows = rows_of(markdown, "Does reflection follow length?")
    for (name, r, interval, steps), log in zip(rows, logs):
        x, y = ([row[key] for row in log] for key in ("response/length", "reflection/reflection_ratio"))
        assert (name[:4], steps) == ("toy-", "32") and r == f"{np.corrcoef(x, y)[0, 1]:.2f}"
        low, high = map(float, interval.split(" to "))
        assert low < float(r) < high
    assert rows[3][0] == "all runs" and rows[3][3] == "96"
    header, rows = rows_of(markdown, "Response length and the seed")
    assert header == ["run", "first step", "last epoch", "all steps", "longest step"] and len(rows) == 5
    lengths = [[row["response/length"] for row in log] for log in logs]
    wanted = [[values[0], statistics.mean(values[16:]), statistics.mean(values), max(values)] for values in lengths]
    for cells, values in zip(rows[:3], wanted):
        assert cells[1:] == [f"{value:.1f}" for value in values]
    assert rows[4][1:] == [f"{statistics.stdev(column):.1f}" for column in zip(*wanted)]
    _, rows = rows_of(markdown, "Reflection words")
    counts = [[sum(row["reflection_words/verify"] for row in log[part]) for log in logs]
              for part in (slice(0, 16), slice(16, 32), slice(0, 32))]
    assert next(cells for word, *cells in rows if word == "verify") == [
        f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in counts]
    assert [word for word, *_ in rows] == list(WORDS)


def test_the_report_of_runs_on_disk_has_every_figure_and_file(toy_report):
    assert sorted(path.name for path in toy_report.iterdir()) == ["figures", "index.html", "numbers.json", "report.md"]
    markdown = (toy_report / "report.md").read_text()
    pictures = {path.stem for path in (toy_report / "figures").iterdir()}
    assert pictures == {"accuracy", "training", "reflection", "two_words", "ratios", "words"}
    for name in pictures:
        assert f"(figures/{name}.png)" in markdown
        with Image.open(toy_report / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 250 and len(picture.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn
    numbers = json.loads((toy_report / "numbers.json").read_text())
    assert set(numbers) == {"accuracy", "reflection", "correlation", "length"}


def test_the_committed_report_and_the_readme_are_made_by_the_readmes_command(toy_report):
    readme, numbers = (ROOT / "README.md").read_text(), json.loads((toy_report / "numbers.json").read_text())
    assert f"python report.py {' '.join(TOY)} --sft {' '.join(TOY_SFT)} --out=results/toy_report" in readme
    made, committed = (folder / "report.md" for folder in (toy_report, ROOT / "results/toy_report"))
    assert made.read_text() == committed.read_text(), "run the command again"

    def leaves(value):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)] \
            if isinstance(value, (dict, list)) else [value]
    committed = leaves(json.loads((ROOT / "results/toy_report/numbers.json").read_text()))
    assert [pytest.approx(leaf, rel=1e-9) if isinstance(leaf, float) else leaf for leaf in committed] == leaves(numbers)
    made = {path.name for path in (toy_report / "figures").iterdir()}
    assert made == {path.name for path in (ROOT / "results/toy_report/figures").iterdir()}
    means = {(row["split"], row["setting"]): [f"{100 * row[column]['mean']:.1f}" for column in COLUMNS[:3]]
             for row in numbers["accuracy"]}
    rows = re.findall(r"^\| (.*?, pass@1 .*?) \| (.*?) \| (.*?) \| (.*?) \|$", readme, re.M)
    table = {name: [base, sft, rl] for name, base, rl, sft in rows}
    assert table == {f"{name}, {setting}": means[split, f"{setting} top_p={top_p}"]
                     for name, split in (("validation", "validation"), ("out of distribution", "test"))
                     for setting, top_p in (("pass@1 T=0.6", "1"), ("pass@1 T=0.01", "0.001"))}


# --- the numbers one by one

def test_averaged_by_hand():
    cell = averaged([0.5, 0.6], 100)
    low, high = wilson(55, 100)
    over_seeds = 12.706 * statistics.stdev([0.5, 0.6]) / math.sqrt(2)  # 0.6353: of two runs one knows little
    assert cell["mean"] == pytest.approx(0.55) and cell["low"] == 0.0 and cell["high"] == 1.0
    cell = averaged([0.50, 0.52, 0.54], 100)
    low, high = wilson(52, 100)
    over_seeds = 4.303 * 0.02 / math.sqrt(3)
    assert cell["low"] == pytest.approx(0.52 - math.hypot(over_seeds, 0.52 - low))
    assert cell["high"] == pytest.approx(0.52 + math.hypot(over_seeds, high - 0.52))
    assert averaged([0.52], 100)["low"] == pytest.approx(low) and averaged([], 100) is None
    same = averaged([0.50, 0.52, 0.54], 100, seeds=False)  # one model sampled three times
    assert (same["low"], same["high"]) == pytest.approx((low, high))
    assert averaged([0.5] * 40, 100)["low"] == pytest.approx(wilson(50, 100)[0])  # more runs than the table has rows
    assert same["n"] == 100 and same["runs"] == [0.50, 0.52, 0.54]


def test_students_t_is_that_of_the_textbook():
    assert [student(freedom) for freedom in (1, 2, 3, 4, 5, 30, 99)] == [12.706, 4.303, 3.182, 2.776, 2.571, 2.042, 2.042]
    assert list(intervals.STUDENT) == sorted(intervals.STUDENT, reverse=True)


def step_row(step, responses, correct, epoch=0, length=10.0):
    return {"step": step, "epoch": epoch, "samples": 0, "train/accuracy": sum(correct) / len(correct),
            "response/length": length, **metrics(tally(responses, correct))}


def a_run(rows, name="a", evals=(), config=None):
    samples = 0
    for row, n in rows:
        samples += n
        row["samples"] = samples
    return Run(name, "rl", name, config or {}, "", [row for row, _ in rows], list(evals))


def test_ratios_of_several_steps_are_pooled_counts():
    one = ["wait"] * 3 + ["six"] * 7, [True, True, False] + [True] * 2 + [False] * 5
    two = ["wait, verify"] + ["six"], [False, True]
    run = a_run([(step_row(1, *one), 10), (step_row(2, *two, epoch=1), 2)])
    numbers = reflection_numbers([run])
    whole = tally(one[0] + two[0], one[1] + two[1])
    assert [numbers[name]["all steps"][0] for name in scheme.RATIOS] == [
        4 / 12, 2 / 5, 2 / 7, 2 / 4, 3 / 8]                    # N_ref/N, both/N+, (N_ref-both)/(N-N+), both/N_ref, rest
    assert numbers["wait"] == {"first epoch": [3], "last epoch": [1], "all steps": [4]}
    assert pooled([]) == metrics_of_nothing() and whole["N"] == 12
    run.metrics[1]["reflection/reflection_ratio"] = None       # a step that was not counted is left out, it is not 0
    assert reflection_numbers([run])["reflection_ratio"]["all steps"] == [3 / 10]
    run.metrics[0]["train/accuracy"] = None                    # what was right is not known: then none of it is
    assert reflection_numbers([run])["reflection_ratio"]["all steps"] == [None]


def metrics_of_nothing():
    return dict.fromkeys(scheme.RATIOS, None) | dict.fromkeys(WORDS, 0)


def test_a_period_is_an_epoch_and_its_steps_weigh_by_their_responses():
    run = a_run([(step_row(1, ["six"], [True], length=10.0), 30), (step_row(2, ["six"], [True], length=20.0), 10),
                 (step_row(3, ["six"], [True], epoch=1, length=40.0), 10), (step_row(4, ["six"], [True], 1, 30.0), 30)])
    wanted = ["a", 10.0, (10 * 40 + 30 * 30) / 40, (300 + 200 + 400 + 900) / 80, 40.0]  # first, last epoch, all, longest
    assert list(length_numbers([run])[0].values()) == wanted


def correlated(values, name="a"):
    rows = []
    for step, (length, ratio) in enumerate(values, 1):
        row = step_row(step, ["six"], [True], length=length)
        row["reflection/reflection_ratio"] = ratio
        rows.append((row, 1))
    return a_run(rows, name)


def test_correlation_of_length_and_reflection():
    rng = np.random.default_rng(1)
    x = rng.normal(size=200)
    noisy = correlated(zip((10 + x).tolist(), (0.5 + 0.1 * x + 0.1 * rng.normal(size=200)).tolist()))
    row, = correlation_numbers([noisy])
    low, high = row["ci95"]
    assert 0.6 < row["r"] < 0.8 and low < 1 / math.sqrt(2) < high and high - low < 0.25
    assert correlation_numbers([noisy]) == [row]               # the same resamples each time
    for constant, n in (([(1, 0.1), (2, 0.1), (4, 0.1)], 3), ([(1, None)], 0)):
        assert correlation_numbers([correlated(constant)]) == [{"run": "a", "r": None, "ci95": None, "steps": n}]
    assert correlation_numbers([correlated([(1, 0.1), (2, 0.3)])])[0]["r"] == pytest.approx(1)
    # two runs of other lengths, no relation within either: pooling raw values would find one
    apart = [correlated([(1, 0.1), (2, 0.2), (1, 0.2), (2, 0.1)], "a"),
             correlated([(9, 0.8), (10, 0.9), (9, 0.9), (10, 0.8)], "b")]
    both = correlation_numbers(apart)[2]
    assert both["run"] == "all runs" and both["r"] == pytest.approx(0, abs=1e-9)


def test_curves_are_mean_and_standard_deviation_over_the_runs_that_are_there():
    curve = series("RL", "rl", {"a": {1: 1.0, 2: 3.0}, "b": {1: 2.0, 2: None}, "c": {1: 6.0, 3: 5.0}})
    assert curve["x"] == [1, 2, 3] and curve["mean"] == [3.0, 3.0, 5.0]
    assert curve["sd"] == [pytest.approx(math.sqrt(7)), None, None]
    assert curve["runs"][1] == {"name": "b", "y": [2.0, None, None]}


def test_the_words_shown_are_frequent_and_changing():
    def words(**counts):
        return {word: {"first epoch": [counts.get(word, (0, 0))[0]], "last epoch": [counts.get(word, (0, 0))[1]],
                       "all steps": [sum(counts.get(word, (0, 0)))]} for word in WORDS}
    from figures import words_to_show
    assert words_to_show(words(wait=(10, 90), verify=(40, 60), yet=(48, 50), recheck=(0, 1))) == ["wait", "verify"]


def test_training_accuracy_is_that_of_the_epochs_responses():
    rows = [(step_row(1, ["six"] * 4, [True] * 4), 30), (step_row(2, ["six"] * 4, [False] * 4), 10),
            (step_row(3, ["six"] * 4, [True, False, False, False], epoch=1), 10), (step_row(4, ["six"], [True], epoch=1), 5)]
    run = a_run(rows)
    figures = make_figures([run], [], {"accuracy": [], "reflection": reflection_numbers([run])})
    figure = next(figure for figure in figures if figure["id"] == "training")
    curve = figure["panels"][0]["series"][0]
    assert curve["x"] == [1, 2] and curve["mean"] == [0.75, (2.5 + 5) / 15]


# --- runs of a paper setting

def test_the_papers_numbers_stand_beside_runs_of_its_settings():
    evals = [{"split": "test", "setting": setting, "epoch": epoch, "accuracy": 0.5, "n": 601} for epoch in (0, 1)
             for setting in report.PAPER["geometry3k", "Qwen2.5-VL-7B"]]
    config = {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "train_data": "data/geometry3k/geometry3k_rl_v0.jsonl"}
    run = a_run([(step_row(1, ["six"], [True]), 1)], evals=evals, config=config)
    assert report.paper_setting(config) == ("geometry3k", "Qwen2.5-VL-7B")
    numbers = {"accuracy": scheme.accuracy_numbers([run], []), "reflection": reflection_numbers([run]),
               "correlation": correlation_numbers([run]), "length": length_numbers([run])}
    rows = report.make_tables(numbers, [run], [], ("geometry3k", "Qwen2.5-VL-7B"))[0]["rows"]
    assert rows[1] == ["", "the paper", "69.4", "–", "69.3", "–", "71.8", ""] and rows[0][2] == "50.0 (46.0 to 54.0)"
    assert rows[0][3] == "–" and len(rows) == 6
    assert report.paper_setting({"model": "toy_base", "train_data": "data/toy/train.jsonl"}) is None
    assert report.paper_setting(config | {"model": "Qwen/Qwen2.5-VL-3B-Instruct"}) is None
    assert report.paper_setting(config | {"test_data": "data/other.jsonl"}) is None


@pytest.mark.parametrize("name, key", [("geo3k", ("geometry3k", "Qwen2.5-VL-7B")), ("mm_math", ("mm_math5k", "Qwen2-VL-7B")),
                                       ("geo3k_qwen2", ("geometry3k", "Qwen2-VL-7B"))])
def test_the_papers_numbers_are_those_that_the_configs_expect(name, key):
    text = (ROOT / f"config/{name}.py").read_text()
    config = scheme.read_config_text(text)
    assert report.paper_setting(config) == key
    expected = re.findall(r"(?<!T=)\b\d+\.\d\b", text.split("Expect")[1].split('"""')[0])
    tests = [report.PAPER[key][setting][1] for setting in report.PAPER[key]]
    assert [float(v) for v in expected[:6]] == [row[2] for row in tests] + [row[0] for row in tests]


# --- what is wrong with runs is said

def leave_run(folder, rows=2, evals=True, **knobs):
    folder.mkdir()
    run = a_run([(step_row(step, ["wait", "six"], [True, False], length=5.0 + step), 2) for step in range(1, rows + 1)])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.metrics))
    if evals:
        (folder / "eval.jsonl").write_text("".join(json.dumps(
            {"step": epoch, "epoch": epoch, "split": "validation", "setting": "pass@1 T=1 top_p=1", "accuracy": 0.25, "n": 4})
            + "\n" for epoch in (0, 1)))
    (folder / "config.py").write_text("# argv: []\n" + "".join(f"{k} = {v!r}\n" for k, v in knobs.items()))
    return folder


def test_notes_name_what_differs_what_is_short_and_what_is_missing(tmp_path):
    a = leave_run(tmp_path / "a", seed=0, out_dir="a", learning_rate=1e-4)
    b = leave_run(tmp_path / "b", rows=3, evals=False, seed=1, out_dir="b", learning_rate=2e-4)
    with open(b / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "epo')
    done = run(a, b, f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    for text in ("a, b are averaged but are not seeds of one setting: they differ in learning_rate (0.0001 / 0.0002)",
                 "not equally many steps (a 2, b 3)", "b: no eval.jsonl", "the last line breaks off"):
        assert text in done.stdout and text in (tmp_path / "out/report.md").read_text()
    assert "seed" not in done.stdout.split("they differ in")[1].split("\n")[0]


def test_one_run_without_evaluations_or_config_still_gives_a_report(tmp_path):
    folder = leave_run(tmp_path / "a", rows=1, evals=False)
    (folder / "config.py").write_text("import os\nx = {}\n<script>alert(1)</script>")
    done = run(folder, f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out/figures/accuracy.png").exists() and (tmp_path / "out/figures/words.png").exists()


def test_user_errors_are_one_line(tmp_path):
    good = leave_run(tmp_path / "good")
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = leave_run(tmp_path / "bad")
    (bad / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    odd = leave_run(tmp_path / "odd")
    (odd / "metrics.jsonl").write_text('{"step": 1, "epoch": NaN, "samples": 3}\n')
    for arguments, message in (((), "which runs?"), ((empty,), "empty: no metrics.jsonl"),
                               ((good, f"{good}/../good"), "given twice"), ((good, "--out="), "out must be a folder"),
                               ((bad,), "metrics.jsonl:2: not a line that a run writes"),
                               ((odd,), "a row without a number for epoch"),
                               ((good, "--sft", empty), "empty: no eval.jsonl")):
        done = run(*arguments, *[f"--out={tmp_path}/out"] * ("--out=" not in arguments))
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (arguments, done.stderr)
    assert not (tmp_path / "out").exists()


def test_hostile_values_are_gaps(tmp_path):
    folder = leave_run(tmp_path / "a")
    rows = load(folder / "metrics.jsonl")
    rows[0] |= {"response/length": "12", "reflection/reflection_ratio": None, "reflection_words/wait": True}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_run(str(folder), "a", "rl", [])
    assert length_numbers([found])[0]["first step"] is None and length_numbers([found])[0]["all steps"] == 7.0


@pytest.mark.parametrize("file, row, message", [
    ("eval", {"accuracy": "1"}, "a row without a number for accuracy"), ("eval", {"accuracy": 2}, "not a row that a run"),
    ("eval", {"n": 0}, "not a row that a run"), ("eval", {"split": ["test"]}, "not a row that a run"),
    ("eval", {"setting": None}, "not a row that a run"), ("metrics", {"step": 10**400}, "a row without a number for step"),
    ("metrics", {"samples": 0}, "samples must rise"), ("metrics", {"step": 0}, "step must rise")])
def test_rows_that_no_run_writes_are_refused(tmp_path, file, row, message):
    folder = leave_run(tmp_path / "a")
    rows = load(folder / f"{file}.jsonl")
    (folder / f"{file}.jsonl").write_text("".join(json.dumps(old | row) + "\n" for old in rows))
    with pytest.raises(UserError, match=message):
        read_run(str(folder), "a", "rl", [])


def test_runs_of_the_other_script_are_refused(tmp_path):
    folder = leave_run(tmp_path / "a")
    with pytest.raises(UserError, match="is no run of train_sft.py"):
        read_run(str(folder), "a", "sft", [])
    rows = [{key: row[key] for key in ("step", "epoch", "samples")} for row in load(folder / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")  # a blank line is nothing
    assert read_run(str(folder), "a", "sft", []).role == "sft"
    with pytest.raises(UserError, match="is no run of train_rl.py"):
        read_run(str(folder), "a", "rl", [])


@pytest.mark.parametrize("text", ["x = 1//0", "x = 10**9", "x = [", "train_data = 5\nmodel = 7", "x = " + "(" * 5000])
def test_a_config_that_is_none_is_not_fatal(tmp_path, text):
    folder = leave_run(tmp_path / "a")
    (folder / "config.py").write_text(text)
    assert report.paper_setting(read_run(str(folder), "a", "rl", []).config) is None


def test_an_epoch_that_is_not_finished_is_no_epoch():
    def log(*epochs):
        return a_run([(step_row(step, ["six"] * 4, [True] * 2 + [False] * 2, epoch=epoch), 4)
                      for step, epoch in enumerate(epochs, 1)])
    for epochs, finished in (((0, 0, 1, 1, 2), [0, 1]), ((0, 0, 1, 1), [0, 1]), ((0,), [0])):
        assert list(scheme.finished_epochs(log(*epochs))) == finished
    assert [len(rows) for rows in scheme.periods(log(0, 0, 1, 1, 2)).values()] == [2, 2, 5]


def test_cells_say_of_how_many_runs_they_are(tmp_path):
    full, other = leave_run(tmp_path / "full"), leave_run(tmp_path / "other")
    first, last = load(other / "eval.jsonl")
    (other / "eval.jsonl").write_text(json.dumps(first | {"n": 10}) + "\n")
    done = run(full, other, f"--out={tmp_path}/out")
    _, rows = rows_of((tmp_path / "out/report.md").read_text(), "Accuracy")
    assert rows[0][4].endswith("(1 of 2 runs)") and rows[0][2].endswith(")") and "runs" not in rows[0][2]
    assert rows[0][7] == "4" and "other: not evaluated at the same epochs as full" in done.stdout
    assert "other: not evaluated on as many problems of the same splits" in done.stdout


def test_report_md_has_no_html_link_or_picture_of_a_strangers(tmp_path):
    folder = leave_run(tmp_path / "a")
    hostile = "<img src=x onerror=alert(1)> ![t](http://evil/x.png) a|b \\frac $\\frac$ `c`\nd"
    rows = [row | {"setting": hostile} for row in load(folder / "eval.jsonl")]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(folder, f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr  # matplotlib does not typeset it either
    text = (tmp_path / "out/report.md").read_text()
    assert r"\<img src=x onerror=alert(1)\> \!\[t\](http://evil/x.png) a\|b \\frac $\\frac$ \`c\` d" in text
    assert not re.search(r"(?<!\\)<img|(?<!\\)!\[t", text)

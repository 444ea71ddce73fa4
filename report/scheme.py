"""The evaluation scheme of MAYE (arXiv 2504.02587) as numbers: what runs left, what a report says."""
import json
import math
import os
import statistics
from typing import NamedTuple

from configurator import UserError
from evaluate import wilson
from reflection import TOTALS, WORDS, ratios

COLUMNS = ("Vanilla", "SFT mean", "RL mean", "SFT max", "RL max")  # the paper's Tab. 3
RATIOS = tuple(ratios(dict.fromkeys(TOTALS, 0)))  # the five names
PERIODS = ("first epoch", "last epoch", "all steps")
# Student's t, 97.5%, for 1, 2, ... 10 degrees of freedom; for more, where it is a little less, the last
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Run(NamedTuple):
    name: str
    role: str  # 'rl', 'sft', or 'any' among methods
    folder: str
    config: str  # the text of config.py, '' where there is none
    metrics: list  # objects of metrics.jsonl, with n, the responses of the step; None for what is no number
    evals: list  # objects of eval.jsonl


# -----------------------------------------------------------------------------
# reading

def number(value):
    """value where it is a number that float64 and JavaScript hold, else None."""
    return value if type(value) in (int, float) and abs(value) < 2**53 else None


def read_jsonl(path):
    """The objects of a jsonl file, [] where there is none. A last line that is not ended yet is left out,
    since the run goes on; UserError for any other line that is no object."""
    if not os.path.isfile(path):
        return []
    rows = []
    with open(path, "rb") as file:  # bytes: text that is not utf-8 is then one line's error
        for line_number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if type(row) is dict:
                rows.append(row)
            elif line.endswith(b"\n"):
                raise UserError(f"{path}:{line_number}: no object of JSON, as runs write; restore the file")
    return rows


def read_run(folder, name, role):
    """The Run in a folder; UserError when it lacks what a report needs."""
    metrics, evals = read_jsonl(f"{folder}/metrics.jsonl"), read_jsonl(f"{folder}/eval.jsonl")
    give = f"give the out_dir of a run of train_{role}.py"
    if role != "any" and not (metrics if role == "rl" else evals):
        raise UserError(f"{folder}: no {'metrics' if role == 'rl' else 'eval'}.jsonl with rows in it; {give}")
    if role != "any" and metrics and ("train/accuracy" in metrics[0]) != (role == "rl"):
        raise UserError(f"{folder}: RL runs are named first, SFT runs after --sft; {give}")
    needed = {"metrics": ("step", "epoch", "samples"), "eval": ("epoch", "accuracy", "n")}
    for file, rows in (("metrics", metrics), ("eval", evals)):
        missing = [key for row in rows for key in needed[file] if number(row.get(key)) is None]
        if missing:
            raise UserError(f"{folder}/{file}.jsonl: a row without a number for {missing[0]}; {give}")
    metrics = [{key: number(value) for key, value in row.items()} for row in metrics]
    for before, row in zip([{"samples": 0}, *metrics], metrics):
        row["n"] = row["samples"] - before["samples"]
    for row in evals:
        row |= {"split": str(row.get("split")), "setting": str(row.get("setting"))}
    config = ""
    if os.path.isfile(f"{folder}/config.py"):
        with open(f"{folder}/config.py", encoding="utf-8", errors="replace") as file:
            config = file.read()
    return Run(name, role, folder, config, metrics, evals)


# -----------------------------------------------------------------------------
# numbers

def mean(values):
    """The mean of the values that are not None; None without any."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def deviation(values):
    """The standard deviation (n - 1) of the values that are not None; None for fewer than two."""
    values = [v for v in values if v is not None]
    return statistics.stdev(values) if len(values) > 1 else None


def half_width(values):
    """Half of the 95% interval (Student's t) of the mean of several runs' values."""
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return t * deviation(values) / math.sqrt(len(values))


def averaged(values, n, seeds):
    """{mean, low, high, n, runs} of one accuracy of each run over the same n problems; None without runs. Low
    and high: 95%, for other problems (Wilson) and, where the runs are seeds of one training, for another seed
    (Student's t over the runs), the two half-widths added in quadrature."""
    if not values:
        return None
    centre = mean(values)
    low, high = wilson(centre * n, n)
    over_seeds = half_width(values) if seeds and len(values) > 1 else 0.0
    return {"mean": centre, "low": max(0.0, centre - math.hypot(over_seeds, centre - low)),
            "high": min(1.0, centre + math.hypot(over_seeds, high - centre)), "n": n, "runs": values}


def accuracy_numbers(rl, sft):
    """Tab. 3 of the runs: [{split, setting, and for each of COLUMNS what averaged() returns}]. Mean and max
    are over a run's evaluations of its trained model (epoch > 0)."""
    table = []
    settings = dict.fromkeys((row["split"], row["setting"]) for run in rl + sft for row in run.evals)
    for split, setting in sorted(settings, key=lambda key: key[0] != "validation"):
        cells = {"split": split, "setting": setting}
        for column, runs, pick in zip(COLUMNS, (rl, sft, rl, sft, rl), (mean, mean, mean, max, max)):
            found = [[row for row in run.evals if (row["split"], row["setting"]) == (split, setting)
                      and (row["epoch"] == 0) == (column == "Vanilla")] for run in runs]
            n = min((row["n"] for rows in found for row in rows), default=0)
            values = [pick([row["accuracy"] for row in rows]) for rows in found if rows]
            cells[column] = averaged(values, n, seeds=column != "Vanilla")
        table.append(cells)
    return table


def periods(run):
    """{period: the run's steps in it}, for each of PERIODS."""
    first, last = run.metrics[0]["epoch"], run.metrics[-1]["epoch"]
    return {"first epoch": [row for row in run.metrics if row["epoch"] == first],
            "last epoch": [row for row in run.metrics if row["epoch"] == last], "all steps": run.metrics}


def pooled(steps):
    """{ratio or word: value} of several steps as of one: their counts, got back from their ratios, are summed
    and divided once. A mean of ratios would weigh a step with two reflections like one with two hundred."""
    counts = dict.fromkeys(TOTALS, 0)
    for row in steps:
        if row.get("reflection/reflection_ratio") is None or row.get("train/accuracy") is None:
            continue  # not counted, which is not a count of 0
        n_ref = round(row["reflection/reflection_ratio"] * row["n"])
        n_ref_correct = round((row.get("reflection/correct_ratio_in_reflection_texts") or 0) * n_ref)
        n_correct = round(row["train/accuracy"] * row["n"])
        for name, count in zip(TOTALS, (row["n"], n_ref, n_correct, n_ref_correct), strict=True):
            counts[name] += count
    words = {word: sum(row.get(f"reflection_words/{word}") or 0 for row in steps) for word in WORDS}
    return ratios(counts) | words


def reflection_numbers(rl):
    """{ratio or word: {period: [value of each run]}}."""
    runs = [{period: pooled(steps) for period, steps in periods(run).items()} for run in rl]
    return {name: {period: [run[period][name] for run in runs] for period in PERIODS}
            for name in RATIOS + WORDS}


def weighted(steps, key):
    """The mean of a metric over the steps' responses; steps without it do not count."""
    known = [row for row in steps if row.get(key) is not None]
    n = sum(row["n"] for row in known)
    return sum(row["n"] * row[key] for row in known) / n if n else None


def correlation(steps):
    """Of response length and reflection ratio over the steps; None for fewer than two or a constant."""
    pairs = [(row.get("response/length"), row.get("reflection/reflection_ratio")) for row in steps]
    try:
        return statistics.correlation(*zip(*(pair for pair in pairs if None not in pair)))
    except (statistics.StatisticsError, TypeError):
        return None


def length_numbers(rl):
    """For each run the response length, tokens, of its first step and of each period; and r, Pearson's
    correlation of length with reflection_ratio over its steps, and over those of the last epoch."""
    table = []
    for run in rl:
        spans = {"first step": run.metrics[:1]} | periods(run)
        lengths = {name: weighted(steps, "response/length") for name, steps in spans.items()}
        r = {"r": correlation(run.metrics), "r, last epoch": correlation(spans["last epoch"])}
        table.append({"run": run.name, **lengths, **r})
    return table

"""The evaluation scheme of MAYE (arXiv 2504.02587) as numbers: what a run left on disk, and what its report says of it."""
import ast
import json
import math
import os
import statistics
from typing import NamedTuple

import numpy as np

from configurator import UserError, constant
from intervals import moments, pearson, resampled_blocks, student, wilson
from reflection import TOTALS, WORDS, ratios

COLUMNS = ("Vanilla", "SFT mean", "RL mean", "SFT max", "RL max")  # the paper's Tab. 3
LEAST_STEPS = 20  # a bootstrap of fewer would be too sure of itself (of two steps it would say 1.00 to 1.00)
RATIOS = tuple(ratios(dict.fromkeys(TOTALS, 0)))  # the five names


class Run(NamedTuple):
    name: str
    role: str  # 'rl' or 'sft'
    folder: str
    config: dict  # knob: value
    config_text: str
    metrics: list  # objects of metrics.jsonl
    evals: list  # objects of eval.jsonl


# ---------------------------------------------------------------------------------------------------------------------
# reading

def read_jsonl(path, notes):
    """The objects of a jsonl file, [] where there is none. A last line that breaks off, as in a run that still goes on, is
    left out with a note; any other bad line is a UserError."""
    if not os.path.isfile(path):
        return []
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if type(row) is not dict:
                    raise ValueError("not an object")
                rows.append(row)
            except (ValueError, RecursionError) as error:
                if line.endswith(b"\n"):
                    raise UserError(f"{path}:{number}: not a line that a run writes ({error}); restore the file") from None
                notes.append(f"{path}: the last line breaks off, it is left out")
    return rows


def read_config_text(text):
    """{knob: value} of a run's config.py; parsed, never run."""
    try:
        assigned = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
        return {node.targets[0].id: constant(node.value) for node in assigned}
    except (SyntaxError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError):
        return {}  # written by hand or by something else: it is shown, and nothing is read from it


def read_run(folder, name, role, notes):
    """The Run in a folder; UserError when it lacks what a report needs, or holds what no run writes."""
    metrics, evals = (read_jsonl(f"{folder}/{file}.jsonl", notes) for file in ("metrics", "eval"))
    needed, rows = ("metrics", metrics) if role == "rl" else ("eval", evals)
    if not rows:
        raise UserError(f"{folder}: no {needed}.jsonl with rows in it; give the out_dir of a run of train_{role}.py")
    for row, keys in [(row, ("step", "epoch", "samples")) for row in metrics] + [
            (row, ("epoch", "accuracy", "n")) for row in evals]:
        if bad := [key for key in keys if number(row.get(key)) is None]:
            raise UserError(f"{folder}: a row without a number for {bad[0]}; give the out_dir of a run of train_{role}.py")
    for row in evals:
        if not (0 <= row["accuracy"] <= 1 <= row["n"] and type(row.get("split")) is type(row.get("setting")) is str):
            raise UserError(f"{folder}/eval.jsonl: not a row that a run writes: {str(row)[:100]}; restore the file")
    for key in ("step", "samples"):
        counts = [0] + [row[key] for row in metrics]
        if falls := [after for before, after in zip(counts, counts[1:]) if after <= before]:
            raise UserError(f"{folder}/metrics.jsonl: {key} must rise from row to row, {falls[0]} does not; restore the file")
    if metrics and ("train/accuracy" in metrics[0]) != (role == "rl"):
        raise UserError(f"{folder} is no run of train_{role}.py; RL runs are named first, SFT runs after --sft")
    text = ""
    if os.path.isfile(f"{folder}/config.py"):
        with open(f"{folder}/config.py", encoding="utf-8", errors="replace") as file:
            text = file.read()
    return Run(name, role, folder, read_config_text(text), text, metrics, evals)


# ---------------------------------------------------------------------------------------------------------------------
# numbers

def number(value):
    """value where it is a number that float64 and JavaScript hold, else None: a null stays a gap."""
    return value if type(value) in (int, float) and abs(value) < 2**53 else None


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def deviation(values):
    """The standard deviation (n - 1) of the values, None for fewer than two."""
    values = [v for v in values if v is not None]
    return statistics.stdev(values) if len(values) > 1 else None


def averaged(values, n, seeds=True):
    """{mean, low, high, n, runs} of one accuracy of each run over the same n problems, or None without runs. The interval is
    for other problems (Wilson) and, where runs are seeds of one training, for another seed (Student's t over the runs)."""
    if not values:
        return None
    centre = mean(values)
    low, high = wilson(centre * n, n)
    over_seeds = 0
    if seeds and len(values) > 1:
        over_seeds = student(len(values) - 1) * deviation(values) / math.sqrt(len(values))
    return {"mean": centre, "low": max(0.0, centre - math.hypot(over_seeds, centre - low)),
            "high": min(1.0, centre + math.hypot(over_seeds, high - centre)), "n": n, "runs": values}


def accuracies(group, split, setting, trained):
    """(accuracies, n) of each run that was evaluated so: after training began, or before."""
    found = []
    for run in group:
        rows = [row for row in run.evals if (row["split"], row["setting"]) == (split, setting)
                and (row["epoch"] > 0) == trained]
        if rows:
            found.append(([row["accuracy"] for row in rows], min(row["n"] for row in rows)))
    return found


def accuracy_numbers(rl, sft):
    """Tab. 3 of the runs: for each split and setting the five COLUMNS. Mean and max are over the evaluations of trained
    models (epoch > 0) of each run."""
    rows, keys = [], {(row["split"], row["setting"]): None for run in rl + sft for row in run.evals}
    for split, setting in sorted(keys, key=lambda key: key[0] != "validation"):
        cells = {}
        for column, group, pick in zip(COLUMNS, (rl, sft, rl, sft, rl), (mean, mean, mean, max, max)):
            found = accuracies(group, split, setting, trained=column != "Vanilla")
            n = min((n for _, n in found), default=None)
            cells[column] = averaged([pick(values) for values, _ in found], n, seeds=column != "Vanilla")
        rows.append({"split": split, "setting": setting, **cells})
    return rows


def pooled(metrics):
    """The five ratios and the words' occurrences of several steps as one: the steps' counts, got back from their ratios,
    are summed and divided once."""
    counts = dict.fromkeys(TOTALS + WORDS, 0)
    for row in metrics:
        if number(row.get("reflection/reflection_ratio")) is None or number(row.get("train/accuracy")) is None:
            continue  # a step that did not count, not one without reflection or right answers
        n, value = row["n"], {name: number(row.get(f"reflection/{name}")) or 0 for name in RATIOS}
        n_ref = round(value["reflection_ratio"] * n)
        for name, count in zip(TOTALS, (n, n_ref, round(row["train/accuracy"] * n),
                                        round(value["correct_ratio_in_reflection_texts"] * n_ref)), strict=True):
            counts[name] += count
        for word in WORDS:
            counts[word] += number(row.get(f"reflection_words/{word}")) or 0
    return ratios(counts) | {word: counts[word] for word in WORDS}


def steps_of(run):
    """The run's objects of metrics.jsonl, each with n, the responses of its step."""
    before, rows = 0, []
    for row in run.metrics:
        rows.append(row | {"n": row["samples"] - before})
        before = row["samples"]
    return rows


def finished_epochs(run):
    """{epoch: its steps}, without a last one that has fewer steps than the first: the run was stopped within it, or goes on.
    A run that did not finish one has what it has."""
    epochs = {}
    for row in steps_of(run):
        epochs.setdefault(row["epoch"], []).append(row)
    last = list(epochs)[-1]
    if len(epochs) > 1 and len(epochs[last]) < len(next(iter(epochs.values()))):
        del epochs[last]
    return epochs


def periods(run):
    """{period: the steps of the run in it}."""
    epochs = list(finished_epochs(run).values())
    return {"first epoch": epochs[0], "last epoch": epochs[-1], "all steps": steps_of(run)}


def reflection_numbers(rl):
    """{ratio or word: {period: [value of each run]}}."""
    each = [{period: pooled(rows) for period, rows in periods(run).items()} for run in rl]
    return {name: {period: [values[period][name] for values in each] for period in each[0]} for name in RATIOS + WORDS}


def correlation_numbers(rl, resamples=2000):
    """Pearson's r of response length with reflection_ratio over the steps of each run and, of several runs, over the steps of
    all, each about its run's own means; with a 95% moving-block bootstrap interval from LEAST_STEPS on. None where one of
    the two never changes."""
    rows, rng, total, total_again, steps = [], np.random.default_rng(0), 0, 0, 0

    def add_row(name, found, again, n):
        r = number(float(pearson(found)))
        again = pearson(again)
        interval = None if r is None or n < LEAST_STEPS else np.percentile(again[np.isfinite(again)], (2.5, 97.5)).tolist()
        rows.append({"run": name, "r": r, "ci95": interval, "steps": n})

    for run in rl:
        pairs = [(number(row.get("response/length")), number(row.get("reflection/reflection_ratio"))) for row in run.metrics]
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            rows.append({"run": run.name, "r": None, "ci95": None, "steps": 0})
            continue
        x, y = np.array(pairs, dtype=float).T
        positions = resampled_blocks(len(x), resamples, rng)
        found, again = moments(x, y), moments(x[positions], y[positions])
        add_row(run.name, found, again, len(x))
        total, total_again, steps = total + found, total_again + again, steps + len(x)
    if len(rl) > 1 and steps:
        add_row("all runs", total, total_again, steps)
    return rows


def length_numbers(rl):
    """For each run the response length, tokens: of its first step, of its last epoch, of all steps, of the longest step."""
    rows = []
    for run in rl:
        def over(steps):
            known = [(row["n"], number(row.get("response/length"))) for row in steps]
            known = [(n, length) for n, length in known if length is not None]
            return sum(n * length for n, length in known) / sum(n for n, _ in known) if known else None
        part = periods(run)
        lengths = [number(row.get("response/length")) for row in run.metrics]
        rows.append({"run": run.name, "first step": lengths[0], "last epoch": over(part["last epoch"]),
                     "all steps": over(part["all steps"]),
                     "longest step": max((v for v in lengths if v is not None), default=None)})
    return rows

"""Methods side by side: how far each gets, how fast, how its training went, and what the first does better.

    python -m report --methods out/methods/grpo-1e-4-{0,1,2} out/methods/rloo-1e-4-{0,1,2}

Runs that are named alike but for a number at the end are the seeds of one method; RL, SFT, or a folder in
which evaluate.py alone has written, of the untrained model. Accuracies are those of a run's eval.jsonl and of
what evaluate.py wrote to folders within it, about checkpoints of known steps.
"""
import glob
import os
import re
import statistics
from collections import defaultdict

from configurator import UserError
from report.figures import series
from report.scheme import averaged, half_width, mean, number, read_jsonl, weighted

REACH = (0.6, 0.8)  # validation accuracy under CURVE
CURVE = "pass@1 T=0.6 top_p=1"
KS = (1, 2, 4, 8, 16)  # of the curves of pass@k
TRAINING = (  # column, key of metrics.jsonl, what of a run's steps, format
    ("length, last step", "response/length", lambda values: values[-1], ".1f"),
    ("entropy, last step", "policy/entropy", lambda values: values[-1], ".3f"),
    ("reflection ratio, last half", "reflection/reflection_ratio", lambda v: mean(v[len(v) // 2:]), ".3f"),
    ("KL to the base, median", "rollout/kl", statistics.median, ".3f"),
    ("clip fraction, mean", "policy/clipfrac", mean, ".4f"),
    ("groups without signal, mean", "train/groups_without_signal", mean, ".1f"),
    ("trainer to engine, mean", "rollout/logprob_diff", mean, ".1e"),
    ("retokenised, mean", "response/retokenised", mean, ".4f"),
    ("largest ratio", "correction/ratio_max", max, ".3g"),
    ("effective sample size, least", "correction/effective_sample_size", min, ".3f"),
    ("sequences masked, sum", "correction/masked", sum, ".0f"))


def groups_of(runs):
    """{method: [Run]}, in the order of the command line."""
    groups = defaultdict(list)
    for run in runs:
        groups[re.sub(r"-\d+$", "", run.name)].append(run)
    return groups


def read_accuracies(run):
    """{(problems, setting): {samples: (accuracy, n)}} of a run, by the samples it was trained on. problems:
    the split, or the file where evaluate.py names one of its own, such as the toy's hard.jsonl."""
    samples = {0: 0} | {row["step"]: row["samples"] for row in run.metrics}
    found = defaultdict(dict)
    for path in sorted(glob.glob(f"{glob.escape(run.folder)}/**/eval.jsonl", recursive=True)):
        for row in read_jsonl(path):
            accuracy, n = number(row.get("accuracy")), number(row.get("n"))
            step = number(row.get("step")) if run.metrics else 0  # a folder without training: its model
            problems = str(row.get("split"))
            if problems == "test" and row.get("data"):
                problems = os.path.splitext(os.path.basename(str(row["data"])))[0]
            if step in samples and accuracy is not None and n:
                found[problems, str(row.get("setting"))][samples[step]] = accuracy, n
    if ("validation", CURVE) not in found:
        raise UserError(f"{run.folder}: no accuracy of validation, {CURVE}; evaluate.py makes it, with an "
                        "--out_dir in the run's folder")
    if run.metrics and run.metrics[0].get("train/accuracy") is not None:
        last = run.metrics[-1]["samples"]
        found["training", "mean of all steps"][last] = weighted(run.metrics, "train/accuracy"), last
    return found


def reached(curves, goal):
    """[samples at the first evaluation that is at the goal, None where none is], one a run."""
    return [min((x for x, (accuracy, _) in curve.items() if accuracy >= goal), default=None)
            for curve in curves]


def pass_at_k(of_run, problems):
    """{k: accuracy} at T = 1 of a run's last weights."""
    found = {k: of_run.get((problems, f"pass@{k} T=1 top_p=1")) for k in KS}
    return {k: values[max(values)][0] for k, values in found.items() if values}


def difference(first, other):
    """{mean, width, runs} of first less other, {run's number: accuracy} each, over the numbers that both
    have; an untrained model, with None for a number, stands beside all. width: half of the 95% interval over
    seeds, None for one pair; None without any."""
    pairs = [(first.get(seed, first.get(None)), other.get(seed, other.get(None)))
             for seed in dict.fromkeys([*first, *other])]
    values = [x - y for x, y in pairs if x is not None and y is not None]
    if not values:
        return None
    return {"mean": mean(values), "width": half_width(values) if len(values) > 1 else None, "runs": values}


def method_numbers(runs):
    """{method: {runs, reach, final, first_less_this, curves, pass_at_k, training}} of all runs."""
    numbers, first = {}, None
    for name, group in groups_of(runs).items():
        found = [read_accuracies(run) for run in group]
        curves, final, seeds = [of_run["validation", CURVE] for of_run in found], {}, {}
        for key in dict.fromkeys(key for of_run in found for key in of_run):
            last = {run.name[len(name):] if run.metrics else None: of_run[key][max(of_run[key])]
                    for run, of_run in zip(group, found) if key in of_run}
            seeds[", ".join(key)] = {seed: accuracy for seed, (accuracy, _) in last.items()}
            n = next(iter(last.values()))[1]
            final[", ".join(key)] = averaged([accuracy for accuracy, _ in last.values()], n, seeds=True)
        first = first or seeds
        numbers[name] = {
            "runs": [run.name for run in group], "final": final,
            "first_less_this": {key: difference(first[key], seeds[key]) for key in seeds if key in first},
            "reach": {f"{goal:.0%}": reached(curves, goal) for goal in REACH},
            "curves": {problems: [{x: of_run[problems, CURVE][x][0] for x in sorted(of_run[problems, CURVE])}
                                  for of_run in found] for problems, setting in found[0] if setting == CURVE},
            "pass_at_k": {problems: [pass_at_k(of_run, problems) for of_run in found]
                          for problems, setting in found[0] if setting == "pass@1 T=1 top_p=1"},
            "training": {column: [pick(values) for run in group if (
                values := [row[key] for row in run.metrics if row.get(key) is not None])]
                for column, key, pick, _ in TRAINING}}
    return numbers


def method_tables(numbers):
    """[{title, caption, columns, rows}] of what method_numbers returns."""
    def accuracy(name, key):
        cell = numbers[name]["final"].get(key)
        shown = "{:.1f} ({:.1f} to {:.1f})"
        return shown.format(*(100 * cell[part] for part in ("mean", "low", "high"))) if cell else "–"

    def less(name, key):
        cell = numbers[name]["first_less_this"].get(key)
        if not cell or cell["width"] is None:
            return f"{100 * cell['mean']:+.1f}, one pair" if cell else "–"
        interval = (100 * (cell["mean"] + sign * cell["width"]) for sign in (0, -1, 1))
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*interval) + f", n={len(cell['runs'])}"

    def needed(values):
        return ", ".join("never" if value is None else f"{value:,}" for value in values)

    def spread(values, form):
        return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "–"

    first, *others = numbers
    settings = list(dict.fromkeys(key for of_method in numbers.values() for key in of_method["final"]))
    training = [column for column, *_ in TRAINING if any(m["training"][column] for m in numbers.values())]
    forms = {column: form for column, _, _, form in TRAINING}
    return [
        dict(title="Samples until", caption=f"The first evaluation of validation, {CURVE}, at or above the "
             "accuracy: responses (SFT: solutions) that each run had been trained on.",
             columns=["method", *(f"{goal:.0%}" for goal in REACH)],
             rows=[[name, *map(needed, m["reach"].values())] for name, m in numbers.items()]),
        dict(title="Final accuracy", caption="Percent, mean over runs; in brackets 95%, for another seed "
             "(Student's t) and for other problems (Wilson) in quadrature; all had the same problems.",
             columns=["problems, setting", *numbers],
             rows=[[key, *(accuracy(name, key) for name in numbers)] for key in settings]),
        dict(title="Difference", caption=f"{first} less the others, in points, of runs with the same number; "
             "in brackets 95% for other seeds (Student's t, n pairs), on these problems.",
             columns=["problems, setting", *others],
             rows=[[key, *(less(name, key) for name in others)] for key in settings]),
        dict(title="Training", caption="Mean over runs (least to most). Ratio and sample size are of tokens; "
             "with correction='mask' of responses.", columns=["method", *training],
             rows=[[name, *(spread(m["training"][column], forms[column]) for column in training)]
                   for name, m in numbers.items()])]


def method_figure(numbers, runs):
    """Accuracy over the samples trained on, pass@k where several k were measured, and response length."""
    def panel(title, x, y, points):  # points: {method: {run: {x: value}}}
        roles = {name: str(i) if any(m["curves"]["validation"][0]) else "base"  # nothing after 0 samples
                 for i, (name, m) in enumerate(numbers.items())}
        curves = [series(name, roles[name], points[name]) for name in numbers if name in points]
        return {"title": title, "x": x, "y": y, "percent": y == "accuracy", "series": curves}

    panels, trained = [], "samples trained on"
    for part, x in (("curves", trained), ("pass_at_k", "k")):
        for problems in dict.fromkeys(key for m in numbers.values() for key in m[part]):
            points = {name: dict(zip(m["runs"], m[part][problems])) for name, m in numbers.items()
                      if problems in m[part]}
            at = sorted({x for of_method in points.values() for curve in of_method.values() for x in curve})
            setting = CURVE if part == "curves" else "pass@k T=1 top_p=1"
            if len(at) > 1:
                panels.append(panel(f"{problems}, {setting}", x, "accuracy", points))
    lengths = {name: {run.name: {row["samples"]: row.get("response/length") for row in run.metrics}
                      for run in group} for name, group in groups_of(runs).items() if group[0].metrics}
    panels.append(panel("response length", trained, "tokens", lengths))
    return {"id": "methods", "title": "Methods", "caption": "", "panels": panels}

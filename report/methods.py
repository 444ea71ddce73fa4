"""Methods side by side: the responses that each needs to get somewhere, where it ends, how its training went.

    python -m report --methods out/methods/grpo-1e-4-{0,1,2} out/methods/rloo-1e-4-{0,1,2}

Runs that are named alike but for a number at the end are the seeds of one method. Accuracies are those of a
run's eval.jsonl and of what evaluate.py wrote to folders within it, about checkpoints of known steps.
"""
import glob
import re
from collections import defaultdict

from configurator import UserError
from report.figures import series
from report.scheme import averaged, mean, number, read_jsonl

REACH = (0.6, 0.8)  # validation accuracy under CURVE
CURVE = "pass@1 T=0.6 top_p=1"
TRAINING = (  # column, key of metrics.jsonl, what of a run's steps, format
    ("entropy, last step", "policy/entropy", lambda values: values[-1], ".3f"),
    ("KL to the base, last step", "rollout/kl", lambda values: values[-1], ".3f"),
    ("clip fraction, mean", "policy/clipfrac", mean, ".4f"),
    ("groups without signal, mean", "train/groups_without_signal", mean, ".1f"),
    ("trainer to engine, mean", "rollout/logprob_diff", mean, ".1e"),
    ("largest ratio", "correction/ratio_max", max, ".3g"),
    ("effective sample size, least", "correction/effective_sample_size", min, ".3f"),
    ("sequences masked, sum", "correction/masked", sum, ".0f"),
    ("length, last step", "response/length", lambda values: values[-1], ".1f"))


def groups_of(runs):
    """{method: [Run]}, in the order of the command line."""
    groups = defaultdict(list)
    for run in runs:
        groups[re.sub(r"-\d+$", "", run.name)].append(run)
    return groups


def read_accuracies(run):
    """{(split, setting): {responses: (accuracy, n)}} of a run, by the responses it was trained on."""
    samples = {0: 0} | {row["step"]: row["samples"] for row in run.metrics}
    found = defaultdict(dict)
    for path in sorted(glob.glob(f"{glob.escape(run.folder)}/**/eval.jsonl", recursive=True)):
        for row in read_jsonl(path):
            step, accuracy, n = (number(row.get(key)) for key in ("step", "accuracy", "n"))
            if step in samples and accuracy is not None and n:
                found[str(row.get("split")), str(row.get("setting"))][samples[step]] = accuracy, n
    if ("validation", CURVE) not in found:
        raise UserError(f"{run.folder}: no accuracy of validation, {CURVE}; evaluate.py makes it, with an "
                        "--out_dir in the run's folder")
    return found


def reached(curves, goal):
    """[responses at the first evaluation that is at the goal, None where none is], one a run."""
    return [min((x for x, (accuracy, _) in curve.items() if accuracy >= goal), default=None)
            for curve in curves]


def method_numbers(runs):
    """{method: {learning_rate, runs, reach, final, curves, training}} of all runs."""
    numbers = {}
    for name, group in groups_of(runs).items():
        found = [read_accuracies(run) for run in group]
        curves, final = [of_run["validation", CURVE] for of_run in found], {}
        for key in dict.fromkeys(key for of_run in found for key in of_run):
            last = [of_run[key][max(of_run[key])] for of_run in found if key in of_run]
            final[", ".join(key)] = averaged([accuracy for accuracy, _ in last], last[0][1], seeds=True)
        columns = {column: (key, pick) for column, key, pick, _ in TRAINING}
        rates = [re.search(r"^learning_rate = (.*)$", run.config, re.M) for run in group]
        numbers[name] = {
            "learning_rate": " / ".join(dict.fromkeys(rate[1] if rate else "–" for rate in rates)),
            "runs": [run.name for run in group], "final": final,
            "reach": {f"{goal:.0%}": reached(curves, goal) for goal in REACH},
            "curves": [{x: accuracy for x, (accuracy, _) in sorted(curve.items())} for curve in curves],
            "training": {column: [pick(values) for run in group if (
                values := [row[key] for row in run.metrics if row.get(key) is not None])]
                for column, (key, pick) in columns.items()}}
    return numbers


def responses(values):
    """Mean and range of the responses that runs needed, and how many runs did not get there."""
    there = [value for value in values if value is not None]
    text = f"{mean(there):,.0f} ({min(there):,} to {max(there):,})" if there else "never"
    return text + (f"; never in {len(values) - len(there)}" if there and len(there) < len(values) else "")


def method_tables(numbers):
    """[{title, caption, columns, rows}] of what method_numbers returns."""
    def cell(accuracy):
        return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * accuracy[key] for key in ("mean", "low", "high")))

    def spread(values, form):
        return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "–"

    settings = list(dict.fromkeys(key for of_method in numbers.values() for key in of_method["final"]))
    reach = [[name, m["learning_rate"], *map(responses, m["reach"].values())] for name, m in numbers.items()]
    final = [[name, *(cell(m["final"][key]) if key in m["final"] else "–" for key in settings)]
             for name, m in numbers.items()]
    training = [[name, *(spread(m["training"][column], form) for column, *_, form in TRAINING)]
                for name, m in numbers.items()]
    return [
        dict(title="Responses until", caption=f"The first evaluation of validation, {CURVE}, at or above the "
             "accuracy: mean over runs (least to most).", rows=reach,
             columns=["method", "learning rate", *(f"{goal:.0%}" for goal in REACH)]),
        dict(title="Final accuracy", caption="Percent, mean over runs; in brackets 95%, for another seed "
             "(Student's t) and for other problems (Wilson) in quadrature; all had the same problems.",
             columns=["method", *settings], rows=final),
        dict(title="Training", caption="Mean over runs (least to most). Ratio and sample size are of tokens; "
             "with correction='mask' of responses.",
             columns=["method", *(column for column, *_ in TRAINING)], rows=training)]


def method_figure(numbers, runs):
    """Validation accuracy, its beginning, and response length over the responses trained on."""
    accuracy, lengths, groups = [], [], groups_of(runs)
    for i, (name, m) in enumerate(numbers.items()):
        accuracy.append(series(name, str(i), dict(zip(m["runs"], m["curves"]))))
        points = {run.name: {row["samples"]: row.get("response/length") for row in run.metrics}
                  for run in groups[name]}
        lengths.append(series(name, str(i), points))
    last = sorted({x for curve in accuracy for x in curve["x"]})[-1]
    panel = {"x": "responses", "y": "accuracy", "percent": True, "title": f"validation, {CURVE}"}
    return {"id": "methods", "title": "Methods", "caption": "Over the responses trained on.", "panels": [
        panel | {"series": accuracy},
        panel | {"title": "its first third", "series": accuracy, "until": last / 3},
        {"title": "response length", "x": "responses", "y": "tokens", "percent": False, "series": lengths}]}

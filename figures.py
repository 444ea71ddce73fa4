"""The figures of the evaluation scheme: one description of curves in panels, drawn as PNG here and on the page by its script.

A figure is {id, title, caption, panels}; a panel {title, x, y, percent, series}; a series {name, role, x, mean, sd, runs}.
Accuracies and ratios are fractions of 1 (percent: True puts percent on the axis); None is a gap.
"""
import math

import numpy as np
from matplotlib.figure import Figure

from reflection import WORDS
from scheme import RATIOS, deviation, finished_epochs, mean, number

COLOURS = {"rl": "#0072B2", "sft": "#D55E00", "base": "#666666"}  # Okabe and Ito's, told apart by colour-blind readers
DASHES = {"rl": "-", "sft": "--", "base": ":"}


def series(name, role, points):
    """The mean, the standard deviation and the single curves of several runs; points: {run name: {x: value or None}}."""
    x = sorted({x for of_run in points.values() for x in of_run})
    columns = [[of_run.get(at) for of_run in points.values()] for at in x]
    return {"name": name, "role": role, "x": x, "mean": [mean(values) for values in columns],
            "sd": [deviation(values) for values in columns],
            "runs": [{"name": run, "y": [of_run.get(at) for at in x]} for run, of_run in points.items()]}


def step_panel(title, rl, key, y, percent=False):
    """A metric of the RL runs over generation steps."""
    points = {run.name: {row["step"]: number(row.get(key)) for row in run.metrics} for run in rl}
    return {"title": title, "x": "generation step", "y": y, "percent": percent, "series": [series("RL", "rl", points)]}


def training_accuracy(rl):
    """Right answers over all responses of a finished epoch, at the number of passes finished with it."""
    points = {}
    for run in rl:
        epochs = {epoch: [row for row in rows if number(row.get("train/accuracy")) is not None]
                  for epoch, rows in finished_epochs(run).items()}
        points[run.name] = {epoch + 1: sum(row["n"] * row["train/accuracy"] for row in rows) / sum(row["n"] for row in rows)
                            for epoch, rows in epochs.items() if rows}
    return {"title": "training accuracy of an epoch", "x": "epoch", "y": "accuracy", "percent": True,
            "series": [series("RL", "rl", points)]}


def accuracy_panel(split, setting, rl, sft, vanilla):
    """Accuracy over epochs under one setting: RL against SFT against the untrained model."""
    def of(group):
        return {run.name: {row["epoch"]: row["accuracy"] for row in run.evals
                           if (row.get("split"), row.get("setting")) == (split, setting)} for run in group}
    drawn = [series(name, role, of(group)) for name, role, group in (("RL", "rl", rl), ("SFT", "sft", sft)) if group]
    if vanilla is not None:
        drawn.append({"name": "untrained", "role": "base", "x": [0], "mean": [vanilla], "sd": [None], "runs": []})
    return {"title": f"{split}, {setting}", "x": "epoch", "y": "accuracy", "percent": True, "series": drawn}


def words_to_show(reflections):
    """The two words that stand out: by how often they occur and by how much that changes from the first epoch to the last,
    the least sum of the two ranks."""
    total = {word: mean(reflections[word]["all steps"]) for word in WORDS}
    change = {word: abs(mean(reflections[word]["last epoch"]) - mean(reflections[word]["first epoch"])) for word in WORDS}
    rank = {word: sum(other[w] > other[word] for other in (total, change) for w in WORDS) for word in WORDS}
    return sorted(WORDS, key=lambda word: (rank[word], -total[word]))[:2]


def make_figures(rl, sft, numbers):
    """The figures of the paper's scheme, as write_page takes them."""
    accuracy = [accuracy_panel(row["split"], row["setting"], rl, sft, row["Vanilla"] and row["Vanilla"]["mean"])
                for row in numbers["accuracy"]]

    def ratio(name):
        return step_panel(name.replace("_", " "), rl, f"reflection/{name}", "fraction", True)

    def word(name):
        return step_panel(f"“{name}”", rl, f"reflection_words/{name}", "occurrences in a step")

    figures = [
        ("accuracy", "Validation and test accuracy", "RL against SFT against the untrained model, at each evaluation.",
         accuracy),
        ("training", "Training accuracy and response length", "Accuracy is that of the responses of an epoch, or of a "
         "step, as they were sampled for training; length is the mean of a step's responses.",
         [training_accuracy(rl), step_panel("training accuracy of a step", rl, "train/accuracy", "accuracy", True),
          step_panel("response length", rl, "response/length", "tokens")]),
        ("reflection", "Reflection", "How many responses hold a reflection word, and how many of those are right.",
         [ratio("reflection_ratio"), ratio("correct_ratio_in_reflection_texts")]),
        ("two_words", "The two reflection words that stand out", "Chosen by how often they occur and how much that changes "
         "from the first epoch to the last.", [word(name) for name in words_to_show(numbers["reflection"])]),
        ("ratios", "All five reflection ratios", "Gaps are steps whose ratio has nothing below the line.",
         [ratio(name) for name in RATIOS]),
        ("words", "All fifteen reflection words", "Occurrences in the responses of a step.", [word(name) for name in WORDS])]
    return [{"id": name, "title": title, "caption": caption, "panels": panels}
            for name, title, caption, panels in figures if panels]


def draw(figure, path):
    """One figure as a PNG file."""
    panels = figure["panels"]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    sheet = Figure(figsize=(4.4 * columns, 3.0 * rows), layout="constrained")
    axes = sheet.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for panel, axis in zip(panels, axes.flat):
        scale = 100 if panel["percent"] else 1

        def scaled(values, scale=scale):
            return np.array([math.nan if v is None else v * scale for v in values])

        for curve in panel["series"]:
            look = {"color": COLOURS[curve["role"]], "linestyle": DASHES[curve["role"]]}
            if curve["role"] == "base":
                axis.axhline(scaled(curve["mean"])[0], label=curve["name"], **look)
                continue
            centre, spread = scaled(curve["mean"]), scaled(curve["sd"])
            for run in curve["runs"]:
                axis.plot(curve["x"], scaled(run["y"]), alpha=0.3, linewidth=0.8, **look)
            axis.fill_between(curve["x"], centre - spread, centre + spread, alpha=0.2, linewidth=0, color=look["color"])
            marker = {"rl": "o", "sft": "s"}[curve["role"]] if len(curve["x"]) < 12 else None
            axis.plot(curve["x"], centre, label=curve["name"], linewidth=1.8, marker=marker, markersize=4, **look)
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel="percent" if panel["percent"] else panel["y"])
        axis.title.set(fontsize=10, parse_math=False)  # a setting's name is not ours to be typeset
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    most = max(range(len(panels)), key=lambda i: len(panels[i]["series"]))
    axes.flat[most].legend(frameon=False)
    sheet.savefig(path, dpi=90, pil_kwargs={"optimize": True})

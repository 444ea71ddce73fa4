"""The figures of the scheme: one description of curves, drawn as PNG here and on the page by its script.

A figure is {id, title, caption, panels}, a panel {title, x, y, percent, series}, a series {name, role, x,
mean, sd, runs}. Accuracies and ratios are fractions of 1 (percent: True puts percent on the axis); None is
a gap.
"""
import math

import numpy as np
from matplotlib.figure import Figure

from reflection import WORDS
from report.scheme import RATIOS, deviation, mean, weighted

LOOKS = {"rl": {"color": "#0072B2", "linestyle": "-", "marker": "o"},  # Okabe and Ito's, for every eye
         "sft": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
         "base": {"color": "#666666", "linestyle": ":"}}
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999999".split()
LOOKS |= {str(i): {"color": COLORS[i % 8], "linestyle": "-" if i < 8 else "--", "marker": "osv^Dx*+"[i % 8]}
          for i in range(24)}


def series(name, role, points):
    """Mean, standard deviation and single curves of several runs; points: {run name: {x: value or None}}."""
    x = sorted({x for of_run in points.values() for x in of_run})
    columns = [[of_run.get(at) for of_run in points.values()] for at in x]
    return {"name": name, "role": role, "x": x, "mean": [mean(values) for values in columns],
            "sd": [deviation(values) for values in columns],
            "runs": [{"name": run, "y": [of_run.get(at) for at in x]} for run, of_run in points.items()]}


def step_panel(title, rl, key, y, percent=False):
    """A metric of the RL runs over generation steps."""
    points = {run.name: {row["step"]: row.get(key) for row in run.metrics} for run in rl}
    return {"title": title, "x": "generation step", "y": y, "percent": percent,
            "series": [series("RL", "rl", points)]}


def training_panel(rl):
    """Right answers over all responses of an epoch, at the number of passes finished with it."""
    points = {}
    for run in rl:
        epochs = {}
        for row in run.metrics:
            epochs.setdefault(row["epoch"] + 1, []).append(row)
        points[run.name] = {epoch: weighted(steps, "train/accuracy") for epoch, steps in epochs.items()}
    return {"title": "training accuracy of an epoch", "x": "epoch", "y": "accuracy", "percent": True,
            "series": [series("RL", "rl", points)]}


def accuracy_panel(row_of_table, rl, sft):
    """Accuracy over epochs under one setting: RL against SFT against the untrained model."""
    split, setting, vanilla = (row_of_table[key] for key in ("split", "setting", "Vanilla"))
    drawn = []
    for name, role, group in (("RL", "rl", rl), ("SFT", "sft", sft)):
        points = {run.name: {row["epoch"]: row["accuracy"] for row in run.evals
                             if (row["split"], row["setting"]) == (split, setting)} for run in group}
        drawn += [series(name, role, points)] if group else []
    if vanilla is not None:
        drawn.append(series("untrained", "base", {"untrained": {0: vanilla["mean"]}}) | {"runs": []})
    return {"title": f"{split}, {setting}", "x": "epoch", "y": "accuracy", "percent": True, "series": drawn}


def make_figures(rl, sft, numbers):
    """The figures of the paper's scheme, those without a panel left out."""
    words = [word for word in WORDS if any(numbers["reflection"][word]["all steps"])]
    figures = (
        ("accuracy", "Validation and test accuracy",
         "RL against SFT against the untrained model, at each evaluation.",
         [accuracy_panel(row, rl, sft) for row in numbers["accuracy"]]),
        ("training", "Training accuracy and response length",
         "Of the responses of a step, or of an epoch, as they were sampled for training.",
         [training_panel(rl),
          step_panel("training accuracy of a step", rl, "train/accuracy", "accuracy", True),
          step_panel("response length", rl, "response/length", "tokens")]),
        ("ratios", "Reflection ratios", "Gaps are steps whose ratio has nothing below the line.",
         [step_panel(name.replace("_", " "), rl, f"reflection/{name}", "fraction", True) for name in RATIOS]),
        ("words", "Reflection words", "Occurrences in the responses of a step, of those words that occur.",
         [step_panel(f"“{word}”", rl, f"reflection_words/{word}", "occurrences") for word in words]))
    return [{"id": name, "title": title, "caption": caption, "panels": panels}
            for name, title, caption, panels in figures if panels]


def draw_curve(axis, curve, scale):
    """One series: its mean as a line, one standard deviation as a band, single runs faint."""
    look = LOOKS[curve["role"]]
    line = {key: value for key, value in look.items() if key != "marker"}
    centre, sd, *runs = (np.array([math.nan if v is None else v * scale for v in values])
                         for values in (curve["mean"], curve["sd"], *(run["y"] for run in curve["runs"])))
    if curve["role"] == "base" and len(curve["x"]) == 1:  # a level
        axis.axhline(centre[0], label=curve["name"], **line)
        return
    for run in runs:
        axis.plot(curve["x"], run, alpha=0.3, linewidth=0.8, **line)
    axis.fill_between(curve["x"], centre - sd, centre + sd, alpha=0.2, linewidth=0, color=look["color"])
    style = look if len(centre) < 12 else line
    axis.plot(curve["x"], centre, label=curve["name"], linewidth=1.8, markersize=4, **style)


def draw(figure, path):
    """One figure as a PNG file."""
    panels = figure["panels"]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    sheet = Figure(figsize=(4.4 * columns, 3.0 * rows), layout="constrained")
    axes = sheet.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    for panel, axis in zip(panels, axes):
        for curve in panel["series"]:
            draw_curve(axis, curve, 100 if panel["percent"] else 1)
        unit = "percent" if panel["percent"] else panel["y"]
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=unit)
        axis.title.set(fontsize=10, parse_math=False)  # a setting's name is not ours to be typeset
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    sheet.savefig(path, dpi=90, pil_kwargs={"optimize": True})

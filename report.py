"""Finished runs -> the paper's figures and tables, and one page on which a person reads what the model wrote.

    python report.py out/toy-0 out/toy-1 out/toy-2                                    # three seeds of one setting
    python report.py out/toy-0 out/toy-1 out/toy-2 --sft out/toy_sft-0 --out=report   # beside the SFT baseline

Reads what runs leave (config.py, metrics.jsonl, eval.jsonl, samples.jsonl) and writes to the folder `out`: index.html, one
file that opens from disk with no network; report.md; numbers.json, every number of the tables unrounded; figures/*.png.

The scheme is MAYE's (arXiv 2504.02587): accuracy over epochs, length and reflection over generation steps; a curve is the
mean over runs, its band one standard deviation (n - 1); tables have the mean and the maximum over epochs, averaged over
runs. What we add:
 1. Reflection ratios of an epoch are pooled counts, never means of steps' ratios.
 2. Every accuracy has a 95% interval, for another seed (Student's t over the runs) and for other problems (Wilson over the
    n problems), the two half-widths added in quadrature; of one run only the latter is known.
"""
import json
import os
import re

from configurator import UserError, check_at_least, configure, listed
from data import NAMES
from figures import draw, make_figures
from page import read_samples, write_page
from reflection import WORDS
from scheme import (COLUMNS, RATIOS, accuracy_numbers, correlation_numbers, deviation, length_numbers, mean, read_run,
                    reflection_numbers)

# ---------------------------------------------------------------------------------------------------------------------
runs = ""  # folders of finished RL runs, seeds of one setting; bare arguments set it
sft = ""  # folders of SFT runs to compare with: --sft out/toy_sft-0 out/toy_sft-1; '' = none
out = "report"  # folder that the report is written to
max_samples = 5000  # responses on the page at most; whole problems are left out beyond it
images = "."  # folder that holds the runs' pictures; those outside it are not put on the page, whatever samples.jsonl says
# ---------------------------------------------------------------------------------------------------------------------

LEGEND = "Line: mean over runs; band: one standard deviation; faint: single runs."
MAY_DIFFER = ("seed", "out_dir", "logger", "save_samples", "save_every_steps", "log_every", "max_tokens_per_microbatch",
              "gpu_memory_utilization", "activation_checkpointing", "max_logprob_diff")  # knobs that make no other setting
# Tab. 3 of the paper, percent: {(data set, model): {setting: (validation, test)}}, five columns each, None where it has none
PAPER = {
    ("mm_math5k", "Qwen2-VL-7B"): {
        "pass@8 T=1 top_p=1": ((36.0, 46.8, 48.5, 53.0, 55.7), (29.0, 25.2, 35.2, 32.0, 42.7)),
        "pass@1 T=0.6 top_p=1": ((16.0, 19.9, 23.4, 29.0, 31.0), (11.0, 8.7, 14.1, 12.0, 19.7)),
        "pass@1 T=0.01 top_p=0.001": ((16.0, 18.8, 24.1, 25.0, 31.0), (11.0, 9.6, 14.1, 16.0, 20.7))},
    ("mm_math5k", "Qwen2.5-VL-7B"): {
        "pass@8 T=1 top_p=1": ((65.0, 60.6, 64.8, 66.0, 70.0), (54.0, 35.2, 54.6, 44.0, 61.8)),
        "pass@1 T=0.6 top_p=1": ((36.0, 30.8, 39.8, 39.0, 47.2), (28.0, 13.3, 29.0, 20.0, 35.2)),
        "pass@1 T=0.01 top_p=0.001": ((35.0, 31.2, 40.3, 37.0, 46.2), (28.0, 15.0, 31.8, 20.0, 38.3))},
    ("geometry3k", "Qwen2-VL-7B"): {
        "pass@8 T=1 top_p=1": ((41.7, None, 52.5, None, 57.0), (46.6, None, 58.0, None, 62.1)),
        "pass@1 T=0.6 top_p=1": ((18.3, None, 25.2, None, 30.3), (20.3, None, 30.3, None, 34.3)),
        "pass@1 T=0.01 top_p=0.001": ((18.7, None, 26.7, None, 31.1), (23.1, None, 31.1, None, 34.1))},
    ("geometry3k", "Qwen2.5-VL-7B"): {
        "pass@8 T=1 top_p=1": ((63.0, None, 60.8, None, 64.4), (69.4, None, 69.3, None, 71.8)),
        "pass@1 T=0.6 top_p=1": ((31.3, None, 33.4, None, 37.9), (38.6, None, 41.5, None, 44.6)),
        "pass@1 T=0.01 top_p=0.001": ((35.3, None, 34.6, None, 37.7), (40.6, None, 42.0, None, 45.0))}}


def paper_setting(config):
    """The key of PAPER that a run reproduces, or None."""
    files = [os.path.basename(str(config.get(knob, ""))) for knob in ("train_data", "val_data", "test_data")]
    for dataset, model in PAPER:
        ours = all(file in ("", f"{name}.jsonl") for file, name in zip(files, NAMES[dataset]))
        if ours and files[0] and model in str(config.get("model", "")):
            return dataset, model
    return None


def percent(cell, group):
    """An accuracy with its interval, in percent; where not all runs of the group have it, of how many it is the mean."""
    if cell is None:
        return "–"
    of = "" if len(cell["runs"]) == len(group) else f" ({len(cell['runs'])} of {len(group)} runs)"
    return f"{cell['mean']:.1%} ({cell['low']:.1%} to {cell['high']:.1%})".replace("%", "") + of


def spread(values, form):
    """Mean and, for several runs, standard deviation."""
    centre, sd = mean(values), deviation(values)
    return "–" if centre is None else form.format(centre) + (f" ± {form.format(sd)}" if sd is not None else "")


def make_tables(numbers, rl, sft, setting_of_paper):
    """The tables as write_page takes them: cells are texts."""
    accuracy = []
    for row in numbers["accuracy"]:
        of_whom = zip(COLUMNS, (rl, sft, rl, sft, rl))
        accuracy.append([row["split"], row["setting"], *(percent(row[column], group) for column, group in of_whom),
                         "/".join(str(n) for n in sorted({row[column]["n"] for column in COLUMNS if row[column]}))])
        theirs = PAPER.get(setting_of_paper, {}).get(row["setting"])
        if theirs and row["split"] in ("validation", "test"):
            values = theirs[row["split"] == "test"]
            accuracy.append(["", "the paper", *("–" if v is None else f"{v:.1f}" for v in values), ""])
    spans = ("first epoch", "last epoch", "all steps")
    reflection = numbers["reflection"]
    length = [[row["run"], *("–" if value is None else f"{value:.1f}" for value in list(row.values())[1:])]
              for row in numbers["length"]]
    if len(rl) > 1:
        columns = list(zip(*(list(row.values())[1:] for row in numbers["length"])))
        for name, of in (("mean over runs", mean), ("standard deviation over runs", deviation)):
            found = [of(column) for column in columns]
            length.append([name, *("–" if value is None else f"{value:.1f}" for value in found)])
    correlations = [[row["run"], "–" if row["r"] is None else f"{row['r']:.2f}",
                     "–" if row["ci95"] is None else "{:.2f} to {:.2f}".format(*row["ci95"]), str(row["steps"])]
                    for row in numbers["correlation"]]
    counted = f"{len(rl)} RL run{'s' * (len(rl) > 1)}" + f" and {len(sft)} SFT run{'s' * (len(sft) > 1)}" * bool(sft)
    return [{"id": name, "title": title, "caption": caption, "columns": columns, "rows": rows}
            for name, title, caption, columns, rows in (
        ("accuracy", "Accuracy", f"Percent, averaged over {counted}; mean and max are over a run's evaluations of its "
         "trained model, Vanilla is the untrained one. In brackets 95% for another seed (Student's t over the runs) and for "
         "other problems (Wilson, n of them), in quadrature; for Vanilla and for one run other problems only. The max is "
         "chosen on the very problems it is measured on, so it reads high.",
         ["split", "setting", *COLUMNS, "n"], accuracy),
        ("ratios", "Reflection ratios", "Counts of the period pooled within a run; mean ± standard deviation over runs.",
         ["ratio", *spans], [[name, *(spread(reflection[name][span], "{:.3f}") for span in spans)] for name in RATIOS]),
        ("words", "Reflection words", "Occurrences in the period; mean ± standard deviation over runs.",
         ["word", *spans], [[name, *(spread(reflection[name][span], "{:.1f}") for span in spans)] for name in WORDS]),
        ("correlation", "Does reflection follow length?", "Pearson's r of response length with reflection ratio over a run's "
         "steps; of all runs, about each run's own means. With a moving-block bootstrap interval (95%; blocks of the square "
         "root of the steps; rather too narrow for less than a hundred steps). Both may follow training without one causing "
         "the other.", ["run", "r", "95%", "steps"], correlations),
        ("length", "Response length and the seed", "Tokens.",
         ["run", *list(numbers["length"][0])[1:]], length))]


def markdown(report):
    """The report as Markdown, figures linked."""
    def cell(text):  # names and settings may be a stranger's: no HTML, link or picture of theirs
        return re.sub(r"[\\`|<>\[\]!]", r"\\\g<0>", " ".join(text.split()))
    lines = [f"# {cell(report['title'])}", "", *(f"* {cell(note)}" for note in report["notes"]), ""]
    for table in report["tables"]:
        lines += [f"## {table['title']}", "", table["caption"], ""]
        rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows] + [""]
    for figure in report["figures"]:
        lines += [f"## {figure['title']}", "", f"{figure['caption']} {LEGEND}", "",
                  f"![{figure['title']}](figures/{figure['id']}.png)", ""]
    return "\n".join(lines)


def differences(group):
    """A note on the knobs in which runs that are averaged differ, seeds and paths aside; none where they agree."""
    notes = [f"{run.name} has no config.py that can be read" for run in group if not run.config]
    group = [run for run in group if run.config]
    knobs = sorted({knob for run in group for knob in run.config} - set(MAY_DIFFER))
    differ = [f"{knob} ({' / '.join(repr(run.config.get(knob)) for run in group)})" for knob in knobs
              if len({repr(run.config.get(knob)) for run in group}) > 1]
    names = ", ".join(run.name for run in group)
    if differ:
        notes.append(f"{names} are averaged but are not seeds of one setting: they differ in {', '.join(differ)}")
    return notes


def uneven(group):
    """A note where runs that are averaged have not equally many steps."""
    steps = ", ".join(f"{run.name} {len(run.metrics)}" for run in group)
    if len({len(run.metrics) for run in group}) < 2:
        return []
    return [f"not equally many steps ({steps}): where the shorter curves end, the mean goes on over the others"]


def unlike(everything):
    """Notes where runs that are compared were not evaluated alike."""
    notes, first = [], everything[0]
    for what, keys in (("at the same epochs", ("epoch",)), ("on as many problems of the same splits under the same settings",
                                                           ("split", "setting", "n"))):
        seen = {run.name: {tuple(row[key] for key in keys) for row in run.evals} for run in everything}
        if others := [name for name in seen if seen[name] != seen[first.name]]:
            notes.append(f"{', '.join(others)}: not evaluated {what} as {first.name}, so these means and maxima do not "
                         "compare like with like")
    return notes


if __name__ == "__main__":
    config = configure(globals(), positional="runs", several=("runs", "sft"))
    if not listed(runs):
        raise UserError("command line: which runs? python report.py out/toy-0 out/toy-1 --sft out/toy_sft-0 --out=report")
    check_at_least(config, 0, "max_samples")
    notes = []
    folders = [(os.path.normpath(folder), role) for role, text in (("rl", runs), ("sft", sft)) for folder in listed(text)]
    real = [os.path.realpath(folder) for folder, _ in folders]
    if len(set(real)) < len(real):
        raise UserError("command line: a run is given twice, it would count twice")
    if not out or os.path.isfile(out):
        raise UserError(f"command line: out must be a folder to write to, got {out!r}")
    names = [os.path.basename(path) for path in real]
    everything = [read_run(folder, folder if names.count(name) > 1 else name, role, notes)
                  for (folder, role), name in zip(folders, names)]
    rl, baseline = ([run for run in everything if run.role == role] for role in ("rl", "sft"))
    for group in (rl, baseline):
        notes += differences(group) + uneven(group)
        notes += [f"{run.name}: no eval.jsonl, so no accuracies" for run in group if not run.evals]
    notes += unlike([run for run in everything if run.evals] or everything)

    numbers = {"accuracy": accuracy_numbers(rl, baseline), "reflection": reflection_numbers(rl),
               "correlation": correlation_numbers(rl), "length": length_numbers(rl)}
    figures = make_figures(rl, baseline, numbers)
    tables = make_tables(numbers, rl, baseline, paper_setting(rl[0].config))
    samples, left_out = read_samples([(run.name, run.role, run.folder) for run in everything], max_samples, images)
    report = {"title": " and ".join(", ".join(run.name for run in group) for group in (rl, baseline) if group),
              "notes": notes + left_out, "figures": figures, "tables": tables, "samples": samples,
              "configs": [{"run": run.name, "text": run.config_text or "no config.py in this run"} for run in everything]}

    os.makedirs(f"{out}/figures", exist_ok=True)
    for figure in figures:
        draw(figure, f"{out}/figures/{figure['id']}.png")
    for name, text in (("numbers.json", json.dumps(numbers, indent=1)), ("report.md", markdown(report))):
        with open(f"{out}/{name}", "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    write_page(f"{out}/index.html", report)
    print(*report["notes"], sep="\n", end="\n" * bool(report["notes"]))
    print(f"{out}/index.html, {out}/report.md, {out}/numbers.json and {len(figures)} figures in {out}/figures")

"""Finished runs -> the paper's figures and tables, and one page on which a person reads what the model wrote.

    python -m report out/toy-0 out/toy-1 out/toy-2                       # three seeds of one setting
    python -m report out/toy-0 out/toy-1 out/toy-2 --sft out/toy_sft-0   # beside the SFT baseline
    python -m report --methods out/grpo-0 out/grpo-1 out/rloo-0          # by method (report/methods.py)

Reads what runs leave (config.py, metrics.jsonl, eval.jsonl, samples.jsonl) and writes to a folder:
index.html, one file that opens from disk without a network; report.md; numbers.json, the tables' numbers
unrounded; figures/*.png.

The scheme is MAYE's (arXiv 2504.02587): accuracy over epochs, length and reflection over generation steps; a
curve is the mean over runs, its band one standard deviation (n - 1); tables have the mean and the maximum
over epochs, averaged over runs. What we add:
 1. Reflection ratios of an epoch are pooled counts, never means of steps' ratios.
 2. Every accuracy has a 95% interval, for another seed (Student's t over the runs) and for other problems
    (Wilson); of one run only the latter is known.
"""
import argparse
import json
import os
import re
import sys

from configurator import UserError
from reflection import WORDS
from report.figures import draw, make_figures
from report.methods import method_figure, method_numbers, method_tables
from report.page import read_samples, write_page
from report.paper import paper_numbers
from report.scheme import (COLUMNS, PERIODS, RATIOS, accuracy_numbers, deviation, length_numbers, mean,
                           read_run, reflection_numbers)

LEGEND = "Line: mean over runs; band: one standard deviation; faint: single runs."
MAY_DIFFER = {"seed", "out_dir", "logger"}  # between runs of one setting


# -----------------------------------------------------------------------------
# notes

def knobs_of(run):
    """{knob: its value as Python text} of a run's config.py, which is never run."""
    return dict(re.findall(r"^(\w+) = (.*)$", run.config, re.MULTILINE))


def make_notes(rl, sft):
    """What a reader must know: runs that are averaged and differ, or that were evaluated unlike."""
    notes = []
    for group in (rl, sft):
        names, knobs = ", ".join(run.name for run in group), [knobs_of(run) for run in group]
        for knob in sorted({knob for of_run in knobs for knob in of_run} - MAY_DIFFER):
            values = [of_run.get(knob, "none") for of_run in knobs]
            if len(set(values)) > 1:
                notes.append(f"{names} are averaged but differ in {knob} ({' / '.join(values)})")
    evaluated = {run.name: {(row["epoch"], row["split"], row["setting"], row["n"]) for row in run.evals}
                 for run in rl + sft}
    notes += [f"{name}: no eval.jsonl, so no accuracies" for name in evaluated if not evaluated[name]]
    first, *others = [name for name in evaluated if evaluated[name]] or [None]
    notes += [f"{name} was not evaluated like {first}: other epochs, settings or numbers of problems"
              for name in others if evaluated[name] != evaluated[first]]
    return notes


# -----------------------------------------------------------------------------
# tables: cells are texts

def shown(value, form):
    """The value in a table, a dash for None."""
    return "–" if value is None else format(value, form)


def spread(values, form):
    """Mean and, for several runs, standard deviation."""
    sd = deviation(values)
    return shown(mean(values), form) + ("" if sd is None else f" ± {sd:{form}}")


def percent(cell, runs):
    """An accuracy with its interval, in percent; where not all runs have it, of how many it is the mean."""
    if cell is None:
        return "–"
    text = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * cell[key] for key in ("mean", "low", "high")))
    return text if len(cell["runs"]) == len(runs) else f"{text}, {len(cell['runs'])} of {len(runs)} runs"


def accuracy_rows(table, rl, sft):
    """The rows of Tab. 3, the paper's own numbers below those of a setting that it has."""
    rows, knobs = [], knobs_of(rl[0])
    for row in table:
        cells = [percent(row[column], runs) for column, runs in zip(COLUMNS, (rl, sft, rl, sft, rl))]
        problems = sorted({row[column]["n"] for column in COLUMNS if row[column]})
        rows.append([row["split"], row["setting"], *cells, "/".join(map(str, problems))])
        theirs = paper_numbers(knobs, row["split"], row["setting"])
        if theirs:
            rows.append(["", "the paper", *(shown(value, ".1f") for value in theirs), ""])
    return rows


def length_rows(table):
    """The rows of the table of lengths; for several runs, with their mean and standard deviation below."""
    forms = dict.fromkeys(("first step", *PERIODS), ".1f") | {"r": ".2f", "r, last epoch": ".2f"}
    rows = [[row["run"], *(shown(row[key], form) for key, form in forms.items())] for row in table]
    if len(table) > 1:
        columns = {key: [row[key] for row in table] for key in forms}
        rows.append(["mean ± sd", *(spread(columns[key], form) for key, form in forms.items())])
    return rows


def make_tables(numbers, rl, sft):
    """[{title, caption, columns, rows}]."""
    def reflection(names, form):
        found = numbers["reflection"]
        return [[name, *(spread(found[name][period], form) for period in PERIODS)] for name in names]

    tables = (
        ("Accuracy",
         f"Percent, averaged over runs ({len(rl)} of RL, {len(sft)} of SFT). Mean and max are over a run's "
         "evaluations of its trained model, Vanilla is the untrained one. In brackets 95%, for another seed "
         "(Student's t) and for other problems (Wilson, n of them) in quadrature; for Vanilla and one run "
         "other problems only. The max is chosen on its own problems, so it reads high.",
         ["split", "setting", *COLUMNS, "n"], accuracy_rows(numbers["accuracy"], rl, sft)),
        ("Reflection ratios", "Of a run's counts of the period, pooled; mean ± standard deviation over runs.",
         ["ratio", *PERIODS], reflection(RATIOS, ".3f")),
        ("Reflection words", "Occurrences in the period; mean ± standard deviation over runs.",
         ["word", *PERIODS], reflection(WORDS, ".1f")),
        ("Response length", "Tokens. r is Pearson's correlation of response length with reflection ratio "
         "over a run's steps; both may follow training without one causing the other.",
         ["run", "first step", *PERIODS, "r", "r, last epoch"], length_rows(numbers["length"])))
    return [dict(zip(("title", "caption", "columns", "rows"), table)) for table in tables]


def markdown(report):
    """The report as Markdown, figures linked."""
    def cell(text):  # names and settings may be a stranger's: no HTML, link or picture of theirs
        return re.sub(r"[\\`|<>\[\]!]", r"\\\g<0>", " ".join(text.split()))

    lines = [f"# {cell(report['title'])}", "", *(f"* {cell(note)}" for note in report["notes"]), ""]
    for table in report["tables"]:
        rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        lines += [f"## {table['title']}", "", table["caption"], ""]
        lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows] + [""]
    for figure in report["figures"]:
        lines += [f"## {figure['title']}", "", f"{figure['caption']} {LEGEND}", "",
                  f"![{figure['title']}](figures/{figure['id']}.png)", ""]
    return "\n".join(lines)


# -----------------------------------------------------------------------------

def fail(message):
    """UserError of the command line."""
    raise UserError(f"command line: {message}")


def parse(argv):
    """The command line's arguments."""
    parser = argparse.ArgumentParser("python -m report", description="Runs as figures, tables and a page.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="out_dir of an RL run; several are seeds")
    parser.add_argument("--methods", action="store_true", help="by method: runs named alike up to -NUMBER")
    parser.add_argument("--sft", metavar="RUN", nargs="+", default=[], help="SFT runs to compare with")
    parser.add_argument("--out", default="out/report", help="folder that the report is written to")
    parser.add_argument("--images", default=".", help="folder of the runs' pictures; others are not shown")
    parser.add_argument("--max_samples", type=int, default=5000, help="responses on the page at most")
    parser.error = fail  # one line, where argparse prints its usage
    return parser.parse_args(argv)


def write_texts(out, numbers, report):
    """numbers.json and report.md."""
    for name, text in (("numbers.json", json.dumps(numbers, indent=1)), ("report.md", markdown(report))):
        with open(f"{out}/{name}", "w", encoding="utf-8", errors="replace") as file:
            file.write(text)


def write_methods(out, runs):
    """The report of several methods: tables and a figure, without a page."""
    numbers = method_numbers(runs)
    figure = method_figure(numbers, runs)
    draw(figure, f"{out}/figures/methods.png")
    write_texts(out, numbers, {"title": ", ".join(numbers), "notes": [], "figures": [figure],
                               "tables": method_tables(numbers)})
    print(f"{out}/report.md, numbers.json, figures/methods.png")


def main(argv=None):
    """Read the runs, write the report, print its notes and where it is."""
    arguments = parse(argv)
    folders, out = [*arguments.runs, *arguments.sft], arguments.out
    real = [os.path.realpath(folder) for folder in folders]
    if len(set(real)) < len(real):
        fail("a run is given twice, it would count twice")
    names = [os.path.basename(path) for path in real]
    names = [folder if names.count(name) > 1 else name for folder, name in zip(folders, names)]
    roles = ["any" if arguments.methods else "rl"] * len(arguments.runs) + ["sft"] * len(arguments.sft)
    runs = [read_run(folder, name, role) for folder, name, role in zip(folders, names, roles)]
    rl, sft = ([run for run in runs if run.role == role] for role in ("rl", "sft"))
    os.makedirs(f"{out}/figures", exist_ok=True)
    if arguments.methods:
        return write_methods(out, runs)

    numbers = {"accuracy": accuracy_numbers(rl, sft), "reflection": reflection_numbers(rl),
               "length": length_numbers(rl)}
    samples, images, notes = read_samples(runs, arguments.max_samples, arguments.images)
    report = {"title": " and ".join(", ".join(run.name for run in group) for group in (rl, sft) if group),
              "notes": make_notes(rl, sft) + notes, "figures": make_figures(rl, sft, numbers),
              "tables": make_tables(numbers, rl, sft), "samples": samples, "images": images,
              "configs": [{"run": run.name, "text": run.config or "no config.py"} for run in runs]}

    for figure in report["figures"]:
        draw(figure, f"{out}/figures/{figure['id']}.png")
    write_texts(out, numbers, report)
    write_page(f"{out}/index.html", report)
    print(*report["notes"], f"{out}/index.html, report.md, numbers.json, figures/", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

"""Time and memory of the parts of a step of train_rl.py, alone or next to another way to take it.

    python -m bench config/toy.py                              # the parts of a step
    python -m bench config/toy.py --against=plain              # next to the textbook's way
    python -m bench config/toy.py --against=padded,plain       # and next to our own with padded rows
    python -m bench config/toy.py --against=trl                # pip install -r bench/requirements.txt
    python -m bench config/toy.py --sizes="hidden_size=512 num_hidden_layers=8" --max_new_tokens=128

No step is copied here. Our side is train_rl.py as it stands, a process of its own in each round; a fork of it
is timed by running this in the fork. plain and padded are train_rl.py as well, with other functions in the
place of some of model.py's (ways.py); trl is TRL's GRPOTrainer (trl_side.py). All numbers are those that a
run writes to its metrics.jsonl. Any other --key=value is a knob of train_rl.py and goes to every side; unless
it is given, learning_rate is 0: the same work, and responses stay as long as they were.

The sides take turns, so a machine that slows down slows all of them, and a ratio is of neighbours in time: of
each round their seconds per response token over ours, above 1 where ours is faster. A run's first step, the
warm-up, is left out. Seconds are medians over a run's steps, then over the rounds (least to most). Memory is
the process's peak, or its GPU's. A run ends with a checkpoint, as ever; its folder is removed after it.
"""
import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile

from configurator import UserError, excepthook, listed

# this process imports no torch: on Linux a child's peak memory begins at its parent's
SIDES = {"ours": ["train_rl.py"], "plain": ["-m", "bench.ways", "plain"],
         "padded": ["-m", "bench.ways", "padded"], "trl": ["-m", "bench.trl_side"]}
PARTS = ("rollout", "trajectory", "update", "sync", "trajectory+update", "step")
PACKAGES = ("torch", "transformers", "trl", "vllm")


def fail(message):
    raise UserError(f"bench: {message}; see --help")


def make_parser(name, doc):
    """An argparse parser of config files and flags, whose errors are UserErrors."""
    parser = argparse.ArgumentParser(name, allow_abbrev=False, description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("config", nargs="+", help="config files of train_rl.py")
    return parser


def parse(argv):
    """(arguments, {key: value} of the other flags, the knobs of train_rl.py)."""
    parser = make_parser("python -m bench", __doc__)
    parser.add_argument("--against", default="", help="other sides: trl, plain, padded, or several")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run, after the warm-up")
    parser.add_argument("--sizes", default="", help="random weights in the shape of the config's model but "
                        "for these: 'vocab_size=4096 vision.depth=4'")
    parser.add_argument("--trl_rows", type=int, default=64, help="TRL's per_device_train_batch_size")
    parser.add_argument("--out", default="out/bench.json", help="every number, and the command")
    arguments, others = parser.parse_known_args(argv)
    knobs = {}
    for word in others:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals or key in ("max_steps", "out_dir"):
            fail(f"{word} is no --key=value that it passes on (it sets max_steps, by --steps, and out_dir)")
        knobs[key] = value
    for word in set(listed(arguments.against)) - {"trl", "plain", "padded"}:
        fail(f"--against knows trl, plain and padded, not {word!r}")
    if arguments.rounds < 1 or arguments.steps < 1:
        fail("--rounds and --steps must be at least 1")
    return arguments, knobs


def run(command, what):
    """Runs python with the words of command; UserError with what it said last when it fails."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [""]
        raise UserError(f"bench: {what} ended with status {done.returncode}: {said[-1]}")


def seconds(row, part):
    """Of a part of a step, from its object in metrics.jsonl."""
    return sum(row[f"time/{name}_s"] for name in part.split("+"))


def peak(steps):
    return max(row["memory/peak_gb"] for row in steps)


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "all": values}


def summarise(rounds):
    """{part: seconds}, and peak_gb, of a side's rounds, each a list of steps; spreads over the rounds."""
    summary = {part: spread([statistics.median(seconds(row, part) for row in steps) for steps in rounds])
               for part in PARTS}
    return summary | {"peak_gb": spread([peak(steps) for steps in rounds])}


def ratios(ours, theirs):
    """{part: spread over the rounds of their seconds per response token over ours}, and so for peak_gb."""
    def cost(steps, part):
        return statistics.median(seconds(row, part) / row["tokens/response"] for row in steps)
    made = {part: spread([cost(b, part) / cost(a, part) for a, b in zip(ours, theirs)]) for part in PARTS}
    return made | {"peak_gb": spread([peak(b) / peak(a) for a, b in zip(ours, theirs)])}


def largest_difference(ours, theirs):
    """(difference, its metric): of all metrics but times and memory, over all steps of all rounds."""
    return max((abs((a[name] or 0) - (b[name] or 0)), name)
               for steps, others in zip(ours, theirs) for a, b in zip(steps, others)
               for name in a if not name.startswith(("time/", "memory/")))


def show(name, tokens, summary, ratio):
    """Prints the table of a side with so many response tokens a step; ratio: of it over ours, {} for ours."""
    print(f"\n{name:18} seconds    (least to most)    tokens/s" + ("  times ours" if ratio else ""))
    for part, s in summary.items():
        rate = "" if part == "peak_gb" or not s["median"] else f"{tokens / s['median']:,.0f}"
        print(f"{part:18} {s['median']:7.3f} {'({least:.3f} to {most:.3f})'.format(**s):>18} {rate:>11}"
              + ("  {median:.2f} ({least:.2f} to {most:.2f})".format(**ratio[part]) if ratio else ""))


def main(argv):
    """Runs the sides by turns, prints their tables, writes --out."""
    arguments, given = parse(argv)
    names = ["ours", *listed(arguments.against)]
    knobs = {"eval_every_epochs": 0, "learning_rate": 0.0, "val_data": "", "test_data": "", **given,
             "max_steps": arguments.steps + 1}
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    rounds = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        def flags():
            return [*arguments.config, *(f"--{key}={value}" for key, value in knobs.items())]
        if arguments.sizes:
            run(["-m", "bench.sizes", f"{folder}/model", arguments.sizes, *flags()], "making the model")
            knobs["model"] = f"{folder}/model"
        for number in range(arguments.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                out_dir = f"{folder}/{name}"
                rows = [str(arguments.trl_rows)] if name == "trl" else []
                run([*SIDES[name], *rows, *flags(), f"--out_dir={out_dir}"], f"the side {name}")
                with open(f"{out_dir}/metrics.jsonl", encoding="utf-8") as file:
                    steps = [json.loads(line) for line in file]
                rounds[name].append(steps[1:])
                shutil.rmtree(out_dir)
                print(f"round {number + 1}/{arguments.rounds}: {name}, steps of "
                      + ", ".join(f"{seconds(row, 'step'):.2f}" for row in steps) + " s", flush=True)

    versions = {p.name: p.version for name in PACKAGES for p in importlib.metadata.distributions(name=name)}
    commit = os.popen("git describe --always --dirty 2>&1").read().strip()
    result = {"command": shlex.join(["python", "-m", "bench", *argv]), "commit": commit, "versions": versions,
              "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS="
              f"{os.environ.get('OMP_NUM_THREADS', '')!r}", "sides": {}}
    for name, its in rounds.items():
        side = result["sides"][name] = {"summary": summarise(its), "ratios": {}, "rounds": its}
        if name != "ours":
            side["ratios"] = ratios(rounds["ours"], its)
        tokens = statistics.median(row["tokens/response"] for steps in its for row in steps)
        show(name, tokens, side["summary"], side["ratios"])
        if name in ("plain", "padded"):
            side["largest_difference"] = largest_difference(rounds["ours"], its)
            print("largest difference of a metric from ours: {:.1e}, {}".format(*side["largest_difference"]))
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    sys.excepthook = excepthook
    main(sys.argv[1:])

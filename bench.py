"""Time, tokens a second, peak memory and FLOPs of each part of a step of train_rl.py; also next to another way to do it.

    python bench.py config/toy.py                                   # the parts of a step
    python bench.py config/toy.py --against=plain                   # and the textbook's way of log-probabilities and update
    python bench.py config/toy.py --against=trl                     # and TRL's GRPOTrainer (bench_trl.py)
    python bench.py config/toy.py --sizes="hidden_size=512 num_hidden_layers=8" --response_tokens=128   # random weights

Takes every knob of train_rl.py besides its own, and times train_rl.py's own functions, one after the other: without images
read ahead, or while vLLM samples. One process, on a CPU or one GPU.
Each side is a process of its own, so neither memory nor caches mix. They take turns, a step each, the others waiting: a
machine that slows down slows all of them, and the ratios are of neighbours in time. Prints tables, writes JSON.

Seconds are medians over the steps (least to most); a ratio is the median over rounds of the other's time per response token
over ours. CPU seconds, of all threads, are steadier where others use the machine (OMP_NUM_THREADS=1: no thread then waits
busily for another). Peak memory, weights included, is the process's (VmHWM, reset before each part) or its GPU allocations'.
Both are of the trainer's process, not of vLLM's.
Model FLOPs are what the model must do, counted from its sizes, on real tokens: no padding, no recomputing.
    language model, query of q and response of r tokens, n = q + r:   2 (layers' matrices) n + 4 L H d n (n + 1) / 2 + 2 h V r
    vision tower, p patches:   2 (blocks' and patch embedding's matrices) p + 2 (merger's) p / 4 + 4 h p (patches in view)
    rollout, old and reference log-probabilities: the former; vision: the latter; update: 3 times the former, since backward
    is twice forward
Utilisation is FLOPs / second over the rate of a matrix product of the model's shape, measured anew in each step.
"""
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

import train_rl
from bench_sides import MARK, Ours, Plain, our_steps
from configurator import UserError, check_at_least, configure, read_knobs, save_config
from model import local_folder

# ---------------------------------------------------------------------------------------------------------------------
against = ""  # '' = this code alone; 'plain': padded batches as they come, tower in each forward, full logits; 'trl'
steps = 5  # measured steps of each side
warmup_steps = 1  # steps before them that are not counted
sizes = ""  # random weights in the shape of model's config but for these: 'num_hidden_layers=8 vision.depth=4'; '' = model
response_tokens = 0  # every response has exactly so many tokens (EOS is banned); 0 = as they come, up to max_new_tokens
frozen = True  # True sets learning_rate to 0: the same work, but responses keep their lengths from step to step
eval_problems = 8  # problems of val_data in the part evaluation; 0 = no evaluation
trl_rows = "16,64"  # TRL's per_device_train_batch_size: each that divides minibatch_size is run; 'default': see bench_trl.py
trl_python = ""  # python that has TRL; '' = this one
out = "out/bench.json"  # every step of every side, and the summary
side = ""  # which side a child process is; set by bench.py itself
# ---------------------------------------------------------------------------------------------------------------------

LEARN = ("vision", "old_logprobs", "ref_logprobs", "update")  # Steps III and IV without the judge


def split_arguments(argv, own):
    """(arguments for this script's knobs, those for train_rl.py's): config files and all other knobs are the latter's."""
    mine, others, queue = [], [], list(argv)
    while queue:
        argument = queue.pop(0)
        target = mine if argument.removeprefix("--").partition("=")[0] in own or argument in ("-h", "--help") else others
        target.append(argument)
        if argument.startswith("--") and "=" not in argument and queue and not queue[0].startswith("--"):
            target.append(queue.pop(0))
    return mine, others


def make_model(source, sizes, seed, folder):
    """Writes a random-weight model to folder: source's files with the given sizes in its config. mrope_section follows."""
    for path in pathlib.Path(source).iterdir():
        if path.suffix in (".json", ".txt", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = AutoConfig.from_pretrained(source)
    for word in sizes.replace(",", " ").split():
        name, _, value = word.partition("=")
        target = config.vision_config if name.startswith("vision.") else config.text_config
        name = name.removeprefix("vision.")
        if not hasattr(target, name) or not value.isdecimal():
            raise UserError(f"sizes: {word!r} is no name=number of the model's config")
        setattr(target, name, int(value))
    text = config.text_config
    half = text.hidden_size // text.num_attention_heads // 2
    text.rope_parameters["mrope_section"] = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    text.layer_types, text.head_dim = ["full_attention"] * text.num_hidden_layers, 2 * half
    vision = config.vision_config
    setattr(vision, "out_hidden_size" if hasattr(vision, "out_hidden_size") else "hidden_size", text.hidden_size)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# the parent: starts the sides, gives them turns, sums up

class Side:
    def __init__(self, name, python, arguments):
        self.name, self.records = name, []
        self.process = subprocess.Popen([python, os.path.abspath(__file__), *arguments, f"--side={name}"], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self):
        """The next JSON line of the child."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise UserError(f"bench: the side {self.name} ended with status {self.process.wait()}; what it said is above")

    def turn(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.records.append(self.read())

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def seconds(record, parts=None, clock="s"):
    """Of those parts of a step; None: of all but the evaluation."""
    return sum(part[clock] for name, part in record["parts"].items()
               if (name in parts if parts else name != "evaluation"))


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "all": values}


def summarise(records):
    """{part: seconds, CPU seconds, tokens a second, peak memory, FLOPs, utilisation}; 'step' is all but the evaluation."""
    summary = {}
    for name in [*records[0]["parts"], "step"]:
        within = [n for n in records[0]["parts"] if name == n or (name == "step" and n != "evaluation")]
        times = [seconds(r, within) for r in records]
        row = summary[name] = {
            "s": spread(times), "cpu_s": spread([seconds(r, within, "cpu_s") for r in records]),
            "peak_gb": statistics.median(max(r["parts"][n]["peak_gb"] for n in within) for r in records),
            "response_tokens_per_s": statistics.median(r["response_tokens"] / t for r, t in zip(records, times))}
        flops = [sum(r.get("flops", {}).get(n, 0) for n in within) for r in records]
        if any(flops):
            row["flops"] = statistics.median(flops)
            row["utilisation"] = statistics.median(f / t / r["matrix_rate"] for f, t, r in zip(flops, times, records))
    return summary


def show(name, summary, records):
    """Prints the table of one side."""
    print(f"\n{name}: {statistics.median(r['response_tokens'] for r in records):,.0f} response tokens a step, the longest "
          f"response {max(r['longest'] for r in records)}; medians of {len(records)} steps")
    print("part             seconds    (least to most)    CPU s  share  tokens/s  peak GB    GFLOP  util.")
    for part, row in summary.items():
        s, share = row["s"], row["s"]["median"] / summary["step"]["s"]["median"]
        tokens = "" if part == "evaluation" else f"{row['response_tokens_per_s']:,.0f}"
        work = f"{row['flops'] / 1e9:9,.0f}{row['utilisation']:7.1%}" if "flops" in row else ""
        print(f"{part:<13} {s['median']:10.3f} {'({least:.3f} to {most:.3f})'.format(**s):>18} {row['cpu_s']['median']:8.3f} "
              f"{share:6.0%} {tokens:>9} {row['peak_gb']:8.3f}{work}")


def compare(ours, theirs, parts=None, clock="s"):
    """Of each round, their seconds per response token over ours: how many times as fast we are. parts: of both; None: all."""
    return spread([seconds(b, parts, clock) / b["response_tokens"] / (seconds(a, parts, clock) / a["response_tokens"])
                   for a, b in zip(ours, theirs)])


if __name__ == "__main__":
    own, others = split_arguments(sys.argv[1:], read_knobs(__file__)[0])
    mine = configure(globals(), own)
    config = configure(vars(train_rl), others)
    if side:
        c, total = SimpleNamespace(**config), warmup_steps + steps
        if side.startswith("trl"):
            import bench_trl  # here: it needs TRL, which the parent and the other sides do without
            bench_trl.trl_steps(c, int(side.split()[1].replace("default", "0")), response_tokens > 0, total)
        else:
            our_steps(c, Plain if side == "plain" else Ours, response_tokens > 0, eval_problems)
        raise SystemExit
    for knob in ("model", "train_data"):
        if not config[knob]:
            raise UserError(f"command line: {knob} is empty; start from a config: python bench.py config/toy.py")
    if against not in ("", "plain", "trl"):
        raise UserError(f"command line: against must be '', 'plain' or 'trl', got {against!r}")
    if against and (config["train_vit"] or config["train_connector"]):
        raise UserError(f"config: against={against} has a frozen tower; train_vit and train_connector must be False")
    if config["rollout_ahead"]:
        raise UserError("config: bench.py times rollout_ahead=0 alone")
    if against == "plain" and config["rollout"] != "hf":
        raise UserError("config: against=plain has both sides on one GPU, which two vLLMs would not share; pass --rollout=hf")
    if "WORLD_SIZE" in os.environ:
        raise UserError("bench.py is one process: start it with python, not with torchrun")
    check_at_least(mine, 1, "steps")
    check_at_least(mine, 0, "warmup_steps", "response_tokens", "eval_problems")
    if config["batch_size"] % config["minibatch_size"]:
        raise UserError("config: batch_size must be a multiple of minibatch_size, got "
                        f"{config['batch_size']} and {config['minibatch_size']}")
    if not eval_problems:
        config["val_data"] = ""
    if frozen:
        config["learning_rate"] = 0.0
    if response_tokens:
        config["max_new_tokens"] = response_tokens
    names = ["ours"] + ["plain"] * (against == "plain")
    if against == "trl":
        fitting = [n for n in trl_rows.split(",")
                   if n == "default" or (config["minibatch_size"] % int(n) == 0 and int(n) % 2 == 0)]
        if not fitting:
            raise UserError(f"trl_rows: no even number in {trl_rows!r} divides minibatch_size={config['minibatch_size']}")
        names += [f"trl {n}" for n in fitting]

    with tempfile.TemporaryDirectory() as folder:
        named = {key: os.path.basename(value) if os.path.isabs(str(value)) else value for key, value in config.items()}
        if sizes:
            (pathlib.Path(folder) / "model").mkdir()
            make_model(local_folder(config["model"]), sizes, config["seed"], pathlib.Path(folder) / "model")
            config["model"] = f"{folder}/model"
        config["out_dir"] = f"{folder}/out"  # nothing of worth: TRL wants a folder
        save_config(config, f"{folder}/config.py")
        flags = [f"--{key}={value}" for key, value in mine.items() if key not in ("side", "out", "sizes")]
        sides = [Side(name, trl_python if name.startswith("trl") and trl_python else sys.executable,
                      [f"{folder}/config.py", *flags]) for name in names]
        infos = {one.name: one.read() for one in sides}
        for turn in range(warmup_steps + steps):
            for one in sides if turn % 2 == 0 else sides[::-1]:
                one.turn()
                print(f"round {turn + 1}/{warmup_steps + steps}: {one.name} {seconds(one.records[-1]):.2f} s", flush=True)
        for one in sides:
            one.close()

    records = {one.name: one.records[warmup_steps:] for one in sides}
    result = {"knobs": named, "bench": {k: v for k, v in mine.items() if k not in ("side", "out", "trl_python")},
              "info": infos, "sides": {}, "ratios": {}}
    for name in names:
        result["sides"][name] = {"summary": summarise(records[name]), "steps": records[name]}
        show(name, result["sides"][name]["summary"], records[name])
    print()
    for name in names[1:]:
        ratios = {f"{what}, {clock}": compare(records["ours"], records[name], parts, key)
                  for what, parts in [("step", None)] + [("III and IV", LEARN)] * (name == "plain")
                  for clock, key in (("time", "s"), ("CPU time", "cpu_s"))}
        peaks = [result["sides"][n]["summary"]["step"]["peak_gb"] for n in (name, "ours")]
        result["ratios"][name] = ratios | {"peak_gb": peaks[0] / peaks[1]}
        for what, r in ratios.items():
            print(f"{what}: ours is {r['median']:.2f} times as fast as {name} by response token "
                  f"({r['least']:.2f} to {r['most']:.2f})")
        print(f"peak memory of {name}: {peaks[0]:.2f} GB, {peaks[0] / peaks[1]:.2f} times ours")
    if against == "trl":
        result["best"] = best = min(names[1:], key=lambda name: result["ratios"][name]["step, time"]["median"])
        print(f"TRL's best is {best!r}: ours is {result['ratios'][best]['step, time']['median']:.2f} times as fast")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    pathlib.Path(out).write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"written to {out}")

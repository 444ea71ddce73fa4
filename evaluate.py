"""The evaluation scheme: pass@k on problems with known answers, by default under the paper's three settings.

    python evaluate.py --ckpt=out/toy/checkpoints/latest --data=data/toy/val.jsonl
    python evaluate.py --ckpt=toy/base,out/toy/checkpoints/latest --data=data/toy/val.jsonl

Prints a table; writes out_dir/eval.jsonl (an object for each checkpoint, file and setting) and samples.jsonl
(every response, judged). The trainers call evaluate() with their own engine: their numbers are this one's.

With n responses to a problem, c of them right, pass@k is the chance that k of the n, drawn without putting
back, hold a right one (unbiased: Chen et al. 2021, arXiv 2107.03374). ci95 is over problems: Wilson's where
each counts 0 or 1, else the bootstrap's. It covers neither another training seed nor kindred problems.
"""
import json
import math
import os
import re

import numpy as np

from configurator import UserError, check_at_least, configure, listed, save_config
from data import Dataset, Sampling, load_processor, request_seed, special_token_ids
from distributed import end, gather_json, start
from model import compute_dtype, load_config, local_folder
from reward import judge_batch
from rollout import open_engine

# ------------------------------------------------------------------------------------------------------------
ckpt = ""  # model folders or hub names, commas between them
data = ""  # files of problems in the paper's jsonl, commas between them
settings = "pass@8 T=1 top_p=1, pass@1 T=0.6 top_p=1, pass@1 T=0.01 top_p=0.001"  # or pass@1/2/4 T=1
samples_per_problem = 0  # responses to each problem and setting; 0 = as many as its largest k
out_dir = "out/evaluate"  # eval.jsonl and samples.jsonl go here
seed = 0  # of the sampling
rollout = "vllm"  # 'vllm' or 'hf'
max_new_tokens = 2048  # tokens of a response at most
max_prompt_tokens = 2048  # a longer prompt is an error at the start
min_pixels = 3136  # smaller pictures are enlarged
max_pixels = 1003520  # larger pictures are shrunk
gpu_memory_utilization = 0.8  # fraction of the GPU that vLLM takes
dtype = "auto"  # 'float32', 'bfloat16', or 'auto': bfloat16 on GPU, float32 on CPU
# ------------------------------------------------------------------------------------------------------------

EVALS = ((8, 1.0, 1.0), (1, 0.6, 1.0), (1, 0.01, 0.001))  # (k, temperature, top_p): the paper's three
SPLITS = {"val": "validation", "validation": "validation", "train": "train", "rl": "train", "sft": "train"}


# ------------------------------------------------------------------------------------------------------------
# numbers and their intervals

def pass_at_k(n, c, k):
    """1 - C(n-c, k) / C(n, k) for c right of n >= k responses, in whole numbers up to the division."""
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def wilson(right, n, z=1.96):
    """[low, high], the 95% interval of a fraction right / n (Wilson, JASA 22, 1927)."""
    centre = (right + z * z / 2) / (n + z * z)
    spread = z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    return [max(0.0, centre - spread), min(1.0, centre + spread)]


def bootstrap(values, resamples=10_000):
    """[low, high], the 95% percentile interval of the mean of values, one a problem, over problems drawn
    anew. Of differences between two models it is the paired bootstrap."""
    distinct, counts = np.unique(values, return_counts=True)
    # how often each distinct value is drawn is all that a mean needs
    draws = np.random.default_rng(0).multinomial(len(values), counts / len(values), resamples)
    return np.quantile(draws @ distinct / len(values), [0.025, 0.975]).tolist()


def outcomes(samples, n, k):
    """(problems,) float64: pass@k of each problem, from judged samples, n in a row for each problem."""
    right = np.array([sample["correct"] for sample in samples]).reshape(-1, n).sum(1)
    return np.array([pass_at_k(n, int(c), k) for c in right])


# ------------------------------------------------------------------------------------------------------------
# the evaluation

def parse_settings(text):
    """((k, temperature, top_p), ...) of a text like the knob's. UserError for what cannot be sampled."""
    evals = []
    for words in listed(text):
        found = re.fullmatch(r"pass@(\d+(?:/\d+)*)\s+T=([\d.]+)(?:\s+top_p=([\d.]+))?", words)
        try:
            temperature, top_p = float(found[2]), float(found[3] or 1)
            evals += [(int(k), temperature, top_p) for k in found[1].split("/")]
        except (TypeError, ValueError):  # no match, no number
            raise UserError(f"settings: {words!r} cannot be read: write 'pass@8 T=1 top_p=1' (top_p may be "
                            "left out, pass@1/2/4 asks for several k), a comma between two") from None
        if not (all(k for k, *_ in evals) and 0.01 <= temperature <= 2 and 0 < top_p <= 1):
            raise UserError(f"settings: {words!r}: k from 1, T from 0.01 to 2, top_p above 0 and at most 1")
    if not evals or len(set(evals)) < len(evals):
        raise UserError(f"settings: none given, or one of them twice: {text!r}")
    return tuple(evals)


def evaluate(engine, dataset, max_new_tokens, seed, world, evals=EVALS, samples_per_problem=0):
    """(rows, samples), the same on every rank: an object of eval.jsonl for each of evals, and every response
    in the order of the dataset. samples_per_problem: 0 for the largest k of a setting. A collective.

    Sampling depends on (seed, setting, id, number of the response) alone: not on the ranks, and not on the
    checkpoint, so that two of them meet the same luck. Several k of one T and top_p share the responses."""
    rows, samples = [], []
    for temperature, top_p in dict.fromkeys(setting[1:] for setting in evals):
        ks = [k for k, *others in evals if others == [temperature, top_p]]
        n, names = samples_per_problem or max(ks), [f"pass@{k} T={temperature:g} top_p={top_p:g}" for k in ks]
        drawn = names[ks.index(max(ks))]  # what the responses are drawn as
        mine = [i for i in range(world.rank, len(dataset), world.world_size) for _ in range(n)]
        seeds = [request_seed(seed, drawn, dataset.samples[i].id, j % n) for j, i in enumerate(mine)]
        completions = engine.generate(dataset, mine, seeds, Sampling(temperature, top_p, max_new_tokens))
        responses = [dataset.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        verdicts = judge_batch([(text, dataset.samples[i].answer) for text, i in zip(responses, mine)])
        gathered = gather_json([
            (i, {**dataset.samples[i].fields(), "setting": drawn, "response": response,
                 "correct": v.correct, "error": v.error, "rewards": {"accuracy": float(v.correct)},
                 "length": len(c.token_ids), "finish_reason": c.finish_reason})
            for i, response, v, c in zip(mine, responses, verdicts, completions)])
        in_order = sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])
        records = [record for _, record in in_order]  # stable: a problem's n responses keep their order
        for k, name in zip(ks, names):
            solved = outcomes(records, n, k)
            whole = set(solved.tolist()) <= {0.0, 1.0}
            rows.append({
                "setting": name, "k": k, "temperature": temperature, "top_p": top_p,
                "accuracy": float(solved.mean()), "n": len(dataset), "samples_per_problem": n,
                "ci95": wilson(int(solved.sum()), len(dataset)) if whole else bootstrap(solved),
                "response_length": sum(r["length"] for r in records) / len(records),
                "clip_ratio": sum(r["finish_reason"] != "stop" for r in records) / len(records),
                "judge_errors": sum(bool(r["error"]) for r in records)})
        samples += records
    return rows, samples


def evaluate_all(engine, datasets, step, epoch, max_new_tokens, seed, world, logs, save_samples):
    """The trainers' evaluation: the paper's settings on each of datasets, {split: Dataset}, to logs and as a
    table; of each setting the first save_samples responses are kept. A collective."""
    for split, dataset in datasets.items():
        rows, samples = evaluate(engine, dataset, max_new_tokens, seed, world)
        logs.write("eval", [{"step": step, "epoch": epoch, "split": split, **row} for row in rows])
        for setting in dict.fromkeys(sample["setting"] for sample in samples):
            kept = [sample for sample in samples if sample["setting"] == setting][:save_samples]
            logs.write("samples", [{"step": step, "split": split, **sample} for sample in kept])
        if world.rank == 0:
            show_table(f"epoch {epoch:g} {split}", rows)


def show_table(title, rows):
    """Prints a line for each setting: accuracy with its interval, and the mean response length in tokens."""
    for row in rows:
        low, high = row["ci95"]
        print(f"{title:<20} {row['setting']:<26} {row['accuracy']:6.1%}  ({low:.1%} to {high:.1%}, "
              f"n={row['n']})  length {row['response_length']:.1f}", flush=True)


# ------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    check_at_least(config, 0, "samples_per_problem")
    check_at_least(config, 1, "max_new_tokens", "max_prompt_tokens")
    checkpoints, paths, evals = listed(ckpt), listed(data), parse_settings(settings)
    if not checkpoints or not paths:
        raise UserError("command line: ckpt and data are needed: --ckpt=toy/base --data=data/toy/val.jsonl")
    if os.path.exists(f"{out_dir}/metrics.jsonl"):
        raise UserError(f"{out_dir} holds a run, whose eval.jsonl would be lost; take another --out_dir")
    if 0 < samples_per_problem < (most := max(k for k, *_ in evals)):
        raise UserError(f"config: pass@{most} needs {most} responses to a problem, {samples_per_problem=}")
    world = start()
    is_main, first = world.rank == 0, {}  # first: (file, setting) -> outcomes of the first checkpoint
    if is_main:
        save_config(config, f"{out_dir}/config.py")
        files = {name: open(f"{out_dir}/{name}.jsonl", "w", encoding="utf-8") for name in ("eval", "samples")}
    for name in checkpoints:
        folder = local_folder(name)
        load_config(folder)  # another architecture is refused here
        tokenizer, image_processor = load_processor(folder)
        datasets = [Dataset(path, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens)
                    for path in paths]
        engine = open_engine(rollout, folder, compute_dtype(dtype, world.device), world,
                             *special_token_ids(tokenizer, folder), max_prompt_tokens + max_new_tokens,
                             gpu_memory_utilization, trains=False)
        for path, dataset in zip(paths, datasets):
            rows, samples = evaluate(engine, dataset, max_new_tokens, seed, world, evals, samples_per_problem)
            words = re.split(r"[\W_]+", os.path.basename(path).lower())
            split = next((SPLITS[word] for word in words if word in SPLITS), "test")
            step = re.search(r"/step_(\d+)$", os.path.realpath(folder))  # a checkpoint of the trainers
            head = dict(step=step and int(step[1]), epoch=None, split=split, ckpt=name, data=path)
            if not is_main:
                continue
            for row in rows:
                tail = row["setting"].split(" ", 1)[1]  # T and top_p: several k share the responses
                drawn = [s for s in samples if s["setting"].endswith(tail)]
                solved = outcomes(drawn, row["samples_per_problem"], row["k"])
                change = solved - first.setdefault((path, row["setting"]), solved)
                row |= {"difference": float(change.mean()), "difference95": bootstrap(change)}  # to the first
            for kind, objects in (("eval", rows), ("samples", samples)):
                files[kind].writelines(json.dumps({**head, **x}, ensure_ascii=False) + "\n" for x in objects)
                files[kind].flush()
            show_table(f"{name} {path}", rows)
            for row in rows if name != checkpoints[0] else []:
                print(f"  {row['setting']}: {100 * row['difference']:+.1f} points to {checkpoints[0]}, 95% "
                      "{:+.1f} to {:+.1f}".format(*(100 * x for x in row["difference95"])))
        engine.close()
    end()

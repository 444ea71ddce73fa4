"""The evaluation scheme: pass@k on problems with known answers, by default under the paper's three sampling settings.

    python evaluate.py --ckpt=out/toy/checkpoints/latest --data=data/toy/val.jsonl
    python evaluate.py --ckpt toy_base out/toy/checkpoints/step_* --data data/toy/val.jsonl data/toy/test.jsonl   # a curve
    python evaluate.py --ckpt=... --data=... --samples_per_problem=64 --settings="pass@1/2/4/8 T=1, pass@1 T=0.6 top_p=0.95"
    torchrun --nproc_per_node=2 evaluate.py --ckpt=... --data=... --rollout=hf       # the rows are shared among processes

Prints a table; writes out_dir/eval.jsonl (an object for each checkpoint, file, setting and k) and out_dir/samples.jsonl
(every response, judged), both as they are made: a call that is interrupted keeps what it has.
train_rl.py and train_sft.py call evaluate() with their own engine, so a number in training is the number of this command.

With n responses to a problem, c of them right, pass@k is the chance that k of the n, drawn without putting back, hold a
right one: 1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374, section 2.1). With n = k, as in the paper,
that is whether any is right.
The bootstrap draws problems anew, each with the responses it got, so its intervals cover which problems were chosen and the
luck of sampling. They do not cover another training seed, and they take problems to be independent: variants of one problem
count as several, and the interval is then too narrow. All right or all wrong leaves it no width. So ci95 is Wilson's interval
where every problem counted 0 or 1, as with n = k, and the bootstrap's else; bootstrap95 is the bootstrap's always.
"""
import hashlib
import json
import math
import os
import pathlib
import re

import numpy as np

from configurator import UserError, check_at_least, configure, listed, save_config
from data import Dataset, load_processor, print_warnings
from distributed import end, gather_json, start
from intervals import bootstrap, pass_at_k, wilson
from model import Weights, compute_dtype, load_config, local_folder
from reflection import ratios, tally
from reward import judge_batch
from rollout import Sampling, banned_token_ids, check_alive, eos_token_ids, open_engine, request_seed
from watch import now_at

# ---------------------------------------------------------------------------------------------------------------------
ckpt = ""  # model folders or hub names; a folder of step_* folders, such as out/toy/checkpoints, is all of them in order
data = ""  # files of problems in the paper's jsonl
split = ""  # what eval.jsonl calls them: train, validation or test, for all or for each; '' = by the files' names
settings = "pass@8 T=1 top_p=1, pass@1 T=0.6 top_p=1, pass@1 T=0.01 top_p=0.001"  # pass@1/2/4 T=1: three k of one draw
samples_per_problem = 0  # responses to each problem and setting; 0 = as many as its largest k
out_dir = "out/evaluate"  # eval.jsonl and samples.jsonl go here
seed = 0  # of the sampling
rollout = "vllm"  # 'vllm' or 'hf'
max_new_tokens = 2048  # tokens of a response at most
max_prompt_tokens = 2048  # a longer prompt is an error at start
min_pixels = 3136  # smaller images are enlarged
max_pixels = 1003520  # larger images are shrunk
gpu_memory_utilization = 0.8  # fraction of the GPU that vLLM takes
dtype = "auto"  # 'float32', 'bfloat16', or 'auto': bfloat16 on GPU, float32 on CPU
# ---------------------------------------------------------------------------------------------------------------------

EVALS = ((8, 1.0, 1.0), (1, 0.6, 1.0), (1, 0.01, 0.001))  # (k or a tuple of them, temperature, top_p): the paper's three
GRAMMAR = "write 'pass@8 T=1 top_p=1' (top_p may be left out, pass@1/2/4/8 asks for several k), a comma between two"


# ---------------------------------------------------------------------------------------------------------------------
# settings, and what to make of right and wrong

def setting_name(k, temperature, top_p):
    return f"pass@{k} T={temperature:g} top_p={top_p:g}"


def parse_settings(text, samples_per_problem=0):
    """((k or a tuple of them, temperature, top_p), ...) as evaluate() takes them. UserError for what cannot be read, cannot
    be sampled by both engines, is there twice, or needs more responses than samples_per_problem (0: as many as needed)."""
    evals, names = [], set()
    for words in listed(text):
        where, found = f"settings: {words!r}", re.fullmatch(r"pass@([0-9/]+)\s+T=(\S+)(?:\s+top_p=(\S+))?", words)
        try:
            ks = [int(k) for k in found[1].split("/")]
            temperature, top_p = float(found[2]), float(found[3] or 1)
        except (TypeError, ValueError):  # no match, no number
            raise UserError(f"{where} cannot be read: {GRAMMAR}") from None
        if min(ks) < 1:
            raise UserError(f"{where}: k must be at least 1, got {min(ks)}")
        if not 0.01 <= temperature <= 2:  # vLLM takes a lower one for 0.01 and refuses a higher one
            raise UserError(f"{where}: T must be between 0.01 and 2, got {temperature:g} (T=0.01 top_p=0.001 is greedy)")
        if not 0 < top_p <= 1:
            raise UserError(f"{where}: top_p must be above 0 and at most 1, got {top_p:g}")
        if 0 < samples_per_problem < max(ks):
            raise UserError(f"{where} needs {max(ks)} responses to a problem, {samples_per_problem=} are fewer: raise it, or "
                            "0 = as many as k")
        for name in (setting_name(k, temperature, top_p) for k in ks):
            if name in names:
                raise UserError(f"{where}: {name} is there twice, keep one")
            names.add(name)
        evals.append((ks[0] if len(ks) == 1 else tuple(ks), temperature, top_p))
    if not evals:
        raise UserError(f"settings: none given; {GRAMMAR}")
    return tuple(evals)


def outcomes(responses, n, k):
    """(problems,) float64: pass@k of each problem, from the judged responses of one setting, n in a row for each problem."""
    right = np.array([r["correct"] for r in responses], dtype=np.int64).reshape(-1, n).sum(1).tolist()
    value = {c: pass_at_k(n, c, k) for c in set(right)}
    return np.array([value[c] for c in right])


def evaluate(engine, dataset, tokenizer, max_new_tokens, seed, world, evals=EVALS, samples_per_problem=0):
    """(rows, samples), the same on every rank: an object of eval.jsonl for each setting and k, and every response in the
    order of the dataset. samples_per_problem: 0 for the largest k of a setting. A collective.

    Sampling depends on (seed, setting, id, number of the response) alone: not on the ranks, and not on the checkpoint, so
    that two of them meet the same luck. Several k share responses, which are those of the largest alone."""
    rows, kept = [], []
    for ks, temperature, top_p in evals:
        ks = ks if isinstance(ks, tuple) else (ks,)
        n, setting = samples_per_problem or max(ks), setting_name(max(ks), temperature, top_p)
        assert n >= max(ks), f"{samples_per_problem=} {ks=}"
        mine = [i for i in range(world.rank, len(dataset), world.world_size) for _ in range(n)]
        seeds = [request_seed(seed, setting, dataset.samples[i].id, j % n) for j, i in enumerate(mine)]
        completions = engine.generate(dataset, mine, seeds, Sampling(temperature, top_p, max_new_tokens))
        responses = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        verdicts = judge_batch([(response, dataset.samples[i].answer) for response, i in zip(responses, mine)])
        gathered = gather_json([{"row": i, "response": response, "correct": v.correct, "error": v.error,
                                 "length": len(c.token_ids), "finish_reason": c.finish_reason}
                                for i, response, v, c in zip(mine, responses, verdicts, completions)])
        records = sorted((r for part in gathered for r in part), key=lambda r: r["row"])  # stable: the n keep their order
        for k in ks:
            solved = outcomes(records, n, k)
            resampled, whole = bootstrap(solved), set(solved.tolist()) <= {0.0, 1.0}
            rows.append({"setting": setting_name(k, temperature, top_p), "k": k, "temperature": temperature, "top_p": top_p,
                         "accuracy": math.fsum(solved) / len(dataset), "n": len(dataset), "samples_per_problem": n,
                         "ci95": wilson(int(solved.sum()), len(dataset)) if whole else resampled, "bootstrap95": resampled,
                         "response_length": sum(r["length"] for r in records) / len(records),
                         "clip_ratio": sum(r["finish_reason"] != "stop" for r in records) / len(records),
                         "judge_errors": sum(bool(r["error"]) for r in records)})
        for r in records:
            sample = dataset.samples[r.pop("row")]
            kept.append({"id": sample.id, "image": sample.image, "question": sample.question, "answer": sample.answer,
                         "setting": setting, "rewards": {"accuracy": float(r["correct"])}, **r})
    return rows, kept


# ---------------------------------------------------------------------------------------------------------------------
# for people

def some(samples, most):
    """At most so many of the samples for each setting, the first ones."""
    kept = {}
    for sample in samples:
        kept.setdefault(sample["setting"], []).append(sample)
    return [sample for of_setting in kept.values() for sample in of_setting[:most]]


def show_table(title, rows):
    """Prints a line for each setting: accuracy in percent with its interval, and the mean response length in tokens."""
    for row in rows:
        low, high = row["ci95"]
        print(f"{title:<20} {row['setting']:<26} {row['accuracy']:6.1%}  ({low:.1%} to {high:.1%}, n={row['n']})  "
              f"length {row['response_length']:.1f}", flush=True)


def short(names):
    """The names without the folders that all of them begin with."""
    shared = os.path.commonprefix(names).rpartition("/")[0]
    return [name[len(shared) + bool(shared):] for name in names]


def show_summary(rows):
    """Prints one aligned table of all rows. The difference is to the first checkpoint on the same problems, in points."""
    lines = [["checkpoint", "data", "setting", "accuracy", "95%", "n", "samples", "length", "clipped", "difference", "95%"]]
    for row, name, path in zip(rows, short([row["ckpt"] for row in rows]), short([row["data"] for row in rows])):
        low, high = row["ci95"]
        change = ["", ""] if row["difference"] is None else [
            f"{100 * row['difference']:+.1f}", "{:+.1f} to {:+.1f}".format(*(100 * x for x in row["difference95"]))]
        lines.append([name, path, row["setting"], f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(row["n"]),
                      str(row["samples_per_problem"]), f"{row['response_length']:.1f}", f"{row['clip_ratio']:.0%}", *change])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:  # words to the left, numbers to the right
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        print("  ".join(cells).rstrip(), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# which models, which files

def find_checkpoints(names):
    """[(name, folder, step)]: step is the number of step_000120, also where `latest` leads to it, else None."""
    spread, found = [], {}  # {real folder: (name, folder, step)}
    for name in names:
        steps = [p for p in pathlib.Path(name).glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
        several = steps and not os.path.exists(os.path.join(name, "config.json"))
        spread += sorted(map(str, steps), key=lambda p: int(p.rpartition("_")[2])) if several else [name.rstrip("/")]
    for name in spread:
        folder = local_folder(name)
        load_config(folder)  # another architecture is refused here
        real = os.path.realpath(folder)
        if real in found:
            raise UserError(f"ckpt: {name} is the same folder as {found[real][0]}, keep one")
        step = re.fullmatch(r"step_(\d+)", os.path.basename(real))
        found[real] = name, folder, step and int(step[1])
    return list(found.values())


def engine_needs(folder):
    """A digest of all that an engine is opened with, but the weights' values: config, tokenizer, names and shapes. Where two
    checkpoints share it, as those of one run do, the engine of one can load the weights of the other."""
    weights, config = Weights(folder), json.loads(pathlib.Path(folder, "config.json").read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype", "transformers_version"):  # how it was stored
        config.pop(key, None)
    shapes = sorted((name, file.get_slice(stored).get_shape()) for name, (file, stored) in weights.where.items())
    digest = hashlib.sha256(json.dumps([config, shapes], sort_keys=True).encode())
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.name != "config.json" and ".index." not in path.name:
            digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def stored_weights(folder):
    """(hub name, tensor) of every tensor in folder, tower included, as the engines' load_weights takes them."""
    weights, tied = Weights(folder), load_config(folder).tie_word_embeddings
    return ((name, weights[name]) for name in weights.where if not (tied and name == "lm_head.weight"))


def split_names(paths, split):
    """train, validation or test for each of the paths: as split says for all or for each, else by the files' names."""
    names = listed(split) or [
        "validation" if words & {"val", "validation", "valid"} else "train" if words & {"train", "rl", "sft"} else "test"
        for words in (set(re.split(r"[\W_]+", os.path.basename(path).lower())) for path in paths)]
    if len(names) not in (1, len(paths)) or not {"train", "validation", "test"}.issuperset(names):
        raise UserError("split: must be train, validation or test, one for all files or one for each of the "
                        f"{len(paths)}, got {split!r}")
    return names * len(paths) if len(names) == 1 else names


def load_datasets(paths, *arguments):
    """A Dataset for each of the paths; one UserError with the bad rows of all."""
    datasets, errors = [], [f"data: {path} is there twice, keep one" for path in sorted(set(paths)) if paths.count(path) > 1]
    for path in paths:
        try:
            datasets.append(Dataset(path, *arguments))
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))
    return datasets


if __name__ == "__main__":
    config = configure(globals(), several=("ckpt", "data"))
    check_at_least(config, 0, "samples_per_problem")
    check_at_least(config, 1, "max_new_tokens", "max_prompt_tokens")
    names, paths = listed(ckpt), listed(data)
    for knob, given in (("ckpt", names), ("data", paths)):
        if not given:
            raise UserError(f"command line: {knob} is empty; python evaluate.py --ckpt=out/toy/checkpoints/latest "
                            "--data=data/toy/val.jsonl")
    if os.path.exists(f"{out_dir}/metrics.jsonl"):
        raise UserError(f"config: out_dir={out_dir!r} holds a training run, its eval.jsonl would be lost; give another")
    evals, splits = parse_settings(settings, samples_per_problem), split_names(paths, split)
    checkpoints = [(*found, engine_needs(found[1])) for found in find_checkpoints(names)]
    loaded = {}  # what an engine is opened with -> (tokenizer, datasets): all files are checked before any model is loaded
    for _, folder, _, needs in checkpoints:
        if needs not in loaded:
            tokenizer, image_processor = load_processor(folder)
            loaded[needs] = tokenizer, load_datasets(paths, tokenizer, image_processor, min_pixels, max_pixels,
                                                     max_prompt_tokens)
    world = start()
    main = world.rank == 0
    if main:
        print_warnings(dict(zip(paths, next(iter(loaded.values()))[1])))
    engine, opened, first, table, files = None, None, {}, [], {}  # first: outcomes of the first checkpoint

    def write(name, rows):
        """Appends the objects to out_dir/<name>.jsonl; only the main process writes."""
        try:
            files[name].write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
            files[name].flush()
        except OSError as error:
            raise UserError(f"{out_dir}/{name}.jsonl cannot be written ({error.strerror}); make room, or give another "
                            "--out_dir") from None

    for name, folder, step, needs in checkpoints:
        tokenizer, datasets = loaded[needs]
        if needs == opened:
            engine.load_weights(stored_weights(folder))
        else:
            if engine:
                engine.close()
            engine = open_engine(rollout, folder, compute_dtype(dtype, world.device), world,
                                 eos_token_ids(tokenizer, folder), banned_token_ids(tokenizer),
                                 max_prompt_tokens + max_new_tokens, gpu_memory_utilization, seed)
            opened = needs
        if main and not files:
            save_config(config, f"{out_dir}/config.py")
            files = {kind: open(f"{out_dir}/{kind}.jsonl", "w", encoding="utf-8") for kind in ("eval", "samples")}
        for path, split_name, dataset in zip(paths, splits, datasets):
            head, reflections = dict(step=step, epoch=None, split=split_name, ckpt=name, data=path), []
            for setting in evals:  # one by one: each is on disk before the next is sampled
                now_at(f"{name}, {path}")
                rows, responses = evaluate(engine, dataset, tokenizer, max_new_tokens, seed, world, [setting],
                                           samples_per_problem)
                check_alive(engine)
                if not main:
                    continue
                for row in rows:
                    solved = outcomes(responses, row["samples_per_problem"], row["k"])
                    change = solved - first.setdefault((path, row["setting"]), solved)
                    is_first = name == checkpoints[0][0]
                    row["difference"] = None if is_first else math.fsum(change) / len(change)
                    row["difference95"] = None if is_first else bootstrap(change)
                    table.append({**head, **row})
                write("eval", table[-len(rows):])
                write("samples", ({**head, **response} for response in responses))
                show_table(split_name if len(checkpoints) == len(paths) == 1 else f"{name} {path}", rows)
                shown = ratios(tally([r["response"] for r in responses], [r["correct"] for r in responses]))
                shown = (f"{key} {'-' if value is None else format(value, '.3f')}" for key, value in shown.items())
                reflections.append(f"{responses[0]['setting']}: {', '.join(shown)}")
            if main:
                print(*reflections, sep="\n", flush=True)
    if main and len(checkpoints) * len(paths) > 1:
        print()
        show_summary(table)
    engine.close()
    end()

"""The evaluation scheme: accuracy of a model on problems with known answers, under the paper's three sampling settings.

    python evaluate.py --ckpt=out/toy/checkpoints/latest --data=data/toy/val.jsonl
    torchrun --nproc_per_node=2 evaluate.py --ckpt=... --data=... --rollout=hf       # the rows are shared among processes

Prints a table; writes out_dir/eval.jsonl (an object for each setting) and out_dir/samples.jsonl (every response, judged).
train_rl.py and train_sft.py call evaluate() with their own engine, so a number in training is the number of this command.
"""
import json
import math
import os

import torch.distributed as dist

from configurator import UserError, configure, save_config
from data import Dataset, load_processor
from distributed import gather_json, start
from model import compute_dtype, load_config, local_folder
from reflection import ratios, tally
from reward import judge_batch
from rollout import Sampling, banned_token_ids, eos_token_ids, open_engine, request_seed

# ---------------------------------------------------------------------------------------------------------------------
ckpt = ""  # folder or hub name of the model, such as out/toy/checkpoints/latest
data = ""  # problems in the paper's jsonl
split = "test"  # what eval.jsonl calls them: train, validation or test
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

EVALS = ((8, 1.0, 1.0), (1, 0.6, 1.0), (1, 0.01, 0.001))  # (k, temperature, top_p): the paper's three settings


def wilson(right, n, z=1.96):
    """[low, high], the 95% interval of a fraction right / n (Wilson, JASA 22, 1927): it stays within 0..1 for 0 of n."""
    centre, spread = (right + z * z / 2) / (n + z * z), z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    return [max(0.0, centre - spread), min(1.0, centre + spread)]


def evaluate(engine, dataset, tokenizer, max_new_tokens, seed, world, evals=EVALS):
    """(rows, samples), the same on every rank: an object of eval.jsonl for each setting, and every response in the order of
    the dataset. A problem counts as solved when one of its k responses is right. A collective.

    Sampling depends on (seed, setting, id, number of the response) alone: not on the ranks, and not on the epoch, so that
    two checkpoints meet the same luck."""
    rows, samples = [], []
    for k, temperature, top_p in evals:
        setting = f"pass@{k} T={temperature:g} top_p={top_p:g}"
        mine = [i for i in range(world.rank, len(dataset), world.world_size) for _ in range(k)]
        seeds = [request_seed(seed, setting, dataset.samples[i].id, j % k) for j, i in enumerate(mine)]
        completions = engine.generate(dataset, mine, seeds, Sampling(temperature, top_p, max_new_tokens))
        responses = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        verdicts = judge_batch([(response, dataset.samples[i].answer) for response, i in zip(responses, mine)])
        gathered = gather_json([{"row": i, "response": response, "correct": v.correct, "error": v.error,
                                 "length": len(c.token_ids), "finish_reason": c.finish_reason}
                                for i, response, v, c in zip(mine, responses, verdicts, completions)])
        records = sorted((r for part in gathered for r in part), key=lambda r: r["row"])  # stable: the k keep their order
        n = len(dataset)
        solved = sum(any(r["correct"] for r in records[i * k:(i + 1) * k]) for i in range(n))
        rows.append({"setting": setting, "k": k, "temperature": temperature, "top_p": top_p, "accuracy": solved / n, "n": n,
                     "ci95": wilson(solved, n), "response_length": sum(r["length"] for r in records) / (n * k),
                     "clip_ratio": sum(r["finish_reason"] != "stop" for r in records) / (n * k),
                     "judge_errors": sum(bool(r["error"]) for r in records)})
        for r in records:
            sample = dataset.samples[r.pop("row")]
            samples.append({"id": sample.id, "image": sample.image, "question": sample.question, "answer": sample.answer,
                            "setting": setting, "rewards": {"accuracy": float(r["correct"])}, **r})
    return rows, samples


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


if __name__ == "__main__":
    config = configure(globals())
    for knob, value in (("ckpt", ckpt), ("data", data)):
        if not value:
            raise UserError(f"command line: {knob} is empty; python evaluate.py --ckpt=out/toy/checkpoints/latest "
                            "--data=data/toy/val.jsonl")
    folder = local_folder(ckpt)
    load_config(folder)  # another architecture is refused here
    tokenizer, image_processor = load_processor(folder)
    dataset = Dataset(data, tokenizer, image_processor, min_pixels, max_pixels, max_prompt_tokens)
    world = start()
    engine = open_engine(rollout, folder, compute_dtype(dtype, world.device), world, eos_token_ids(tokenizer, folder),
                         banned_token_ids(tokenizer), max_prompt_tokens + max_new_tokens, gpu_memory_utilization, seed)
    rows, samples = evaluate(engine, dataset, tokenizer, max_new_tokens, seed, world)
    if world.rank == 0:
        show_table(split, rows)
        os.makedirs(out_dir, exist_ok=True)
        save_config(config, f"{out_dir}/config.py")
        for name, objects in (("eval", rows), ("samples", samples)):
            with open(f"{out_dir}/{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": None, "epoch": None, "split": split, **obj}, ensure_ascii=False) + "\n"
                                for obj in objects)
        for row in rows:
            of_setting = [s for s in samples if s["setting"] == row["setting"]]
            shown = ratios(tally([s["response"] for s in of_setting], [s["correct"] for s in of_setting]))
            shown = (f"{name} {'-' if value is None else format(value, '.3f')}" for name, value in shown.items())
            print(row["setting"] + ": " + ", ".join(shown))
    engine.close()
    dist.barrier()
    dist.destroy_process_group()

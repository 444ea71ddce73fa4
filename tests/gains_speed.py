"""Two of results/bench.md's single gains, each next to what it replaced, by turns in one process: medians of 9.

    OMP_NUM_THREADS=1 python tests/gains_speed.py
"""
import os
import pathlib
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def by_turns(**ways):
    """Prints the median seconds of each way and the median of the first one's over the others'."""
    seconds = {name: [] for name in ways}
    for _ in range(10):
        for name, act in ways.items():
            begin = time.perf_counter()
            act()
            seconds[name].append(time.perf_counter() - begin)
    first = next(iter(seconds))
    for name, several in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first][1:], several[1:])]  # the first of all is not counted
        print(f"{name:>10}: {1000 * statistics.median(several[1:]):8.2f} ms; {first} takes {statistics.median(ratios):.2f} "
              f"times as long ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    os.chdir(ROOT)
    from data import Dataset, load_processor
    from distributed import start
    from model import encode, load_policy
    from rollout import Sampling, banned_token_ids, eos_token_ids, open_engine
    world = start()
    policy, visual = load_policy("toy_base", world, torch.float32, [])
    trained = [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.ones_like(p)
    print(f"AdamW on {sum(p.numel() for p in trained):,} sharded parameters")
    by_turns(plain=torch.optim.AdamW(trained, 0.0).step, fused=torch.optim.AdamW(trained, 0.0, fused=True).step)

    tokenizer, image_processor = load_processor("toy_base")
    dataset = Dataset("data/toy/train.jsonl", tokenizer, image_processor, 3136, 64 * 28 * 28, 1024)
    engine = open_engine("hf", "toy_base", torch.float32, world, eos_token_ids(tokenizer, "toy_base"),
                         banned_token_ids(tokenizer), 1120, 0.8, 0)
    rows = list(range(256))
    print("256 responses of the toy's base, the sampler given pixels, or the trainer's features")
    by_turns(**{name: lambda known=known: engine.generate(dataset, rows, rows, Sampling(1.0, 1.0, 96), known)
                for name, known in (("pixels", encode(None, dataset, rows)), ("features", encode(visual, dataset, rows)))})

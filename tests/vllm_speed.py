"""Tokens a second of rollout_vllm.py next to a bare LLM.generate with the same requests, in one engine, by turns.

    python tests/vllm_speed.py [rounds]         # the toy's base on vLLM's CPU build: 128 responses of 64 tokens a round
"""
import os
import pathlib
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from vllm import SamplingParams

    from data import Dataset, load_processor
    from distributed import start
    from rollout import Sampling, banned_token_ids, eos_token_ids
    from rollout_vllm import BAN, VLLMEngine

    os.chdir(ROOT)
    rounds, n, length = int(sys.argv[1]) if len(sys.argv) > 1 else 7, 128, 64
    dataset = Dataset("data/toy/train.jsonl", *load_processor("toy_base"), 3136, 64 * 28 * 28, 1024)
    eos_ids = eos_token_ids(dataset.tokenizer, "toy_base")
    banned = sorted({*banned_token_ids(dataset.tokenizer), *eos_ids})  # no response ends before its length
    engine = VLLMEngine("toy_base", torch.float32, start(), eos_ids, banned, 1024, 0.8, 0)
    inputs = [dataset.inputs(i) for i in range(n)]
    prompts = [{"prompt": x.prompt, "multi_modal_data": {"image": x.image}} for x in inputs]

    def ours(seed):
        return sum(len(x.token_ids) for x in engine.generate(dataset, range(n), [seed + i for i in range(n)],
                                                             Sampling(1.0, 1.0, length)))

    def bare(seed):
        params = [SamplingParams(temperature=1.0, seed=seed + i, max_tokens=length, ignore_eos=True, logprobs=0,
                                 detokenize=False, logit_bias={i: BAN for i in banned}) for i in range(n)]
        return sum(len(x.outputs[0].token_ids) for x in engine.llm.generate(prompts, params, use_tqdm=False))

    rates = {"ours": [], "bare": []}
    for turn in range(rounds + 1):
        for name, act in (("ours", ours), ("bare", bare))[::1 if turn % 2 else -1]:
            begin = time.perf_counter()
            tokens = act(turn * n)
            assert tokens == n * length
            if turn:  # the first is not counted
                rates[name].append(tokens / (time.perf_counter() - begin))
    engine.close()
    ratios = [a / b for a, b in zip(rates["ours"], rates["bare"])]
    for name, several in rates.items():
        print(f"{name}: {statistics.median(several):.0f} tokens/s (median of {rounds}; {min(several):.0f} to "
              f"{max(several):.0f})")
    print(f"ours / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")

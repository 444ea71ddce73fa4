"""Peak memory of one update (4 responses of 512 tokens, a vocabulary of 151,936) with chunked or with full logits, as JSON.

    python tests/logits_memory.py chunked
    python tests/logits_memory.py full

update_gb is what the update adds to the process before it, process_gb the process's peak with it."""
import json
import pathlib
import re
import sys
import tempfile

import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import batch as batching  # noqa: E402
import distributed  # noqa: E402
import model  # noqa: E402
from tiny import make_tiny  # noqa: E402


def full_logprobs(hidden, weight, targets, temperature, banned_ids, with_entropy):
    """The plain way: all logits at once, their log_softmax, and the entropy from both."""
    logits = (hidden @ weight.T).float() / temperature
    logits[:, banned_ids] = torch.finfo(torch.float32).min
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def peak_kb():
    """The process's largest resident size so far. (ru_maxrss of a child would start at its parent's size.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1))


if __name__ == "__main__":
    if sys.argv[1] == "full":
        model.chunked_logprobs = full_logprobs
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(folder, vocab_size=151_936)
        world = distributed.start()
        policy, visual = model.load_policy(folder, world, torch.float32, [6])
    grid = torch.tensor([[1, 4, 4]])
    queries, responses = [[10, 3, 6, 6, 6, 6, 4, 11]] * 4, torch.randint(8, 151_936, (4, 512)).tolist()
    batch = batching.pack(policy, queries, responses, [grid] * 4, 0, "cpu")
    features = model.encode_images(visual, [model.ImageInput(torch.randn(16, 1176), grid)] * 4)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 1e-6, fused=True)
    before = peak_kb()
    logprobs, _ = policy(batch.query_responses, batch.position_ids, batch.attention_mask, features, batch.response_mask, 1.0)
    logprobs.mean().backward()
    optimizer.step()
    after = peak_kb()
    print(json.dumps({"way": sys.argv[1], "update_gb": (after - before) / 1e6, "process_gb": after / 1e6}))
    dist.destroy_process_group()

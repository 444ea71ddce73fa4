"""A script as it stands, with one hook from outside; the other arguments are the script's own.

    NANOMAYE_HOOK=record:FILE python tests/patched_run.py train_rl.py config/toy.py"""
import os
import pathlib
import runpy
import signal
import sys

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402

clip, forward, make_sequence = torch.nn.utils.clip_grad_norm_, model.Policy.forward, model.make_sequence
kind, argument = os.environ["NANOMAYE_HOOK"].split(":")
weights = []  # before each update


def hooked_clip(parameters, max_norm):
    """Called before each update. not_finite says whether the one before changed the weights."""
    weights.append(torch.cat([p.detach().to_local().flatten() for p in parameters]))
    if kind == "record" and len(weights) == 1:  # the gradient goes to a file
        gradients = {str(i): p.grad.full_tensor().contiguous() for i, p in enumerate(parameters)}
        if torch.distributed.get_rank() == 0:
            save_file(gradients, argument)
    if kind == "terminate" and len(weights) == int(argument):
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "not_finite":
        print(f"HOOK {len(weights) - 1}", not torch.equal(weights[-1], weights[-2:][0]), flush=True)
        if len(weights) == 4:
            parameters[0].grad.to_local().view(-1)[0] = torch.inf
    return clip(parameters, max_norm)


def nan_loss(*args, **kwargs):
    """Update 3 has one."""
    logprobs, entropy = forward(*args, **kwargs)
    return (logprobs * torch.nan if torch.is_grad_enabled() and len(weights) == 2 else logprobs), entropy


def flat_positions(query, response_ids):
    """The trainer's positions are one-dimensional, as in the paper's code."""
    sequence = make_sequence(query, response_ids)
    return sequence._replace(positions=torch.arange(len(sequence.ids)).expand(3, -1))


if __name__ == "__main__":
    torch.nn.utils.clip_grad_norm_ = hooked_clip
    if kind == "not_finite":
        model.Policy.forward = nan_loss
    if kind == "flat":
        model.make_sequence = flat_positions
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")

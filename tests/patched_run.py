"""train_rl.py as it stands, with one hook from outside; the arguments are the script's own.

    NANOMAYE_HOOK=record:FILE python tests/patched_run.py --out_dir=...     # FILE gets the gradient of the first update
    NANOMAYE_HOOK=nan:2 python tests/patched_run.py --out_dir=...           # the second forward with gradients gives NaN
"""
import os
import pathlib
import runpy
import sys

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402

clip, forward = torch.nn.utils.clip_grad_norm_, model.Policy.forward
kind, argument = os.environ["NANOMAYE_HOOK"].split(":", 1)
calls = 0


def recording_clip(parameters, max_norm):
    global calls
    calls += 1
    if calls == 1:
        gradients = {str(i): p.grad.full_tensor().contiguous() for i, p in enumerate(parameters)}
        if torch.distributed.get_rank() == 0:
            save_file(gradients, argument)
    return clip(parameters, max_norm)


def failing_forward(*args, **kwargs):
    global calls
    logprobs, entropy = forward(*args, **kwargs)
    calls += torch.is_grad_enabled()
    return (logprobs * torch.nan if torch.is_grad_enabled() and calls == int(argument) else logprobs), entropy


if __name__ == "__main__":
    if kind == "record":
        torch.nn.utils.clip_grad_norm_ = recording_clip
    else:
        model.Policy.forward = failing_forward
    runpy.run_path(str(ROOT / "train_rl.py"), run_name="__main__")

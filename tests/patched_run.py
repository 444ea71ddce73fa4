"""train_rl.py as it stands, with one hook at the place where gradients are clipped; the arguments are the script's own.

    NANOMAYE_HOOK=record:FILE python tests/patched_run.py --out_dir=...     # FILE gets the gradient of the first update
    NANOMAYE_HOOK=nan:2 python tests/patched_run.py --out_dir=...           # plants a NaN in the second update's gradient
"""
import os
import pathlib
import runpy
import sys

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
clip = torch.nn.utils.clip_grad_norm_
kind, argument = os.environ["NANOMAYE_HOOK"].split(":", 1)
calls = 0


def hooked(parameters, max_norm):
    global calls
    calls += 1
    if kind == "record" and calls == 1:
        gradients = {str(i): p.grad.full_tensor().contiguous() for i, p in enumerate(parameters)}
        if torch.distributed.get_rank() == 0:
            save_file(gradients, argument)
    if kind == "nan" and calls == int(argument):
        parameters[3].grad.to_local().view(-1)[:1] = torch.nan
    return clip(parameters, max_norm)


if __name__ == "__main__":
    torch.nn.utils.clip_grad_norm_ = hooked
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "train_rl.py"), run_name="__main__")

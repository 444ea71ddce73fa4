"""train_rl.py as it stands, with one hook from outside; the arguments are the script's own.

    NANOMAYE_HOOK=record:FILE python tests/patched_run.py --out_dir=...   # FILE gets the gradient of the first update
    NANOMAYE_HOOK=nan:2 python tests/patched_run.py --out_dir=...         # the second forward with gradients gives NaN

and so on: see HOOKS; the number counts calls from 1, and 0 is every one of them. raise, kill and hang are of the last rank.
"""
import atexit
import os
import pathlib
import runpy
import signal
import sys
import time

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402

import reward  # noqa: E402
import rollout_vllm  # noqa: E402

clip, forward, step = torch.nn.utils.clip_grad_norm_, model.Policy.forward, torch.optim.AdamW.step
outputs = rollout_vllm.VLLMEngine.outputs
language_reward = reward.language_reward
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


def hit():
    """Whether this call is the one that the hook is about."""
    global calls
    calls += 1
    return calls == int(argument) or argument == "0"


def nan_logprobs(*args, **kwargs):
    """The forward of an update: its loss is NaN."""
    logprobs, entropy = forward(*args, **kwargs)
    return (logprobs * torch.nan if torch.is_grad_enabled() and hit() else logprobs), entropy


def counted(*args, **kwargs):
    """A forward; how many had no gradient is said at the end."""
    global calls
    if calls == 0:
        atexit.register(lambda: print(f"{calls} forwards without a gradient", flush=True))
    calls += not torch.is_grad_enabled()
    return forward(*args, **kwargs)


def nan_old_logprobs(*args, **kwargs):
    """A forward of Step III: the first row's log-probabilities are NaN."""
    logprobs, entropy = forward(*args, **kwargs)
    if not torch.is_grad_enabled() and hit():
        logprobs[0] = torch.nan
    return logprobs, entropy


def nan_gradient(parameters, max_norm):
    """The loss is finite, one number of its gradient is not."""
    if hit():
        parameters[0].grad.to_local().view(-1)[0] = torch.inf
    return clip(parameters, max_norm)


def nan_reward(response):
    return float("nan") if hit() else language_reward(response)


def left_out(self, *args, **kwargs):
    """What a skipped update must equal: the optimizer is not called."""
    return None if hit() else step(self, *args, **kwargs)


def failing(act):
    def step_or_fail(self, *args, **kwargs):
        if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1 and hit():
            print(f"HOOK {time.time()}", flush=True)
            act()
        return step(self, *args, **kwargs)
    return torch.optim.AdamW, "step", step_or_fail


def boom():
    raise ValueError("boom of the last rank")


def while_sampling(number, pid=0):
    """The signal, to vLLM's process or to the one with that pid, before the first of vLLM's tokens is read."""
    def sample_and_act(self, *args):
        if hit():
            print(f"HOOK {time.time()}", flush=True)
            os.kill(pid or self.processes[0].pid, number)
        return outputs(self, *args)
    return rollout_vllm.VLLMEngine, "outputs", sample_and_act


HOOKS = {"raise": failing(boom), "kill": failing(lambda: os.kill(os.getpid(), signal.SIGKILL)),
         "hang": failing(lambda: time.sleep(600)),
         "stop": while_sampling(signal.SIGTERM, os.getpid()), "kill_engine": while_sampling(signal.SIGKILL),
         "hang_engine": while_sampling(signal.SIGSTOP),
         "record": (torch.nn.utils, "clip_grad_norm_", recording_clip), "nan": (model.Policy, "forward", nan_logprobs),
         "count": (model.Policy, "forward", counted),
         "nan_old": (model.Policy, "forward", nan_old_logprobs), "nan_reward": (reward, "language_reward", nan_reward),
         "nan_gradient": (torch.nn.utils, "clip_grad_norm_", nan_gradient), "left_out": (torch.optim.AdamW, "step", left_out)}

if __name__ == "__main__":
    setattr(*HOOKS[kind])
    runpy.run_path(str(ROOT / "train_rl.py"), run_name="__main__")

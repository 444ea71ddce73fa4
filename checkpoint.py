"""Checkpoints: a model folder that transformers and vLLM open as it is, and beside it, in trainer/, all that the run needs to
go on as if it had never stopped; and the signals on which a run leaves one and ends.

    out_dir/checkpoints/step_000120/                  config.json, model.safetensors, tokenizer, ...
    out_dir/checkpoints/step_000120/trainer/          the sharded master weights and AdamW moments, state.json
    out_dir/checkpoints/step_000120_update_0003/      stopped within step 121, after 3 of its updates
    out_dir/checkpoints/latest                        a link to the newest

A checkpoint is written under another name, flushed to the disk, and renamed; only then does `latest` name it, and only then
are older ones removed. So a run that is killed at any moment leaves the checkpoint before, whole. The shards are those of
torch.distributed.checkpoint in its safetensors format (no pickle): another number of processes can read them.
"""
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from configurator import UserError, say_last
from distributed import all_max, end, gather_json, gather_rows, together
from model import gather_weights, hub_name
from watch import now_at

TEXTS = (".json", ".txt", ".jinja")  # of a model folder: config, tokenizer, processor
NAME = re.compile(r"step_(\d{6,})(?:_update_(\d{4,}))?")
ENGINE_DIED = 1000  # above every signal number
AGAIN_S = 2.0  # torchrun passes on the Ctrl-C that its children got from the terminal as well: that is no second one


class Stop:
    """Why the run should end before its time: SIGTERM or SIGINT sets `signal` (a second one kills the process at once), or
    the engine's process has died."""

    def __init__(self):
        self.signal, self.since, self.engine = 0, 0.0, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > AGAIN_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self):
        """What any rank met: a signal's number, ENGINE_DIED, or 0. A collective: all ranks stop at the same place."""
        died = self.engine is not None and bool(self.engine.died)
        return int(all_max(float(ENGINE_DIED if died else self.signal)))


def leave(number, engine, logs, place):
    """Ends the process on what Stop.agreed() said, after the checkpoint. A collective."""
    how = sorted(set(gather_json(engine.died if engine is not None else "")) - {""})
    if engine is not None:
        engine.close()
    logs.close()
    if dist.get_rank() == 0 and number == ENGINE_DIED:
        say_last(f"{place}: the engine's process died ({', '.join(how)}); --init_from=resume goes on")
    elif dist.get_rank() == 0:
        print(f"stopped by signal {number}; --init_from=resume goes on", flush=True)
    end(1 if number == ENGINE_DIED else 128 + number)


# ---------------------------------------------------------------------------------------------------------------------
# what there is on disk

def checkpoints_of(out_dir):
    """[(step, updates of the next step, folder)] of the checkpoints in out_dir, oldest first."""
    found = [(NAME.fullmatch(path.name), path) for path in pathlib.Path(out_dir, "checkpoints").glob("step_*")]
    return sorted((int(match[1]), int(match[2] or 0), path) for match, path in found if match)


def find_checkpoint(out_dir):
    """The folder of the newest checkpoint to go on from, None where out_dir has no checkpoint at all. A collective: the first
    rank clears away what a killed save left."""
    with together():
        if dist.get_rank() == 0:
            for path in pathlib.Path(out_dir, "checkpoints").glob("step_*.old"):  # killed between two renames
                whole = path.with_suffix("")
                shutil.rmtree(path) if whole.exists() else path.rename(whole)
            for path in pathlib.Path(out_dir, "checkpoints").glob("*.partial"):
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
    found = checkpoints_of(out_dir)
    if len(seen := set(gather_json(found[-1][2].name if found else ""))) > 1:
        raise UserError(f"{out_dir} is not the same folder for all processes: they see {sorted(seen)}; nodes must share it")
    if not found:
        return None
    folder = found[-1][2]
    if not (folder / "trainer" / "state.json").is_file():
        raise UserError(f"{folder} has no trainer/state.json: it is a model, not a run that can go on; start from it by "
                        f"--model={folder} and another out_dir")
    return folder


def read_state(folder):
    """What save_checkpoint wrote to state.json; UserError where that cannot be read."""
    path = folder / "trainer" / "state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {folder} to go on from the checkpoint before it") from None


def check_out_dir(out_dir, init_from, overwrite, model):
    """UserError where out_dir holds another run that would be lost, or the model to start from, or cannot be written to."""
    if init_from not in ("pretrained", "resume"):
        raise UserError(f"config: init_from must be 'pretrained' or 'resume', got {init_from!r}")
    there = os.path.exists(f"{out_dir}/metrics.jsonl") or checkpoints_of(out_dir)
    if init_from == "pretrained" and there and not overwrite:
        raise UserError(f"{out_dir} holds a run; go on with it by --init_from=resume, choose another --out_dir, or "
                        "lose it by --overwrite=True")
    if there and os.path.realpath(model).startswith(os.path.realpath(f"{out_dir}/checkpoints") + os.sep):
        raise UserError(f"model={model!r} lies in out_dir={out_dir!r}, whose checkpoints this run would remove; choose "
                        "another --out_dir")
    try:
        os.makedirs(out_dir, exist_ok=True)
        probe = f"{out_dir}/.probe.{os.getpid()}"
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written to ({error.strerror}); choose another --out_dir") from None


def resumption(init_from, folder, state, config, model):
    """Lines on where the run goes on from, and on knobs that were others when the checkpoint was made: what follows is then
    another run. [] for a run that starts."""
    if init_from != "resume":
        return []
    if folder is None:
        return [f"{config['out_dir']} has no checkpoint yet: starts from {model}"]
    may = ("init_from", "overwrite", "out_dir", "logger", "save_every_steps", "save_every_minutes", "keep_checkpoints",
           "max_skipped_updates", "timeout_minutes")
    old = state.get("config", config)
    changed = [f"{knob} {old.get(knob)!r} -> {value!r}" for knob, value in config.items()
               if knob not in may and old.get(knob) != value]
    return [f"goes on from {folder}", *[f"goes on with other knobs than before: {', '.join(changed)}"] * bool(changed)]


# ---------------------------------------------------------------------------------------------------------------------
# the trainer's state

def trained_tensors(policy, optimizer):
    """{name: this rank's shard} of the trained master weights and of their AdamW moments, which are made where there are none
    yet. Loading into them changes policy and optimizer."""
    tensors = {}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state.update(step=torch.zeros((), device=parameter.device), exp_avg=torch.zeros_like(parameter),
                         exp_avg_sq=torch.zeros_like(parameter))
        tensors |= {f"weight.{name}": parameter.data, f"exp_avg.{name}": state["exp_avg"],
                    f"exp_avg_sq.{name}": state["exp_avg_sq"]}
    return tensors


def random_state(device):
    """The states of this process's random generators, as JSON."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), *rest],
            "torch": torch.get_rng_state().tolist(),
            "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None}


def set_random_state(state, device):
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


def load_trainer(folder, policy, optimizer, world):
    """The state that save_checkpoint was given, after policy, optimizer and random generators became those of the folder.
    A collective, of any number of ranks."""
    state = read_state(folder)
    dcp.load(trained_tensors(policy, optimizer), storage_reader=HuggingFaceStorageReader(str(folder / "trainer")))
    for moments in optimizer.state.values():
        moments["step"].fill_(state["optimizer_steps"])
    if world.rank < len(state["random"]):  # a rank that was not there before begins as any process does
        set_random_state(state["random"][world.rank], world.device)
    return state


def pack_step(completions, trajectory, sums, grad_norms, skipped, updates):
    """A step that stops between two of its updates, as JSON: what was sampled and what the policy of that moment, which is
    gone by now, made of it, in the order of the batch whatever the number of ranks; and its updates' sums. A collective."""
    lengths = [len(completion.token_ids) for completion in completions]
    parts = {"completions": [list(completion) for completion in completions]}
    for name in ("logprobs", "ref_logprobs", "entropy"):  # float32 as JSON and back is exact
        parts[name] = [row[:n] for row, n in zip(getattr(trajectory, name).tolist(), lengths)]
    return {name: gather_rows(rows) for name, rows in parts.items()} | {
        "sums": sums, "grad_norms": grad_norms, "skipped": skipped, "updates": updates}


def mine_of(rows, world):
    """The rows of the batch that are this rank's: p belongs to rank p % world_size."""
    return rows[world.rank::world.world_size]


def unpack_updates(within):
    """sums, grad_norms, skipped and the number of updates done, of a step that pack_step packed."""
    return within["sums"], within["grad_norms"], within["skipped"], within["updates"]


# ---------------------------------------------------------------------------------------------------------------------
# saving

def check_room(out_dir, source, policy, visual, dtype, keep):
    """[a warning] where the disk of out_dir has less room than keep checkpoints and the next one take, those that are there
    counted, else []; UserError where not even one fits. A quota is not seen. A collective."""
    trained = [p.numel() for p in policy.parameters() if p.requires_grad]
    model = sum(p.numel() for part in (policy, visual) if part is not None for p in part.parameters())
    texts = sum(path.stat().st_size for path in pathlib.Path(source).iterdir() if path.suffix in TEXTS)
    # float32 weights and AdamW's two moments, tokenizer and the like, random generators
    size = model * dtype.itemsize + 3 * 4 * sum(trained) + texts + 2**16 * dist.get_world_size()
    with together():
        free, gigabytes = shutil.disk_usage(out_dir).free, f"{size / 1e9:.3g} GB"
        if free < size:
            raise UserError(f"{out_dir}: a checkpoint takes {gigabytes}, {free / 1e9:.3g} GB are free; make room or choose "
                            "another --out_dir")
    count = max(1, keep + 1 - len(checkpoints_of(out_dir)))
    return [] if free >= count * size or not keep else [
        f"WARNING: {out_dir}: {free / 1e9:.3g} GB are free, {count} more checkpoints of {gigabytes} do not fit; make room, "
        "or lower keep_checkpoints"]


@contextlib.contextmanager
def saving(out_dir, folder):
    """A failure to write becomes a UserError that names the checkpoint and the one before."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]  # of one rank; all get it
            if not isinstance(error, (OSError, SafetensorError)):
                raise
        before = f"{checkpoints_of(out_dir)[-1][2]} is whole, make room" if checkpoints_of(out_dir) else "make room"
        raise UserError(f"checkpoint {folder.name} cannot be written ({getattr(error, 'strerror', None) or error}); {before} "
                        "and go on by --init_from=resume") from None


def sync_folder(folder):
    """Returns once every file below folder, and the folders themselves, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def write_model(folder, tensors, source, dtype):
    """A model folder in the hub's format. source: the folder that the run started from, for config, tokenizer, processor."""
    for path in pathlib.Path(source).iterdir():
        if path.suffix in TEXTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict({name: t.contiguous() for name, t in tensors.items()}, folder)


def save_checkpoint(out_dir, step, policy, visual, source, dtype, world, optimizer=None, state=None, keep=0):
    """Writes out_dir/checkpoints/step_000120, points `latest` at it, and removes the oldest beyond keep (0: none), but never
    the one of state["best"]["step"]. A collective; what fails on one rank is raised on all, and the checkpoints before stay.
    state: what load_trainer shall return; its "within" says that the run stopped within step + 1, after so many updates."""
    now_at(f"step {step}: checkpoint")
    within = state and state.get("within")
    root = pathlib.Path(out_dir) / "checkpoints"
    folder = root / (f"step_{step:06d}" + (f"_update_{within['updates']:04d}" if within else ""))
    partial = folder.with_name(folder.name + ".partial")
    tensors, main = {}, world.rank == 0
    for name, full in gather_weights(policy, dtype, trained_only=False):
        if main and not (name == "lm_head.weight" and policy.lm_head is None):  # a tied head is not stored
            tensors[name] = full.to("cpu", copy=True)  # an uneven shard leaves a view of a longer storage
    generators = gather_json(random_state(world.device))
    try:
        with together(), saving(out_dir, folder):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "trainer" if optimizer is not None else partial).mkdir(parents=True)
        if optimizer is not None:
            shards = trained_tensors(policy, optimizer)
            with saving(out_dir, folder):
                dcp.save(shards, storage_writer=HuggingFaceStorageWriter(str(partial / "trainer"), save_distributed=True))
            steps = {int(moments["step"]) for moments in optimizer.state.values()}
            assert len(steps) == 1, f"parameters of one optimizer with different numbers of updates: {steps}"
        with together(), saving(out_dir, folder):
            if main:
                if visual is not None:
                    tensors |= {hub_name("visual." + n): p.detach().to("cpu", dtype) for n, p in visual.named_parameters()}
                write_model(partial, tensors, source, dtype)
                if optimizer is not None:
                    text = json.dumps(state | {"step": step, "optimizer_steps": steps.pop(), "random": generators})
                    (partial / "trainer" / "state.json").write_text(text, encoding="utf-8")
                sync_folder(partial)
                publish(root, partial, folder)
                prune(out_dir, folder, keep, (state or {}).get("best"))
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
        raise


def publish(root, partial, folder):
    """partial becomes folder, and `latest` names it: at each moment there is a whole checkpoint under its name."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    link = root / "latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(root / "latest")
    handle = os.open(root, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def prune(out_dir, newest, keep, best):
    """Removes the oldest checkpoints beyond keep, and those that stopped within a step which the newest is past."""
    found = checkpoints_of(out_dir)
    stay = {newest} | {path for step, updates, path in found if best and (step, updates) == (best["step"], 0)}
    whole = [path for _, updates, path in found if not updates and path not in stay]
    surplus = max(0, len(whole) + len(stay) - keep) if keep else 0
    for path in whole[:surplus] + [path for _, updates, path in found if updates and path not in stay]:
        gone = path.with_name(path.name + ".partial")  # from here on it is no checkpoint, however much of it is left
        path.rename(gone)
        shutil.rmtree(gone)

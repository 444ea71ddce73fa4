"""What a run leaves in out_dir, and how it goes on from there.

    config.py                        the knobs: a config file that repeats the run
    metrics.jsonl, eval.jsonl, samples.jsonl   an object a step, an evaluation's setting, a kept response
    checkpoints/step_000120/         a model that transformers and vLLM open as it is
    checkpoints/step_000120/trainer/ sharded float32 weights, AdamW's moments, state.json
    checkpoints/step_000120/adapter/ LoRA's adapters as PEFT stores them; the model has them merged
    checkpoints/latest               a link to the newest

A checkpoint is written under another name and renamed; only then does `latest` name it, and only then are
older ones removed: a run that is killed at any moment leaves the one before, whole. Data order and sampling
are functions of (seed, step, id), so weights, moments and a few numbers are all it needs.
"""
import importlib.util
import json
import os
import pathlib
import shutil
import signal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint import (DefaultSavePlanner, HuggingFaceStorageReader,
                                          HuggingFaceStorageWriter)

from configurator import UserError, check_at_least, one_of, save_config
from distributed import all_max
from model import name_in_memory, gather_weights, open_weights

LOGS = ("metrics", "eval", "samples")


class Stop:
    """SIGTERM or Ctrl-C: the step ends, then a checkpoint, then the run. A second one kills as usual."""

    def __init__(self):
        self.signal, self.exit_status = 0, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self):
        """The number of the signal that any rank got, or 0. A collective: all ranks stop together."""
        number = int(all_max(self.signal))
        self.exit_status = 128 + number if number else 0
        return number


def check_trainer(config):
    """UserError for what both trainers refuse before anything slow."""
    check_at_least(config, 1, "batch_size", "epochs", "max_new_tokens", "max_prompt_tokens",
                   "max_tokens_per_microbatch", "lora_alpha")
    check_at_least(config, 0, "lora_rank")
    one_of(config, "init_from", "pretrained", "resume")
    one_of(config, "logger", "none", "tensorboard", "wandb")
    out_dir, logger = config["out_dir"], config["logger"]
    if not (config["model"] and config["train_data"]):
        raise UserError("command line: model or train_data is empty; start from a config, as config/toy.py")
    if not (config["train_llm"] or config["train_connector"] or config["train_vit"]):
        raise UserError("config: nothing to train; set train_llm, train_connector or train_vit to True")
    if config["lora_rank"] and (not config["train_llm"] or config["train_connector"] or config["train_vit"]):
        raise UserError("config: lora_rank trains the language model alone: set train_llm to True, "
                        "train_connector and train_vit to False")
    if config["init_from"] == "pretrained" and os.path.exists(f"{out_dir}/metrics.jsonl"):
        raise UserError(f"{out_dir} holds a run; go on with it by --init_from=resume, choose another "
                        f"--out_dir, or rm -r {out_dir}")
    if logger != "none" and importlib.util.find_spec(logger) is None:
        raise UserError(f"{logger=} is not installed; pip install {logger}")


# ------------------------------------------------------------------------------------------------------------
# the trainer's state

def trained_tensors(policy, optimizer):
    """{name: this rank's shard} of the trained float32 weights and of AdamW's moments, which are made where
    there are none yet: torch.distributed.checkpoint loads only into what exists."""
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


def load_trainer(out_dir, policy, optimizer):
    """The step of out_dir's newest checkpoint, once policy and optimizer are those of then; 0 when there is
    none. A collective, of any number of ranks."""
    path, state = pathlib.Path(out_dir, "checkpoints", "latest", "trainer"), {"step": 0}
    if path.exists():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    newest, oldest = int(all_max(state["step"])), -int(all_max(-state["step"]))
    if newest != oldest:
        raise UserError(f"{out_dir}: nodes have checkpoints of steps {oldest} to {newest}; copy the first "
                        "node's out_dir to all of them")
    if not state["step"]:
        return 0
    if list(policy.lora) != (had := state.get("lora", [0, 0])):
        raise UserError(f"config: rank and alpha of LoRA are {policy.lora}, but {had} in {out_dir}")
    dcp.load(trained_tensors(policy, optimizer), storage_reader=HuggingFaceStorageReader(str(path.resolve())))
    for moments in optimizer.state.values():
        moments["step"].fill_(state["optimizer_steps"])
    return state["step"]


def save_checkpoint(out_dir, step, policy, visual, optimizer, source, dtype, keep):
    """Writes out_dir/checkpoints/step_000120, has `latest` name it, removes the oldest beyond keep (0: none).
    source: the model's folder that the run started from; dtype: of the stored model. A collective."""
    root = pathlib.Path(out_dir, "checkpoints")
    folder = root / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    is_main, tensors = dist.get_rank() == 0, {}
    for name, full in gather_weights(policy, dtype, trained_only=False):
        if is_main and not (name == "lm_head.weight" and policy.lm_head is None):  # a tied head is not stored
            tensors[name] = full.to("cpu", copy=True)  # an uneven shard leaves a view of a longer storage
    adapters = {name_in_memory(name): parameter.detach().full_tensor().cpu()
                for name, parameter in policy.named_parameters() if "lora_" in name}
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer").mkdir(parents=True)
        if visual is not None:
            for name, parameter in visual.named_parameters():
                tensors[name_in_memory("visual." + name)] = parameter.detach().to("cpu", dtype)
        write_model(partial, tensors, source, dtype)
        if adapters:
            write_adapters(partial / "adapter", adapters, source, *policy.lora)
    dist.barrier()  # the folder is there
    dcp.save(trained_tensors(policy, optimizer),
             storage_writer=HuggingFaceStorageWriter(str(partial / "trainer"), save_distributed=True),
             planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))  # all of it on the first node
    if is_main:
        state = {"step": step, "optimizer_steps": int(next(iter(optimizer.state.values()))["step"]),
                 "lora": policy.lora}
        (partial / "trainer" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before `latest` named it
        partial.rename(folder)
        link = root / "latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(root / "latest")
        for old in sorted(root.glob("step_" + "[0-9]" * 6))[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()


def write_model(folder, tensors, source, dtype):
    """A model folder in the hub's format: as source has them, config, tokenizer, processor and names."""
    for path in pathlib.Path(source).iterdir():
        if path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = {name: stored for name, (_, stored) in open_weights(source).items()}
    save_torch_state_dict({names[name]: t.contiguous() for name, t in tensors.items()}, folder)


def write_adapters(folder, adapters, source, rank, alpha):
    """LoRA's adapters, {name: tensor}, in PEFT's format. In a folder of their own: beside the merged model's
    config.json transformers would add them to it once more."""
    folder.mkdir()
    save_file({f"base_model.model.{name}.weight": t for name, t in adapters.items()},
              folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(source), r=rank,
                  lora_alpha=alpha, target_modules=[
                      name.removesuffix(".lora_A") for name in adapters if name.endswith(".lora_A")])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# logs

class Logs:
    """The jsonl files of out_dir, and a logger beside them. Only the main process writes."""

    def __init__(self, config, first_step, is_main):
        """first_step: where the run begins or goes on. Rows of that step and later ones are cut off."""
        self.files, self.show = {}, None  # show: of a logger
        if not is_main:
            return
        out_dir = config["out_dir"]
        save_config(config, f"{out_dir}/config.py")
        for name in LOGS:
            path = pathlib.Path(out_dir, f"{name}.jsonl")
            lines = path.read_bytes().splitlines(keepends=True) if first_step > 1 else []
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < first_step]
            temporary = path.with_suffix(".partial")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)
            self.files[name] = open(path, "a", encoding="utf-8")
        if config["logger"] == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(f"{out_dir}/tensorboard", purge_step=first_step)
            self.show = lambda values, step: [writer.add_scalar(key, x, step) for key, x in values.items()]
            self.finish = writer.close
        if config["logger"] == "wandb":
            import wandb
            run = wandb.init(project="nanomaye", name=os.path.basename(out_dir), dir=out_dir, config=config)
            self.show, self.finish = run.log, run.finish

    def write(self, name, rows):
        """Appends the objects to out_dir/<name>.jsonl; what is not finite becomes null."""
        for row in rows if self.files else []:
            row = json.loads(json.dumps(row), parse_constant=lambda nan_or_infinity: None)  # JSON has neither
            self.files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
            self.files[name].flush()
            if self.show and name == "metrics":
                self.show({key: x for key, x in row.items() if x is not None}, row["step"])
            if self.show and name == "eval":
                self.show({f"eval/{row['split']}/{row['setting']}": row["accuracy"]}, row["step"])

    def close(self):
        for file in self.files.values():
            file.close()
        if self.show:
            self.finish()

"""What a run would do and need, by arithmetic on a config.json: parameters, bytes on each GPU, steps and updates.

    python train_rl.py config/geo3k.py --dry_run=True --model=FOLDER_WITH_A_CONFIG_JSON     # as one process
    torchrun --nproc_per_node=7 train_rl.py config/geo3k.py --dry_run=True                  # as seven

No weights are read, no GPU is touched, and the data need not be there yet when it is one of the paper's sets.
"""
import math
import os
from typing import NamedTuple

import torch

import model as models
from configurator import UserError
from data import SIZES

MASTER_BYTES, GRADIENT_BYTES, ADAM_BYTES = 4, 4, 8  # float32 weights, gradients, and AdamW's two moments


class Plan(NamedTuple):
    """Counts of parameters, and bytes on the fullest GPU (the first rank: it holds the larger shards)."""
    trained: int
    frozen: int
    weights: int  # sharded float32 master weights
    gradients: int  # sharded, float32
    optimizer: int  # sharded, float32
    reference: int  # sharded, in the compute dtype
    tower: int  # frozen vision tower in the compute dtype, whole on each GPU; 0 when it is trained and so sharded
    gathered: int  # largest layer and the embedding-and-head group, whole for compute, with gradients as made and in float32
    features: int  # image features of the rank's rows at max_pixels, at most
    logits: int  # one chunk of logits, float32, and its two copies in backward
    engine: int  # unsharded copy of the model for rollout='hf'; 0 with vLLM, which has its own GPU


def shard(parameters, world_size):
    """Elements on the first rank: FSDP2 cuts the first dimension into world_size chunks, the last ones smaller or empty."""
    return sum(math.ceil(p.shape[0] / world_size) * (p.numel() // p.shape[0]) for p in parameters)


def plan(config, hf_config, world_size, dtype_bytes) -> Plan:
    """The Plan for resolved knobs, a transformers config and a number of processes; dtype_bytes: 2 bfloat16, 4 float32."""
    hf = models.on_meta(hf_config)
    trains_tower = config["train_connector"] or config["train_vit"]
    policy, visual = models.Policy(hf, with_visual=trains_tower), hf.model.visual
    models.set_trained(policy, visual, config["train_llm"], config["train_connector"], config["train_vit"])
    sharded = list(policy.parameters())
    trained = [p for p in sharded if p.requires_grad]
    tower = 0 if trains_tower else sum(p.numel() for p in visual.parameters())
    blocks = [*policy.language_model.layers, *(visual.blocks if trains_tower else [])]
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    root = [p for p in sharded if id(p) not in in_blocks]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    merge, patch = hf_config.vision_config.spatial_merge_size, hf_config.vision_config.patch_size
    needs_reference = config["kl_loss_coeff"] or config["kl_reward_coeff"]
    return Plan(
        trained=sum(p.numel() for p in trained), frozen=sum(p.numel() for p in sharded if not p.requires_grad) + tower,
        weights=MASTER_BYTES * shard(sharded, world_size), gradients=GRADIENT_BYTES * shard(trained, world_size),
        optimizer=ADAM_BYTES * shard(trained, world_size),
        reference=dtype_bytes * shard(sharded, world_size) if needs_reference else 0, tower=dtype_bytes * tower,
        gathered=(2 * dtype_bytes + 4) * (largest + sum(p.numel() for p in root)),
        features=dtype_bytes * (config["batch_size"] // world_size * (config["max_pixels"] // (merge * patch) ** 2)
                                * hf_config.text_config.hidden_size),
        logits=3 * 4 * models.LOGITS_PER_CHUNK["cuda"],
        engine=dtype_bytes * (sum(p.numel() for p in sharded) + tower) if config["rollout"] == "hf" else 0)


def training_rows(path):
    """(rows, where the number comes from) of the training data: its lines, or the paper's table while it is not there."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            return sum(bool(line.strip()) for line in file), "counted"
    for name, (rows, _, _) in SIZES.items():
        if f"/{name}/" in path:
            return rows, f"by the paper's table; {path} is not there yet"
    raise UserError(f"train_data: {path} does not exist")


def show_plan(config, world_size):
    """Prints the Plan and the arithmetic of the run, on the first process alone."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    hf_config = models.load_config(models.local_folder(config["model"], patterns=("config.json",)))
    dtype = models.compute_dtype(config["dtype"], torch.device("cuda"))
    p = plan(config, hf_config, world_size, dtype.itemsize)
    dtype = str(dtype).removeprefix("torch.")
    rows, source = training_rows(config["train_data"])
    batch, minibatch = config["batch_size"], config["minibatch_size"]
    per_epoch = rows // batch
    if per_epoch == 0:
        raise UserError(f"{config['train_data']}: {rows} rows do not fill one batch, batch_size={batch}")
    steps, per_step = config["max_steps"] or config["epochs"] * per_epoch, batch // minibatch * config["ppo_epochs"]
    longest = config["max_prompt_tokens"] + config["max_new_tokens"]
    fit = max(1, config["max_tokens_per_microbatch"] // longest)  # rows of full length in one micro-batch
    print(f"dry run: {config['model']} on {world_size} processes, {dtype} compute; nothing is trained")
    print(f"parameters  {p.trained:,} trained, {p.frozen:,} frozen")
    print("bytes on the fullest GPU")
    for name, note in (("weights", "float32 master weights, sharded"), ("gradients", "float32, sharded"),
                       ("optimizer", "AdamW's two float32 moments, sharded"), ("reference", f"{dtype}, sharded"),
                       ("tower", f"frozen vision tower, {dtype}, whole"),
                       ("features", "image features of the step, if all images are largest"),
                       ("gathered", "largest layer, embedding and head, whole for compute, with gradients"),
                       ("logits", "a chunk of them, three times"), ("engine", "the sampler's own copy (rollout='hf')")):
        print(f"  {name:<10} {getattr(p, name):>16,}  {getattr(p, name) / 1e9:7.2f} GB  {note}")
    total = sum(p[2:])
    print(f"  {'together':<10} {total:>16,}  {total / 1e9:7.2f} GB  and activations: at most "
          f"{config['max_tokens_per_microbatch']:,} tokens at a time, which this sum leaves out")
    print(f"data        {rows} rows ({source}): {rows} // {batch} = {per_epoch} steps an epoch, {steps} steps in all")
    print(f"a step      {batch} responses, {batch // world_size} on each rank; {per_step} updates of {minibatch} responses, "
          f"{minibatch // world_size} on each rank")
    print(f"micro-batches of an update on a rank: {math.ceil(minibatch // world_size / fit)} at most "
          f"({fit} rows of {longest} tokens fit in {config['max_tokens_per_microbatch']}), fewer when rows are shorter")

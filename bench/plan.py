"""What a run would need, by arithmetic on its model's config.json: nothing is loaded, no GPU is touched.

    python -m bench.plan config/geo3k.py --nproc=7 [--gpu_gb=80] [--key=value ...]

Bytes are of the fullest GPU, the first rank's: FSDP2 cuts a parameter's first dimension, the last shards are
smaller. Left out: the CUDA context, fragmentation, the prefetch of a second layer, and on the host what
Python and its libraries take, some 2 GB a process.
"""
import math
import os
import sys

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForImageTextToText

import model as models
import train_rl
from bench.__main__ import make_parser
from configurator import UserError, configure, excepthook

PAPER_ROWS = {"geometry3k": 2101, "mm_math5k": 5000}  # of training data, by its folder (the paper's table 1)


def count(parameters, nproc=1):
    """Elements of the parameters on the first of nproc ranks."""
    return sum(math.ceil(p.shape[0] / nproc) * (p.numel() // p.shape[0]) for p in parameters)


def plan(knobs, hf_config, nproc, gpu_gb):
    """{title: {what: number}}: parameters of the model's parts; bytes on the fullest training GPU, on vLLM's,
    and in the memory of all processes during a checkpoint. knobs: train_rl.py's; hf_config: the model's."""
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(hf_config)
    text, vision = hf_config.text_config, hf_config.vision_config
    flags = knobs["train_llm"], knobs["train_connector"], knobs["train_vit"]
    policy, visual = models.Policy(hf, with_visual=flags[1] or flags[2]), hf.model.visual
    models.set_trained(policy, visual, *flags)
    sharded, layers = list(policy.parameters()), policy.language_model.layers
    trained = [p for p in sharded if p.requires_grad]
    tower, merger, inner = (count(part.parameters()) for part in (visual, visual.merger, layers))
    outer = count(hf.parameters()) - inner - tower
    whole, gathered = outer + inner + tower, outer + inner // len(layers)

    b, hidden = models.compute_dtype(knobs["dtype"], torch.device("cuda")).itemsize, text.hidden_size
    tokens, reference = knobs["max_tokens_per_microbatch"], knobs["kl_loss_coeff"] or knobs["kl_reward_coeff"]
    kv = hidden // text.num_attention_heads * text.num_key_value_heads
    # a layer keeps for its backward, a token: in float32 two norms' inputs; in b bytes what these norms make,
    # before and after their weights, q, attention's output, k and v, gate, up, gate's activation, the product
    layer = 8 * hidden + b * (6 * hidden + 2 * kv + 4 * text.intermediate_size)
    kept = b * hidden * len(layers) + layer if knobs["activation_checkpointing"] else layer * len(layers)
    logits = min(models.LOGITS_PER_CHUNK["cuda"], tokens * text.vocab_size)
    image_tokens = knobs["max_pixels"] // (vision.spatial_merge_size * vision.patch_size) ** 2
    room = int(knobs["gpu_memory_utilization"] * gpu_gb * 1e9) - b * whole
    return {
        f"1e9 parameters, {count(trained):,} trained": {
            "language model's layers": inner, "embedding, head, norm": outer,
            "vision tower": tower - merger, "merger": merger},
        f"GB of the {gpu_gb:g} of a training GPU": {
            "weights, float32, sharded": 4 * count(sharded, nproc),
            "gradients, float32, sharded": 4 * count(trained, nproc),
            "AdamW's two moments, float32, sharded": 8 * count(trained, nproc),
            "reference, sharded": b * count(sharded, nproc) if reference else 0,
            "frozen vision tower, whole": b * tower if policy.visual is None else 0,
            "embedding, head and a layer, gathered": b * gathered,
            "their gradients, as made and in float32": (b + 4) * gathered,
            f"activations of {tokens:,} tokens": tokens * kept,
            "a chunk of logits, three times": 3 * 4 * logits,
            "features, if all pictures are largest": knobs["batch_size"] // nproc * image_tokens * b * hidden,
            "the sampler's own model": b * whole if knobs["rollout"] == "hf" else 0},
        "GB on vLLM's GPU": {} if knobs["rollout"] == "hf" else {
            "weights": b * whole, f"cache of {room // (2 * b * kv * len(layers)):,} tokens at most": room},
        "GB on the host during a checkpoint": {
            "the model, by the first rank": b * whole, "weights and moments, by all": 12 * count(trained)}}


def count_rows(path):
    """Rows of the training data; of the paper's table while it is not there."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            return sum(bool(line.strip()) for line in file)
    if (folder := os.path.basename(os.path.dirname(path))) not in PAPER_ROWS:
        raise UserError(f"config: train_data={path!r} does not exist")
    return PAPER_ROWS[folder]


if __name__ == "__main__":
    sys.excepthook = excepthook
    parser = make_parser("python -m bench.plan", __doc__)
    parser.add_argument("--nproc", type=int, default=1, help="training processes, a GPU each")
    parser.add_argument("--gpu_gb", type=float, default=80.0, help="memory of a GPU")
    arguments, flags = parser.parse_known_args()
    c, nproc = configure(dict(vars(train_rl)), [*arguments.config, *flags]), arguments.nproc
    batch, minibatch, rows = c["batch_size"], c["minibatch_size"], count_rows(c["train_data"])
    per_epoch, responses, least = rows // batch, *(n * c["samples_per_query"] for n in (batch, nproc))
    if not per_epoch or least < 1 or responses % minibatch or minibatch % least:
        raise UserError(f"config: {rows} rows must fill {batch=}; {minibatch=} must divide {responses=} of a "
                        f"step, and be a multiple of samples_per_query * nproc = {least}")
    try:
        is_folder = os.path.isdir(c["model"])
        folder = c["model"] if is_folder else os.path.dirname(hf_hub_download(c["model"], "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"model: no config.json of {c['model']!r} ({type(error).__name__})") from error
    for title, numbers in plan(c, models.load_config(folder), nproc, arguments.gpu_gb).items():
        for what, n in {title: sum(numbers.values()), **numbers}.items():
            print(f"{what if what == title else '    ' + what:48}{n / 1e9:8.3f}")
    steps, updates = c["max_steps"] or c["epochs"] * per_epoch, responses // minibatch * c["ppo_epochs"]
    print(f"{rows} rows // {batch} = {per_epoch} steps an epoch, {steps} in all\n"
          f"{responses} responses a step, {responses // nproc} on a rank; {steps * responses:,} in all\n"
          f"{updates} updates a step, {minibatch // nproc} responses on a rank; {steps * updates:,} in all")

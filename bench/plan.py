"""What a run would need, by arithmetic on its model's config.json: nothing is loaded, no GPU is touched.

    python -m bench.plan config/geo3k.py --nproc=7 [--gpu_gb=80] [--gpus=8] [--key=value ...]

Bytes are of the fullest GPU, the first rank's: FSDP2 cuts a parameter's first dimension, the last shards are
smaller. Left out: CUDA's own memory in each process (vLLM's stays when it sleeps), what vLLM's activations
and graphs take of its share, fragmentation, the prefetch of a second layer: a card is full at 95 percent. On
the host: what Python and its libraries take, some 2 GB a process. --gpus: of a node; by default the run's own
and one for vLLM; with 1 they share it.
"""
import math
import os
import sys

import torch
from transformers import AutoModelForImageTextToText

import model as models
import train_rl
from bench.__main__ import make_parser
from configurator import UserError, configure, excepthook

PAPER_ROWS = {"geometry3k": 2101, "mm_math5k": 5000}  # of training data, by its folder (the paper's table 1)
ADVICE = {  # beginning of a row -> what makes it smaller
    "activations": "lower max_tokens_per_microbatch", "AdamW": "set lora_rank=32, or train on more GPUs",
    "reference": "set kl_loss_coeff=0", "features": "lower batch_size or max_pixels",
    "cache for": "lower gpu_memory_utilization", "the sampler": "set rollout='vllm'"}


def count(parameters, nproc=1):
    """Elements of the parameters on the first of nproc ranks."""
    return sum(math.ceil(p.shape[0] / nproc) * (p.numel() // p.shape[0]) for p in parameters)


def plan(knobs, hf_config, nproc, gpu_gb, shared=False):
    """{title: {what: number}}: parameters of the model's parts; bytes on the fullest training GPU, on vLLM's,
    and in the memory of all processes during a checkpoint. knobs: train_rl.py's; hf_config: the model's;
    shared: vLLM samples on the training GPU, and sleeps during the update."""
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(hf_config, dtype=torch.float32)
    text, vision = hf_config.text_config, hf_config.vision_config
    flags, lora = (knobs["train_llm"], knobs["train_connector"], knobs["train_vit"]), knobs["lora_rank"]
    compute = models.compute_dtype(knobs["dtype"], torch.device("cuda"))
    policy, visual = models.Policy(hf, with_visual=flags[1] or flags[2]), hf.model.visual
    models.set_trained(policy, visual, *flags)
    connector = [p for name, p in visual.named_parameters() if name.startswith(models.CONNECTOR)]
    layers = policy.language_model.layers
    # elements: inner of all layers, outer of embedding, head and norm, own of the policy on the first rank,
    # gathered of what FSDP holds whole at once
    tower, merger, inner = map(count, (visual.parameters(), connector, layers.parameters()))
    outer, own = count(hf.parameters()) - inner - tower, count(policy.parameters(), nproc)
    whole, gathered = outer + inner + tower, outer + inner // len(layers)
    if lora:
        models.add_adapters(policy, compute, lora, knobs["lora_alpha"])
    trained = [p for p in policy.parameters() if p.requires_grad]
    with_gradient = count(trained) // len(layers) if lora else gathered

    b, hidden, heads = compute.itemsize, text.hidden_size, text.num_attention_heads
    tokens, reference = knobs["max_tokens_per_microbatch"], knobs["kl_loss_coeff"] or knobs["kl_reward_coeff"]
    head = getattr(text, "head_dim", None) or hidden // heads
    q, kv = head * heads, head * text.num_key_value_heads
    # a layer keeps for its backward, a token: in float32 two norms' inputs; in b bytes what these norms make,
    # before and after their weights, q, attention's output, k and v, gate, up, gate's activation, the product
    layer = 8 * hidden + b * (4 * hidden + 2 * q + 2 * kv + 4 * text.intermediate_size)
    kept = b * hidden * len(layers) + layer if knobs["activation_checkpointing"] else layer * len(layers)
    logits = min(models.LOGITS_PER_CHUNK["cuda"], tokens * text.vocab_size)
    image_tokens = knobs["max_pixels"] // (vision.spatial_merge_size * vision.patch_size) ** 2
    wide = b * hidden * (1 + len(getattr(vision, "deepstack_visual_indexes", ())))  # of an image token
    share = int(knobs["gpu_memory_utilization"] * gpu_gb * 1e9) if knobs["rollout"] == "vllm" else 0
    resident = {
        f"{'frozen weights, float32 adapters' if lora else 'weights, float32'}, sharded": sum(
            p.itemsize * count([p], nproc) for p in policy.parameters()),
        "AdamW's two moments, float32, sharded": 8 * count(trained, nproc),
        "reference, sharded": b * own if reference and not lora else 0,
        "frozen vision tower, whole": b * tower if policy.visual is None else 0,
        "features, if all pictures are largest": knobs["batch_size"] // nproc * image_tokens * wide,
        "the sampler's own model": b * whole if knobs["rollout"] == "hf" else 0}
    update = {
        "gradients, float32, sharded": 4 * count(trained, nproc),
        "embedding, head and a layer, gathered": b * gathered,
        "their gradients, as made and in float32": (b + 4) * with_gradient,
        f"activations of {tokens:,} tokens": tokens * kept,
        "a chunk of logits, three times": 3 * 4 * logits}
    of_token = 2 * b * kv * len(layers)  # bytes of its keys and values
    longest = of_token * (knobs["max_prompt_tokens"] + knobs["max_new_tokens"])
    more = share - b * whole - longest
    vllm = {"vLLM's weights": b * whole, "cache of the longest sequence": longest,
            f"cache for {more // of_token:,} more tokens at most": more}
    if shared and knobs["rollout_ahead"]:
        update |= vllm  # it samples meanwhile
    return {
        f"1e9 parameters, {count(trained):,} trained": {
            "language model's layers": inner, "embedding, head, norm": outer,
            "vision tower": tower - merger, "mergers": merger},
        f"GB of the {gpu_gb:g} of a training GPU, in an update": {**resident, **update},
        f"GB of the {gpu_gb:g} while vLLM samples" if shared else "GB on vLLM's GPU":
            {} if not share else {**resident, **vllm} if shared else vllm,
        "GB on the host at most": {
            "the model, by the first rank": b * whole, "weights and moments, by all": 12 * count(trained),
            "vLLM's weights while it sleeps": b * whole if shared else 0}}


def advice(numbers, gpu_gb):
    """What to change so that these bytes fit a card: of the rows over 5 percent of it, the largest first."""
    if sum(n for n in numbers.values() if n > 0) <= 0.95e9 * gpu_gb:
        return "fits" if min(numbers.values()) >= 0 else "does NOT fit: raise gpu_memory_utilization"
    rows = [what for what in numbers if numbers[what] > 0.05e9 * gpu_gb]
    rows.sort(key=numbers.get, reverse=True)
    found = [ADVICE[key] for what in rows for key in ADVICE if what.startswith(key)]
    return "does NOT fit: " + "; ".join([*found, "take a smaller model or a larger card"])


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
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of the node; 0 = as many as the run needs")
    arguments, flags = parser.parse_known_args()
    nproc, gpu_gb = arguments.nproc, arguments.gpu_gb
    c = configure(dict(vars(train_rl)), [*arguments.config, *flags])
    batch, minibatch, rows = c["batch_size"], c["minibatch_size"], count_rows(c["train_data"])
    group, per_epoch = c["samples_per_query"], rows // batch
    responses, least = batch * group, nproc * group
    if not per_epoch or least < 1 or responses % minibatch or minibatch % least:
        raise UserError(f"config: {rows} rows must fill {batch=}; {minibatch=} must divide {responses=} of a "
                        f"step, and be a multiple of samples_per_query * nproc = {least}")
    vllm = c["rollout"] == "vllm"
    gpus = arguments.gpus or nproc + vllm
    if gpus < nproc or gpus == nproc > 1 and vllm:
        raise UserError(f"--gpus={gpus} are too few for {nproc} that train and one that samples")
    hf_config = models.load_config(c["model"])
    for title, numbers in plan(c, hf_config, nproc, gpu_gb, vllm and gpus == nproc).items():
        for what, n in {title: sum(numbers.values()), **numbers}.items():
            print(f"{what if what == title else '    ' + what:52}{n / 1e9:8.3f}")
        if numbers and ("GPU" in title or "while" in title):
            print(f"    {advice(numbers, gpu_gb)}")
    steps, updates = c["max_steps"] or c["epochs"] * per_epoch, responses // minibatch * c["ppo_epochs"]
    print(f"{rows} rows // {batch} = {per_epoch} steps an epoch, {steps} in all\n"
          f"{responses} responses a step, {responses // nproc} on a rank; {steps * responses:,} in all\n"
          f"{updates} updates a step, {minibatch // nproc} responses on a rank; {steps * updates:,} in all")

"""The policy: a Qwen2-VL or Qwen2.5-VL language model that gives log-probabilities of responses, sharded by FSDP2.

    load_policy    config -> modules on the meta device -> sharded -> filled from safetensors, one tensor at a time
    encode         rows of a dataset -> token ids and image features, by a frozen vision tower
    Policy         token ids, positions and image features -> log-probabilities and entropy of the response tokens
    gather_weights, save_checkpoint    sharded parameters -> full tensors under the hub's names -> a folder

Only the hub's names leave this file ('model.layers.0...', 'visual...', 'lm_head.weight'): transformers renamed its modules
in memory, the checkpoints on the hub and vLLM kept the old names.
"""
import json
import math
import os
import pathlib
import resource
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from configurator import UserError
from data import open_readers
from watch import progress

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
# elements of a (tokens, vocabulary) block of logits. on a CPU 64 MB in float32, 110 tokens of Qwen's; on a GPU 512 MB:
# the head's gradient is summed over the chunks in bfloat16, and few large sums lose less than many small ones
LOGITS_PER_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
PATCHES_PER_CHUNK = 1 << 14  # image patches that go through a frozen tower at once: 4096 image tokens
IMAGES_IN_MEMORY = 32  # images whose pixels are held before their features are made


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities without the (tokens, vocabulary) logits

class HeadLogprobs(torch.autograd.Function):
    """chunked_logprobs: forward drops the logits of a chunk of rows once they are used; backward makes them again and turns
    them into their own gradient in place."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned_ids, with_entropy):
        ctx.chunk = max(1, LOGITS_PER_CHUNK[hidden.device.type] // weight.shape[0])
        ctx.temperature, ctx.banned_ids = temperature, banned_ids
        normaliser = hidden.new_empty(len(hidden), dtype=torch.float32)
        logprobs, entropy = torch.empty_like(normaliser), torch.zeros_like(normaliser)
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            logits = HeadLogprobs.logits(ctx, hidden[rows], weight)
            normaliser[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - normaliser[rows]
            if with_entropy:
                probs = (logits - normaliser[rows, None]).exp_()
                entropy[rows] = normaliser[rows] - probs.mul_(logits).sum(-1)  # H = log Z - E[logit]
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def logits(ctx, hidden, weight):
        """(n, V) float32 of one chunk."""
        logits = (hidden @ weight.T).float().div_(ctx.temperature)
        if ctx.banned_ids:
            logits[:, ctx.banned_ids] = torch.finfo(torch.float32).min  # not -inf: 0 * -inf in the entropy would be nan
        return logits

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            g = grad[rows, None] / ctx.temperature
            logits = HeadLogprobs.logits(ctx, hidden[rows], weight)
            d = logits.sub_(normaliser[rows, None]).exp_().mul_(-g)  # d logprob / d logit = [target] - p
            d = d.scatter_add_(1, targets[rows, None], g).to(hidden.dtype)
            grad_hidden[rows] = d @ weight
            if grad_weight is not None:
                grad_weight.addmm_(d.T, hidden[rows])
        return grad_hidden, grad_weight, None, None, None, None


def chunked_logprobs(hidden, weight, targets, temperature, banned_ids, with_entropy=True):
    """(N,) logprobs and (N,) entropy, float32, of softmax(hidden W^T / temperature) at targets. hidden (N, H), weight (V, H),
    targets (N,) int64. banned_ids (a list) are outside the distribution, as they are in both engines. Entropy carries no
    gradient, and is 0 if not wanted. (N, V) never exists: for N = 2048 and V = 151,936 it would be over a GB."""
    return HeadLogprobs.apply(hidden, weight, targets, temperature, banned_ids, with_entropy)


# ---------------------------------------------------------------------------------------------------------------------
# the policy

class ImageInput(NamedTuple):
    pixel_values: torch.Tensor  # (patches, channels * temporal * 14 * 14) float32
    grid_thw: torch.Tensor  # (1, 3) int64: frames, rows and columns of patches


class Query(NamedTuple):
    """A row of a dataset as the language model takes it."""
    ids: list  # of int, with as many placeholders as the image has tokens
    grid_thw: torch.Tensor  # (1, 3) int64
    image: object  # its features, (tokens, H); an ImageInput where the tower is trained: its features change


def encode(visual, dataset, rows, known=(), read=None):
    """{row: Query} of the rows of a dataset. Each image is read once and goes through the frozen tower visual once, however
    often its row is there; with visual None its pixels stay. known: {row: Query} of some, which are taken from there, as
    from dataset.kept. read: row -> Inputs; None: from disk."""
    queries, rows = {}, sorted(set(rows))
    for chunk in (rows[i:i + IMAGES_IN_MEMORY] for i in range(0, len(rows), IMAGES_IN_MEMORY)):
        for row in chunk:
            query = known[row] if row in known else dataset.kept.get(row)
            if query is None:
                x = (read or dataset.inputs)(row)
                query = Query(x.query_ids, x.grid_thw, ImageInput(x.pixel_values, x.grid_thw))
            queries[row] = query
        if visual is not None:
            fresh = [row for row in chunk if isinstance(queries[row].image, ImageInput)]
            for row, features in zip(fresh, encode_images(visual, [queries[row].image for row in fresh])):
                queries[row] = queries[row]._replace(image=features)
            device = visual.patch_embed.proj.weight.device
            queries |= {row: queries[row]._replace(image=queries[row].image.to(device)) for row in chunk}
    return queries


def keep_all(visual, dataset, rows):
    """Fills dataset.kept with those rows, in CPU memory. All at once: features made with those of other rows would be
    rounded differently, and a resumed run would not be the unbroken one."""
    with open_readers() as readers:
        for i in range(0, len(rows), IMAGES_IN_MEMORY):
            chunk = rows[i:i + IMAGES_IN_MEMORY]
            read = dict(zip(chunk, readers.map(dataset.inputs, chunk)))
            dataset.kept |= {row: query._replace(image=query.image.cpu())
                             for row, query in encode(visual, dataset, chunk, read=read.get).items()}
            progress()


def encode_images(visual, images, max_patches=PATCHES_PER_CHUNK):
    """A list of (tokens_i, H) features, one for each ImageInput of the list. A Qwen tower has no batch dimension: patches
    of all images stand in one row, cut apart by grid_thw; attention does not cross images.
    max_patches bounds a call of the tower. A sharded tower must be called once on each rank: math.inf."""
    weight = visual.patch_embed.proj.weight  # in a sharded tower: gathered, in the compute dtype
    merge, features, start = visual.spatial_merge_size ** 2, [], 0
    while start < len(images):
        end, patches = start, 0
        while end < len(images) and (end == start or patches + len(images[end].pixel_values) <= max_patches):
            patches += len(images[end].pixel_values)
            end += 1
        pixels = torch.cat([image.pixel_values for image in images[start:end]]).to(weight.device, weight.dtype)
        grids = torch.cat([image.grid_thw for image in images[start:end]]).to(weight.device)
        tokens = visual(pixels, grid_thw=grids).pooler_output  # (sum of tokens_i, H)
        features += tokens.split((grids.prod(-1) // merge).tolist())
        start = end
    return features


class Policy(torch.nn.Module):
    """A language model over text and image features. It is the FSDP root: call it, not its parts.

    Tied embeddings are one parameter here (there is no lm_head), so no sharding or loading can untie them.
    visual is None while the tower is frozen: then its features come in from outside, see encode."""

    def __init__(self, hf, banned_ids=(), with_visual=False):
        super().__init__()
        self.language_model = hf.model.language_model
        self.lm_head = None if hf.config.tie_word_embeddings else hf.lm_head
        self.visual = hf.model.visual if with_visual else None
        self.image_token_id = hf.config.image_token_id
        self.banned_ids = list(banned_ids)
        self.rope_index = hf.model.get_rope_index  # reads the config only

    def forward(self, input_ids, position_ids, attention_mask, image_features, response_mask, temperature,
                with_entropy=True):
        """logprobs (B, R) and entropy (B, R), float32, of the response tokens; 0 where response_mask is False, and an entropy
        that is not wanted is 0.

        input_ids (B, T) int64: queries, then R columns of responses; position_ids (3, B, T); attention_mask (B, T);
        image_features: a list of B tensors (tokens_i, H), or of B ImageInputs when the policy owns the tower;
        response_mask (B, R) bool; temperature > 0 divides the logits, as it did in the sampler."""
        if self.visual is not None:
            image_features = encode_images(self.visual, image_features, max_patches=math.inf)
        R = response_mask.shape[1]
        head = self.language_model.embed_tokens if self.lm_head is None else self.lm_head
        slots = input_ids == self.image_token_id
        slots[:, -R:] = False  # features belong to the query; an image token in a response would be plain text
        # rows move to the left edge. no token sees a later one, so padding on the right needs no attention mask, which
        # would keep attention from its causal kernels; and no column is left that only lines queries up with responses
        starts, lengths = attention_mask.argmax(1), attention_mask.sum(1)  # (B,)
        columns = torch.arange(int(lengths.max()), device=input_ids.device) + starts[:, None]  # (B, L)
        columns = columns.clamp_(max=input_ids.shape[1] - 1)  # behind a row's end: any token, never a query's
        position_ids = position_ids.gather(2, columns.expand(3, -1, -1))
        embeds = self.language_model.embed_tokens(input_ids.gather(1, columns))  # (B, L, H)
        slots = slots.gather(1, columns)
        embeds = embeds.masked_scatter(slots[..., None], torch.cat(list(image_features)).to(embeds.dtype))
        hidden = self.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False).last_hidden_state
        row, r = response_mask.nonzero(as_tuple=True)
        hidden = hidden[row, input_ids.shape[1] - R - starts[row] + r - 1]  # (N, H): the state before a token predicts it
        targets = input_ids[:, -R:][response_mask]  # (N,)
        logprobs, entropy = chunked_logprobs(hidden, head.weight, targets, temperature, self.banned_ids, with_entropy)
        rows = torch.zeros(response_mask.shape, dtype=torch.float32, device=hidden.device)
        return rows.masked_scatter(response_mask, logprobs), rows.masked_scatter(response_mask, entropy)


# ---------------------------------------------------------------------------------------------------------------------
# what both trainers share: the schedule of the learning rate, the meaning of the knob dtype, the memory used

def learning_rate_at(update, updates, peak, warmup_ratio):
    """The learning rate of an update (0, 1, ...): linear to peak over the warm-up, then a cosine to 0."""
    warmup = math.ceil(warmup_ratio * updates)
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))


def compute_dtype(name, device):
    """The torch.dtype of a knob: 'float32', 'bfloat16', or 'auto', which is bfloat16 on a GPU and float32 on a CPU."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    names["auto"] = names["bfloat16" if device.type == "cuda" else "float32"]
    if name not in names:
        raise UserError(f"config: dtype must be one of {', '.join(names)}, got {name!r}")
    return names[name]


def peak_gb(device):
    """The most memory that this process has held so far, in GB: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux gives KiB


# ---------------------------------------------------------------------------------------------------------------------
# loading

def hub_name(name):
    """The hub's name of a parameter, from any of the names transformers and this file give it in memory."""
    for prefix in ("model.language_model.", "language_model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def local_folder(model, patterns=("*.json", "*.safetensors", "*.txt", "*.jinja")):
    """The folder of a model: itself, or the hub's snapshot of the files that match, fetched at first use."""
    if os.path.isdir(model):
        return model
    if model.startswith((".", "/")) or model.count("/") != 1:
        raise UserError(f"model: no folder {model!r} (a path, or a name on the hub such as Qwen/Qwen2.5-VL-7B-Instruct)")
    try:
        return snapshot_download(model, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:
        raise UserError(f"model: {model!r} is no folder here and could not be fetched from the hub "
                        f"({type(error).__name__}); give the path of a downloaded one") from error


def load_config(folder):
    """The model's config; a UserError for a folder without one and for another architecture."""
    path = pathlib.Path(folder) / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model: {path} cannot be read as a model's config ({type(error).__name__})") from error
    if model_type not in MODEL_TYPES:
        raise UserError(f"model: {path} says model_type {model_type!r}; this code knows {' and '.join(MODEL_TYPES)} "
                        "(another architecture needs its own Policy in model.py)")
    return AutoConfig.from_pretrained(folder)


class Weights:
    """The tensors of a checkpoint folder by hub name, memory-mapped: one is read when it is asked for."""

    def __init__(self, folder):
        self.folder, self.where = folder, {}  # hub name -> (open file, name in the file)
        files = sorted(pathlib.Path(folder).glob("*.safetensors"))
        if not files:
            raise UserError(f"model: no *.safetensors in {folder}")
        for path in files:
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"model: {path} cannot be read: {error}") from error
            self.where |= {hub_name(name): (file, name) for name in file.keys()}

    def __getitem__(self, name):
        if name not in self.where:
            raise UserError(f"model: {self.folder} has no tensor {name}, which its config asks for")
        file, stored = self.where[name]
        return file.get_tensor(stored)


@torch.no_grad()
def fill(module, weights, prefix=""):
    """Copies the checkpoint's tensors into module's parameters, sharded or not: each rank reads a tensor and keeps its
    shard of it, so no process ever holds the whole model. Returns the hub names used."""
    used = []
    for name, parameter in module.named_parameters():
        full = weights[hub_name(prefix + name)]
        if full.shape != parameter.shape:
            raise UserError(f"model: {hub_name(prefix + name)} is {tuple(full.shape)} in {weights.folder}, its config "
                            f"asks for {tuple(parameter.shape)}")
        full = full.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)
        used.append(hub_name(prefix + name))
    for part in module.modules():  # rotary frequencies are not in any checkpoint: compute them again
        if "inv_freq" in dict(part.named_buffers(recurse=False)):
            fresh = type(part)(part.config)
            for name, buffer in fresh.named_buffers():
                setattr(part, name, buffer.to(part.inv_freq.device))
    return used


def on_meta(config, attention="sdpa"):
    """transformers' model of this config with shapes and no storage."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, attn_implementation=attention, dtype=torch.float32)


def set_trained(policy, visual, train_llm, train_connector, train_vit):
    """Marks the trained parameters, as the three flags say; the connector is the tower's merger."""
    for parameter in policy.language_model.parameters():
        parameter.requires_grad_(train_llm)
    if policy.lm_head is not None:
        policy.lm_head.requires_grad_(train_llm)
    for name, parameter in visual.named_parameters():
        parameter.requires_grad_(train_connector if name.startswith("merger.") else train_vit)


def load_policy(folder, world, dtype, banned_ids, train_llm=True, train_connector=False, train_vit=False, master=True,
                with_tower=True, activation_checkpointing=False):
    """(policy, visual): the sharded Policy and the frozen tower (in dtype, a whole copy on each process), or None when
    the tower is trained and so part of the policy, or not wanted (the reference takes the policy's features).

    master=True keeps float32 weights and computes in dtype: an AdamW step at a learning rate of 1e-6 is lost in bfloat16
    weights. master=False keeps dtype alone (the reference). Gradients are summed over ranks in float32."""
    config, weights = load_config(folder), Weights(folder)
    hf = on_meta(config)
    trains_tower = train_connector or train_vit
    policy, visual = Policy(hf, banned_ids, with_visual=trains_tower), hf.model.visual
    set_trained(policy, visual, train_llm, train_connector, train_vit)
    if not master:
        policy.eval().requires_grad_(False).to(dtype)
    if activation_checkpointing and master:
        policy.language_model.gradient_checkpointing_enable(dict(use_reentrant=False))
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in [*policy.language_model.layers, *(visual.blocks if trains_tower else [])]:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)  # embedding, norm and head: one group
    policy.to_empty(device=world.device)
    used = fill(policy, weights)
    if trains_tower:
        visual = None
    elif with_tower:
        visual.eval().requires_grad_(False).to(dtype).to_empty(device=world.device)
        used += fill(visual, weights, "visual.")
        check_all_used(policy, weights, used)
    else:
        visual = hf.model.visual = None  # policy.rope_index holds on to hf.model
    return policy, visual


def check_all_used(policy, weights, used):
    """Raises when the checkpoint holds tensors that went nowhere: then it is not the model that its config says.
    A stored head beside tied embeddings is allowed when it equals them."""
    extra = weights.where.keys() - set(used)
    if policy.lm_head is None and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            raise UserError(f"model: {weights.folder} ties its embeddings in config.json but stores another lm_head")
    if extra:
        raise UserError(f"model: {len(extra)} tensors of {weights.folder} fit nothing in the model its config describes, "
                        f"such as {min(extra)}")


# ---------------------------------------------------------------------------------------------------------------------
# full weights, for the engine and for checkpoints

def gather_weights(policy, dtype, trained_only=True):
    """Yields (hub name, full tensor in dtype on this device). A collective: every rank must run it to its end.
    A tied head is named too: an engine that keeps it apart would go on with the old one, silently."""
    policy.reshard()  # after a forward without backward the root's weights lie gathered, rounded to the compute dtype
    for name, parameter in policy.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        assert isinstance(parameter, DTensor), name
        full = parameter.detach().full_tensor().to(dtype)
        yield hub_name(name), full
        if policy.lm_head is None and name == "language_model.embed_tokens.weight":
            yield "lm_head.weight", full

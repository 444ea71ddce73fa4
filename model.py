"""The policy: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL that gives log-probabilities of responses, sharded by FSDP2.

    load_policy       config -> modules on the meta device -> sharded -> filled from safetensors
    encode            rows of a dataset -> token ids, positions, and image features by the frozen vision tower
    Policy            packed sequences -> log-probabilities and entropy of their response tokens
    add_adapters      LoRA: the weights stay as they are, a low-rank term added to each is trained
    gather_weights    sharded parameters -> full tensors, as engines and checkpoints take them

No padding: a micro-batch is some sequences one after the other in a single row. Attention runs sequence by
sequence (packed_attention), everything else over all tokens at once.

A tensor's name is the one that it has in transformers' memory ('model.language_model.layers.0...',
'model.visual...', 'lm_head.weight'), which vLLM takes too. A checkpoint may have older ones, which it keeps.
"""
import math
import os
import pathlib
import resource
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

from configurator import UserError
from data import open_readers
from distributed import all_max

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CONNECTOR = ("merger.", "deepstack_merger_list.")  # what names of its parameters in the tower begin with
# elements of a (tokens, vocabulary) block of logits: 64 MB in float32 on a CPU; on a GPU 512 MB, as the
# head's gradient is summed over the chunks in bfloat16, and few large sums lose less than many small ones
LOGITS_PER_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
PATCHES_PER_CHUNK = 1 << 14  # image patches that go through a frozen tower at once: 4096 image tokens
ROWS_PER_CHUNK = 32  # rows whose pixels are held before their features are made


# ------------------------------------------------------------------------------------------------------------
# log-probabilities without the (tokens, vocabulary) logits

class HeadLogprobs(torch.autograd.Function):
    """chunked_logprobs(hidden, weight, targets, temperature, banned_ids): (N,) logprobs and (N,) entropy,
    float32, of softmax(hidden W^T / temperature) at targets. hidden (N, H), weight (V, H), targets (N,)
    int64; banned_ids int64 are outside the distribution, as in both engines. Entropy carries no gradient. (N,
    V) never exists, which would be over a GB for 2048 tokens of Qwen's: forward drops the logits of a chunk
    of rows once they are used; backward makes them again and turns them into their own gradient in place."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned_ids):
        ctx.chunk = max(1, LOGITS_PER_CHUNK[hidden.device.type] // weight.shape[0])
        ctx.temperature, ctx.banned_ids = temperature, banned_ids
        normaliser = hidden.new_empty(len(hidden), dtype=torch.float32)
        logprobs, entropy = torch.empty_like(normaliser), torch.empty_like(normaliser)
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            logits = HeadLogprobs.logits(ctx, hidden[rows], weight)
            normaliser[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - normaliser[rows]
            probs = (logits - normaliser[rows, None]).exp_()
            entropy[rows] = normaliser[rows] - probs.mul_(logits).sum(-1)  # H = log Z - E[logit]
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def logits(ctx, hidden, weight):
        """(n, V) float32 of one chunk."""
        logits = (hidden @ weight.T).float().div_(ctx.temperature)
        # the lowest number and not -inf: 0 * -inf in the entropy would be nan
        return logits.index_fill_(1, ctx.banned_ids, torch.finfo(torch.float32).min)

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
        return grad_hidden, grad_weight, None, None, None


chunked_logprobs = HeadLogprobs.apply


# ------------------------------------------------------------------------------------------------------------
# image features

def encode(visual, dataset, rows, known=None):
    """{row: Query} of the rows of a dataset, each picture read once and made into features by the frozen
    tower visual; with visual None (the tower is trained, its features change) into pixels. Pictures are read
    in threads. known: {row: Query} that were made before: what they have is not made again."""
    def read(row):
        query = known[row] if known else dataset.query(row)
        if not query.images:
            return query
        made = dataset.image_processor(images=query.images, do_resize=False, return_tensors="pt")
        pixels = made["pixel_values"].float().split(query.grids.prod(-1).tolist())
        return query._replace(images=[], pixels=list(pixels))

    queries, rows = {}, sorted(set(rows))
    with open_readers() as readers:
        for i in range(0, len(rows), ROWS_PER_CHUNK):  # not all at once: a large picture's pixels are 24 MB
            chunk = list(readers.map(read, rows[i:i + ROWS_PER_CHUNK]))
            features = iter(tower_features(visual, chunk, PATCHES_PER_CHUNK) if visual is not None else [])
            for row, query in zip(rows[i:], chunk):
                if visual is not None and query.pixels:
                    query = query._replace(features=[next(features) for _ in query.pixels], pixels=[])
                queries[row] = query
    return queries


def tower_features(visual, queries, max_patches=math.inf):
    """(tokens, n H) features of each picture of the queries that have pixels, one after the other. A Qwen
    tower has no batch dimension: the patches of all pictures stand in one row, cut apart by their grids.
    max_patches bounds a call of the tower; a sharded one must be called once on each rank: math.inf."""
    weight = visual.patch_embed.proj.weight  # in a sharded tower: gathered, in the compute dtype
    pictures = [(pixels, grid) for query in queries for pixels, grid in zip(query.pixels, query.grids)]
    features = []
    for batch in cut([len(pixels) for pixels, _ in pictures], max_patches):
        pixels = torch.cat([pictures[i][0] for i in batch]).to(weight.device, weight.dtype)
        grids = torch.stack([pictures[i][1] for i in batch])
        output = visual(pixels, grid_thw=grids.to(weight.device))
        # (tokens of all, n H). n is 1, but for Qwen3-VL's deepstack: there features of inner layers follow
        tokens = torch.cat([output.pooler_output, *getattr(output, "deepstack_features", [])], -1)
        features += tokens.split((grids.prod(-1) // visual.spatial_merge_size ** 2).tolist())
    return features


def place_features(embeds, slots, features):
    """(embeds, deepstack): embeds (..., H) with the features' first H columns at the image tokens, which
    slots (...) bool marks; and a list of the columns that follow, (tokens, H) each. Qwen3-VL adds those to
    its first layers' outputs at these tokens; other models have none. features: list of (tokens, n H)."""
    if not features:
        return embeds, []
    first, *deepstack = torch.cat(features).to(embeds).split(embeds.shape[-1], -1)
    return embeds.masked_scatter(slots[..., None], first), deepstack


# ------------------------------------------------------------------------------------------------------------
# packed sequences

class Sequence(NamedTuple):
    """A query and its response, end to end."""
    ids: torch.Tensor  # (L,) int64
    positions: torch.Tensor  # (3, L) int64, M-RoPE
    grids: torch.Tensor  # (pictures, 3) int64
    pixels: list  # of (patches, patch dimension), one a picture, where the policy owns the tower; else []
    features: list  # of (tokens, n H), one a picture, where it does not; else []
    query_length: int


def make_sequence(query, response_ids) -> Sequence:
    """Text goes on after the query's largest position, one by one and equal on all three rows."""
    after = int(query.positions.max()) + 1 + torch.arange(len(response_ids))
    positions = torch.cat([query.positions, after.expand(3, -1)], 1)
    ids = torch.tensor(query.ids + response_ids)
    return Sequence(ids, positions, query.grids, query.pixels, query.features, len(query.ids))


def cut(lengths, budget):
    """Lists of consecutive indices of lengths that sum to at most budget, or of one index that is over it."""
    batches, size = [], 0
    for i, length in enumerate(lengths):
        if not batches or size + length > budget:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += length
    return batches


def microbatches(sequences, rows, max_tokens):
    """rows, indices of sequences, as lists of at most max_tokens tokens: as many lists on every rank, since
    sharded layers gather their weights together. Every rank must give as many rows. A collective."""
    lengths = [len(sequences[row].ids) for row in rows]
    batches = [[rows[i] for i in batch] for batch in cut(lengths, max_tokens)]
    wanted = all_max(len(batches))
    while len(batches) < wanted:
        longest = max(batches, key=len)
        batches[batches.index(longest)] = longest[:len(longest) // 2]
        batches.append(longest[len(longest) // 2:])
    return batches


def packed_attention(module, query, key, value, attention_mask, lengths=None, scaling=None, **kwargs):
    """transformers' attention interface: causal attention within each of the sequences of one packed row.
    query (1, heads, T, D), key and value (1, key-value heads, T, D); lengths: list of int, sums to T."""
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
           for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2))]
    return torch.cat(out, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


class Policy(torch.nn.Module):
    """A language model over packed text and image features. It is the FSDP root: call it, not its parts.

    Tied embeddings are one parameter here (there is no lm_head), so no sharding or loading can untie them.
    visual is None while the tower is frozen: then its features come in from outside, see encode."""

    def __init__(self, hf, banned_ids=(), with_visual=False):
        super().__init__()
        self.language_model = hf.model.language_model
        self.lm_head = None if hf.config.tie_word_embeddings else hf.lm_head
        self.visual = hf.model.visual if with_visual else None
        self.image_token_id = hf.config.image_token_id
        self.banned_ids = torch.tensor(banned_ids, dtype=torch.int64)
        self.lora = 0, 0  # rank and alpha of its adapters

    def forward(self, sequences, temperature):
        """logprobs and (without a gradient) entropy, (B, R) float32, of the response tokens of B sequences,
        padded on the right with 0 to the longest response R. temperature > 0 divides the logits."""
        head = self.language_model.embed_tokens if self.lm_head is None else self.lm_head
        device, lengths = head.weight.device, [len(s.ids) for s in sequences]
        ids = torch.cat([s.ids for s in sequences]).to(device)  # (T,)
        positions = torch.cat([s.positions for s in sequences], 1).to(device)  # (3, T)
        in_query = torch.cat([torch.arange(len(s.ids)) < s.query_length for s in sequences]).to(device)
        embeds = self.language_model.embed_tokens(ids)  # (T, H)
        # features belong to the query; an image token in a response would be plain text
        slots = (ids == self.image_token_id) & in_query
        embeds, deepstack = self.embed_pictures(embeds, slots, sequences)
        extra = dict(visual_pos_masks=slots[None], deepstack_visual_embeds=deepstack) if deepstack else {}
        out = self.language_model(inputs_embeds=embeds[None], position_ids=positions[:, None],
                                  use_cache=False, lengths=lengths, **extra)
        hidden = out.last_hidden_state[0]  # (T, H)
        # the state before a response token predicts it; N response tokens
        before = ~in_query
        before = torch.cat([before[1:], before[:1]])
        targets = ids.roll(-1)[before]
        logprobs, entropy = chunked_logprobs(hidden[before], head.weight, targets, temperature,
                                             self.banned_ids.to(device))
        mask = mask_responses(sequences).to(device)
        rows = torch.zeros(mask.shape, dtype=torch.float32, device=device)
        return rows.masked_scatter(mask, logprobs), rows.masked_scatter(mask, entropy)

    def embed_pictures(self, embeds, slots, sequences):
        """place_features with the sequences' features, which the policy's tower makes here if it has one."""
        features = [f for s in sequences for f in s.features]
        if self.visual is not None:
            features = tower_features(self.visual, sequences)
            if not features:  # other ranks run the sharded tower: so must this one, on a blank of weight 0
                patches = torch.zeros(4, self.visual.patch_embed.proj.weight[0].numel())
                blank = Sequence(None, None, torch.tensor([[1, 2, 2]]), [patches], [], 0)
                embeds = embeds + 0 * tower_features(self.visual, [blank])[0].sum()
        return place_features(embeds, slots, features)

    def use_adapters(self, on):
        """False turns LoRA's adapters off: the policy is then its base model."""
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.on = on


def mask_responses(sequences):
    """(B, R) bool, True on the response tokens of B sequences, EOS included."""
    lengths = torch.tensor([len(s.ids) - s.query_length for s in sequences])
    return torch.arange(int(lengths.max())) < lengths[:, None]


@torch.no_grad()
def response_logprobs(policy, sequences, max_tokens, temperature, adapters=True):
    """logprobs (B, R) float32 of B sequences, without a gradient; 0 on padding. adapters: whether LoRA's, if
    the policy has them, take part. A collective."""
    policy.use_adapters(adapters)
    mask = mask_responses(sequences)
    logprobs = torch.zeros(mask.shape, device=policy.language_model.embed_tokens.weight.device)
    for rows in microbatches(sequences, range(len(sequences)), max_tokens):
        part, _ = policy([sequences[i] for i in rows], temperature)
        logprobs[rows, :part.shape[1]] = part
    policy.reshard()  # without a backward FSDP would keep embedding and head gathered, in the compute dtype
    policy.use_adapters(True)
    return logprobs


# ------------------------------------------------------------------------------------------------------------
# LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear layer W (out, in) acts as W + alpha / rank * B A

def merge(weight, A, B, scale):
    """W + scale * B A (out, in) in W's dtype. The forward multiplies by it and the engine gets it, so both
    have the same policy. In bfloat16 an update below half a step of W's shows once more have added up, as
    with float32 master weights."""
    return torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=scale)


class MergedLinear(torch.autograd.Function):
    """x (..., in) -> x merge(W, A, B, scale)^T + bias (..., out). The merged weight is made again in
    backward. Its gradient is never formed: A (rank, in) and B (out, rank) need products with rank columns."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return F.linear(x, merge(weight, A, B, scale), bias)  # bias in it: bfloat16 rounds once

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B = ctx.saved_tensors
        grad_x = grad @ merge(weight, A, B, ctx.scale)
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)  # (T, in), (T, out)
        return grad_x, None, None, (grad @ (ctx.scale * B)).T @ x, grad.T @ (x @ (ctx.scale * A).T), None


class LoRALinear(torch.nn.Module):
    """In the place of a Linear, whose weight and bias keep their names."""

    def __init__(self, linear, rank, scale):
        super().__init__()
        (n_out, n_in), self.scale, self.on = linear.weight.shape, scale, True
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = torch.nn.Parameter(linear.weight.new_empty(rank, n_in, dtype=torch.float32))
        self.lora_B = torch.nn.Parameter(linear.weight.new_empty(n_out, rank, dtype=torch.float32))

    def forward(self, x):
        if not self.on:
            return F.linear(x, self.weight, self.bias)
        return MergedLinear.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)


def add_adapters(policy, dtype, rank, alpha):
    """Freezes the policy, in dtype, and has every linear layer within its language model's blocks (not the
    head) train two float32 matrices."""
    policy.requires_grad_(False).to(dtype)
    policy.lora = rank, alpha
    for layer in policy.language_model.layers:
        linears = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
        for name in linears:
            layer.set_submodule(name, LoRALinear(layer.get_submodule(name), rank, alpha / rank))


def new_adapter(name, shape, generator):
    """What lora_A and lora_B begin with: uniform within 1 / sqrt(in), and 0: nothing is changed yet."""
    bound = shape[1] ** -0.5 if name.endswith("lora_A") else 0
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


# ------------------------------------------------------------------------------------------------------------
# what both trainers share: the schedule of the learning rate, the meaning of the knob dtype, the memory used

def learning_rate_at(update, updates, peak, warmup_ratio):
    """The learning rate of an update (0, 1, ...): linear to peak over the warm-up, then a cosine to 0."""
    warmup = math.ceil(warmup_ratio * updates)
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))


def compute_dtype(name, device):
    """The torch.dtype of a knob: 'float32', 'bfloat16', or 'auto': bfloat16 on a GPU, float32 on a CPU."""
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


# ------------------------------------------------------------------------------------------------------------
# loading

def name_in_memory(name):
    """A tensor's name in transformers' memory, from that in a checkpoint (of Qwen2-VL and Qwen2.5-VL on the
    hub: 'visual...', 'model.layers...') or in a Policy ('visual...', 'language_model...')."""
    if name.startswith(("lm_head.", "model.language_model.", "model.visual.")):
        return name
    if name.startswith(("visual.", "language_model.")):
        return "model." + name
    return "model.language_model." + name.removeprefix("model.")


def local_folder(model):
    """The folder of a model: itself, or the hub's snapshot, fetched at first use."""
    if os.path.isdir(model):
        return model
    try:
        return snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (OSError, ValueError) as error:
        raise UserError(f"model: {model!r} is no folder here, and no name that the hub knows, such as "
                        f"Qwen/Qwen2.5-VL-7B-Instruct ({type(error).__name__})") from error


def load_config(folder):
    """The model's config; a UserError for a folder without one and for another architecture."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"model: config.json in {folder} cannot be read: {type(error).__name__}") from None
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"model: {folder} has model_type {config.model_type!r}, not of {MODEL_TYPES}, and "
                        "would need its own Policy in model.py")
    if "sliding_attention" in getattr(config.text_config, "layer_types", ()):
        raise UserError(f"model: {folder} asks for sliding windows, which packed_attention has not")
    return config


def open_weights(folder):
    """{name: (open file, name in the file)} of a checkpoint's tensors, memory-mapped."""
    where = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        file = safe_open(path, "pt")
        where |= {name_in_memory(name): (file, name) for name in file.keys()}
    if not where:
        raise UserError(f"model: no *.safetensors in {folder}")
    return where


@torch.no_grad()
def fill(module, weights, folder, prefix=""):
    """Copies the checkpoint's tensors into module's parameters, sharded or not: each rank reads a tensor and
    keeps its shard of it, so no process ever holds the whole model. Adapters are new."""
    generator = torch.Generator().manual_seed(0)  # of the adapters, the same on every rank
    for name, parameter in module.named_parameters():
        name = name_in_memory(prefix + name)
        if name.endswith(("lora_A", "lora_B")):
            full = new_adapter(name, parameter.shape, generator)
        elif name not in weights:
            raise UserError(f"model: {folder} has no tensor {name}, which its config asks for")
        else:
            file, stored = weights[name]
            full = file.get_tensor(stored)
        full = full.to(parameter.device, parameter.dtype)
        if full.shape != parameter.shape:
            raise UserError(f"model: {name} is {tuple(full.shape)} in {folder}, its config asks for "
                            f"{tuple(parameter.shape)}")
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)
    for part in module.modules():  # rotary frequencies are not in any checkpoint: compute them again
        if "inv_freq" in dict(part.named_buffers(recurse=False)):
            for name, buffer in type(part)(part.config).named_buffers():
                setattr(part, name, buffer.to(part.inv_freq.device))


def set_trained(policy, visual, train_llm, train_connector, train_vit):
    """Marks the trained parameters, as the three flags say; the connector is the tower's mergers."""
    policy.requires_grad_(train_llm)
    for name, parameter in visual.named_parameters():
        parameter.requires_grad_(train_connector if name.startswith(CONNECTOR) else train_vit)


def load_policy(folder, world, dtype, banned_ids, train_llm=True, train_connector=False, train_vit=False,
                master=True, activation_checkpointing=False, lora_rank=0, lora_alpha=0):
    """(policy, visual): the sharded Policy, and the frozen tower (in dtype, a whole copy on each process) or
    None when the tower is trained and so part of the policy.

    master=True keeps float32 weights and computes in dtype: an AdamW step of 1e-6 is lost in bfloat16
    weights. master=False keeps dtype alone (the reference). Gradients are summed over ranks in float32.
    lora_rank > 0 trains adapters instead of the language model, whose weights are then kept in dtype alone.

    Weights are sharded over the processes of a node, and every node has them all: what goes between nodes is
    gradients, each process's shard of them once a micro-batch."""
    config, weights = load_config(folder), open_weights(folder)
    with torch.device("meta"):  # shapes and no storage
        hf = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation={
            "text_config": "packed", "vision_config": "sdpa"})
    trains_tower = train_connector or train_vit
    policy, visual = Policy(hf, banned_ids, with_visual=trains_tower), hf.model.visual
    set_trained(policy, visual, train_llm, train_connector, train_vit)
    if lora_rank:
        add_adapters(policy, dtype, lora_rank, lora_alpha)
    if not master:
        policy.eval().requires_grad_(False).to(dtype)
    elif activation_checkpointing:
        policy.language_model.gradient_checkpointing_enable(dict(use_reentrant=False))
        if train_vit:
            visual.gradient_checkpointing_enable(dict(use_reentrant=False))
    nodes = world.world_size // world.local_world_size
    shape = nodes, world.local_world_size
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("nodes", "processes"))
    mesh = mesh if nodes > 1 else mesh["processes"]
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in [*policy.language_model.layers, *(visual.blocks if trains_tower else [])]:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)  # embedding, norm and head: one group
    policy.to_empty(device=world.device)
    fill(policy, weights, folder)
    if trains_tower:
        return policy, None
    visual.eval().requires_grad_(False).to(dtype).to_empty(device=world.device)
    fill(visual, weights, folder, "visual.")
    return policy, visual


# ------------------------------------------------------------------------------------------------------------
# full weights, for the engine and for checkpoints

def gather_weights(policy, dtype, trained_only=True):
    """Yields (name, full tensor in dtype on this device), adapters merged into their weights; with adapters
    of all the language model, as an engine wants a part whole. A tied head is named too: an engine that keeps
    it apart would go on with the old one, silently. A collective: every rank must run it to its end."""
    policy.reshard()  # after a forward without backward the root lies gathered, rounded to the compute dtype
    adapted = {f"{name}.weight": module for name, module in policy.named_modules()
               if isinstance(module, LoRALinear)}
    for name, parameter in policy.named_parameters():
        if "lora_" in name or trained_only and not (parameter.requires_grad or adapted):
            continue
        full = parameter.detach().full_tensor().to(dtype)
        if module := adapted.get(name):
            full = merge(full, module.lora_A.detach().full_tensor(), module.lora_B.detach().full_tensor(),
                         module.scale)
        yield name_in_memory(name), full
        if policy.lm_head is None and name == "language_model.embed_tokens.weight":
            yield "lm_head.weight", full

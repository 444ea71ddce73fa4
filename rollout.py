"""Response collection: two engines with one face, and the check that engine and trainer agree.

    engine.start(dataset, rows, seeds, Sampling(1.0, 1.0, 512))  # begins to sample; rows travel, not pictures
    completions = engine.collect()                               # one Completion a row, in their order
    engine.load_weights(named_tensors)                           # names as in model.py, full tensors

HFEngine (here): each process samples its own rows with its own unsharded copy of the model; for small models.
VLLMEngine (rollout_vllm.py): each node has one vLLM, on the GPU after the training ones or, where there is
only one, sharing it.

All methods are collective: every rank calls them in the same order, with rows of its own (none is fine). Both
engines sample from softmax(logits / temperature) over the ids that are not banned, cut to the top_p nucleus,
with no penalty and no top_k. A request has a seed of its own: its tokens depend neither on the batch nor on
the number of ranks. For one seed the engines differ. Logprobs are those at top_p 1, which training uses.
"""
import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from configurator import UserError
from data import Completion, request_seed
from distributed import all_sum
from model import encode, name_in_memory, make_sequence, place_features, response_logprobs
from rollout_vllm import VLLMEngine

MAX_LOGPROB_DIFF = 0.1  # nats a token: more before the first step, and the run is stopped
CPU_BATCH_TOKENS = 1 << 16  # rows x (query + response) of one batch: bounds the cache of keys and values
PREFILL_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 14}  # query tokens at once; more leave a CPU's caches


def open_engine(kind, model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization=0.8,
                trains=True):
    """The engine named kind ('hf' or 'vllm') with the weights in model_dir. max_model_len: tokens of a query
    and its response. trains=False: nothing trains, so vLLM may have this process's GPU. A collective."""
    if kind == "hf":
        return HFEngine(model_dir, dtype, world, eos_ids, banned_ids)
    if kind == "vllm":
        return VLLMEngine(model_dir, dtype, world, eos_ids, banned_ids, max_model_len, gpu_memory_utilization,
                          trains)
    raise UserError(f"config: rollout must be 'vllm' or 'hf', got {kind!r}")


def check_parity(engine, policy, visual, dataset, world, sampling, max_tokens):
    """Prints the mean |trainer logprob - engine logprob| over the tokens of four responses on each rank, and
    raises a UserError when it is over MAX_LOGPROB_DIFF. A collective."""
    rows = [(world.rank + i * world.world_size) % len(dataset) for i in range(4)]
    seeds = [request_seed(0, "parity", dataset.samples[row].id, k) for k, row in enumerate(rows)]
    completions = engine.generate(dataset, rows, seeds, sampling)
    queries = encode(visual, dataset, rows)  # by this process's own tower, to be compared with the engine's
    sequences = [make_sequence(queries[row], c.token_ids) for row, c in zip(rows, completions)]
    logprobs = response_logprobs(policy, sequences, max_tokens, sampling.temperature)
    theirs = pad_sequence([torch.tensor(c.logprobs) for c in completions], batch_first=True)
    difference = (logprobs - theirs.to(logprobs.device)).abs()
    total, count = all_sum([difference.sum().item(), sum(len(c.logprobs) for c in completions)]).tolist()
    if world.rank == 0:
        print(f"before the first step: rollout/logprob_diff {total / count:.1e} nats a token", flush=True)
    if not total / count <= MAX_LOGPROB_DIFF:
        raise UserError(f"trainer and engine disagree by over {MAX_LOGPROB_DIFF} nats a token: check the "
                        "engine's dtype, the versions in requirements.txt, that both read one model folder, "
                        "what a fork changed")


# ------------------------------------------------------------------------------------------------------------
# the language model as the sampler runs it: new tokens of many rows, behind a cache that is written in place.
# the same parameters and numbers as transformers' own forward, without its work for each token around the
# matrix products, which costs more than they do on a small model

def empty_cache(text, rows, columns):
    """A list of one (2, rows, key-value heads, columns, head dim) tensor a layer: keys and values."""
    attention, heads = text.layers[0].self_attn, text.config.num_key_value_heads
    shape = 2, rows, heads, columns, attention.head_dim
    return [attention.k_proj.weight.new_empty(shape) for _ in text.layers]


def rotate(x, cos, sin):
    """Rotary embedding: x (B, n, heads, D), cos and sin (B, n, 1, D), as the model's own rotary_emb makes
    them."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def advance(text, embeds, positions, bias, cache, start, slots=None, deepstack=()):
    """The last of n new tokens' hidden states, (B, H); their keys and values go to columns start .. start + n
    of the cache. embeds (B, n, H); positions (3, B, n) M-RoPE; bias (B, 1, 1 or n, start + n) is added to the
    attention's scores: 0 where a token sees a column. slots, deepstack: see model.place_features."""
    B, n, _ = embeds.shape
    x, end = embeds, start + n
    cos, sin = (part[:, :, None] for part in text.rotary_emb(x, positions))  # of all layers
    for layer, kv, added in itertools.zip_longest(text.layers, cache, deepstack):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(y).view(B, n, -1, attention.head_dim)
                   for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):  # Qwen3-VL
            q, k = attention.q_norm(q), attention.k_norm(k)
        keys, values = kv[:, :, :, :end]
        keys[:, :, start:] = rotate(k, cos, sin).transpose(1, 2)
        values[:, :, start:] = v.transpose(1, 2)
        # the G query heads of a key and value head stand in its rows, as more queries: nothing is copied
        q = rotate(q, cos, sin).view(B, n, keys.shape[1], -1, attention.head_dim).permute(0, 2, 3, 1, 4)
        several = bias if n == 1 else bias.repeat(1, 1, q.shape[2], 1)
        y = F.scaled_dot_product_attention(q.flatten(2, 3), keys, values, several)
        x = x + attention.o_proj(y.view(q.shape).permute(0, 3, 1, 2, 4).reshape(B, n, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if added is not None:
            x[slots] += added
    return text.norm(x[:, -1])


def draw(logits, uniforms, banned_ids, temperature, top_p):
    """One token a row by inverse CDF, and its logprob before top_p. logits (B, V), uniforms (B,) float64 in
    [0, 1) -> tokens (B,) int64, logprobs (B,) float32."""
    logits = (logits.float() / temperature).index_fill_(1, banned_ids, -torch.inf)
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    if top_p < 1:
        largest, order = probs.double().sort(dim=-1, descending=True, stable=True)
        largest[largest.cumsum(-1) - largest >= top_p] = 0  # before one that stays is less than top_p
        probs = torch.zeros_like(largest).scatter_(-1, order, largest)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # the first id whose cdf exceeds the uniform: never one of probability 0
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


class HFEngine:
    """The transformers model itself, one unsharded copy in each process."""

    def __init__(self, model_dir, dtype, world, eos_ids, banned_ids):
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=dtype)
        self.model.eval().requires_grad_(False).to(world.device)
        self.device = world.device
        self.eos_ids = torch.tensor(eos_ids, device=world.device)
        self.banned_ids = torch.tensor(banned_ids, dtype=torch.int64, device=world.device)
        # duplicates kept: a tied lm_head.weight comes by its own name into the embedding's storage
        parameters = self.model.named_parameters(remove_duplicate=False)
        self.parameters = {name_in_memory(name): parameter for name, parameter in parameters}

    def start(self, dataset, rows, seeds, sampling, queries=None):
        """Keeps the request: this engine samples in the caller's process, so not before collect. queries: the
        caller's {row: Query}, so that no picture is read twice, nor encoded twice by a frozen tower."""
        self.request = dataset, rows, seeds, sampling, queries

    def collect(self):
        """A Completion for each of the rows that start was given, in their order."""
        dataset, rows, seeds, sampling, queries = self.request
        queries = encode(self.model.model.visual, dataset, rows, queries)
        # longest first: a batch's rows are about equally long, and what does not fit in memory shows soon
        waiting = sorted(range(len(rows)), key=lambda r: (-len(queries[rows[r]].ids), rows[r], r))
        completions = [None] * len(rows)
        while waiting:
            length = len(queries[rows[waiting[0]]].ids) + sampling.max_new_tokens
            size = max(1, self.batch_tokens() // length)
            batch, waiting = waiting[:size], waiting[size:]
            done = self.sample([queries[rows[r]] for r in batch], [seeds[r] for r in batch], sampling)
            for r, completion in zip(batch, done):
                completions[r] = completion
        return completions

    def generate(self, dataset, rows, seeds, sampling, queries=None):
        self.start(dataset, rows, seeds, sampling, queries)
        return self.collect()

    def batch_tokens(self):
        """Tokens whose keys and values fit in half of the free memory."""
        if self.device.type == "cpu":
            return CPU_BATCH_TOKENS
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        text = self.model.model.language_model
        return free // 2 // sum(layer.nbytes for layer in empty_cache(text, 1, 1))

    @torch.no_grad()
    def sample(self, queries, seeds, sampling):
        """Completions of queries that fit in memory together; those to one query share its prefill."""
        text = self.model.model.language_model
        n = sampling.max_new_tokens
        different = list({id(query): query for query in queries}.values())
        number = {id(query): i for i, query in enumerate(different)}
        # one uniform per (request, position), whatever else is in the batch
        uniforms = np.stack([np.random.default_rng(s).random(n) for s in seeds])
        uniforms = torch.from_numpy(uniforms).to(self.device)

        # the queries: left-padded, so that all responses begin in one column of the cache
        pad_left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        ids = pad_left([torch.tensor(query.ids) for query in different]).to(self.device)  # (B, Q)
        real = pad_left([torch.ones(len(query.ids), dtype=torch.bool) for query in different]).to(self.device)
        positions = pad_left([query.positions.T for query in different]).to(self.device).permute(2, 0, 1)
        slots = (ids == self.model.config.image_token_id) & real
        B, Q = ids.shape
        # -1e4 hides a column; not the type's lowest number, as padding in front sees nothing else
        bias = text.embed_tokens.weight.new_zeros(B, 1, 1, Q + n)
        bias[:, 0, 0, :Q].masked_fill_(~real, -1e4)
        causal = bias.new_full((Q, Q), -1e4).triu(1)
        cache, few = empty_cache(text, B, Q + n), max(1, PREFILL_TOKENS[self.device.type] // Q)
        hidden = []  # (B, H) of the last query token
        for part in (slice(i, i + few) for i in range(0, B, few)):
            hide, room = torch.minimum(bias[part, ..., :Q], causal), [kv[:, part] for kv in cache]
            features = [f for query in different[part] for f in query.features]
            embeds, deepstack = place_features(text.embed_tokens(ids[part]), slots[part], features)
            hidden.append(advance(text, embeds, positions[:, part], hide, room, 0, slots[part], deepstack))

        # the responses: row says which request each line of the shrinking batch is
        line = torch.tensor([number[id(query)] for query in queries], device=self.device)
        row = torch.arange(len(queries), device=self.device)
        position = positions.amax((0, 2))[line] + 1  # of the next token, the same in all three M-RoPE rows
        hidden, bias = torch.cat(hidden)[line], bias[line]
        if len(line) > B:
            for i, kv in enumerate(cache):  # one layer at a time: no second cache in memory
                cache[i] = kv[:, line]
        tokens = torch.zeros((len(queries), n), dtype=torch.int64, device=self.device)
        logprobs = torch.zeros((len(queries), n), device=self.device)
        lengths = torch.zeros_like(row)  # 0 until a response has ended
        for t in range(n):
            token, logprob = draw(self.model.lm_head(hidden), uniforms[row, t], self.banned_ids,
                                  sampling.temperature, sampling.top_p)
            tokens[row, t], logprobs[row, t] = token, logprob
            ends = (torch.isin(token, self.eos_ids) | (t + 1 == n)) & (lengths[row] == 0)
            lengths[row] = torch.where(ends, t + 1, lengths[row])
            live = (lengths[row] == 0).nonzero()[:, 0]  # the one wait for the device in each step
            if not len(live):
                break
            if len(live) <= 0.75 * len(row):  # ended rows leave batch and cache; a few are cheaper to keep
                for i, kv in enumerate(cache):
                    cache[i] = kv[:, live]
                row, bias, token, position = row[live], bias[live], token[live], position[live]
            hidden = advance(text, text.embed_tokens(token[:, None]), position.expand(3, -1)[..., None],
                             bias[..., :Q + t + 1], cache, Q + t)
            position = position + 1
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
        ended = torch.isin(last, self.eos_ids)
        rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist())
        return [Completion(ids[:length], values[:length], "stop" if stop else "length")
                for ids, values, length, stop in rows]

    @torch.no_grad()
    def load_weights(self, named_tensors):
        """Copies the tensors in place. named_tensors: (name, full tensor), of any device and dtype."""
        for name, tensor in named_tensors:
            if name not in self.parameters or self.parameters[name].shape != tensor.shape:
                raise ValueError(f"load_weights: the model has no {name!r} of shape {tuple(tensor.shape)}")
            self.parameters[name].copy_(tensor)

    def close(self):
        self.model = self.parameters = None

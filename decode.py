"""The language model as the sampler runs it: new tokens of many rows, behind a cache that is written in place.

    cache = empty_cache(text, rows, room)          # text: the language model of a Qwen2-VL or Qwen2.5-VL of transformers
    hidden = advance(text, embeds, positions, bias, cache, start)

The same parameters and modules as transformers' own forward, and the same numbers but for rounding. What is left out is
its work around the matrix products: on a small model that costs more than they do, again for every token. Its cache grows by
a copy of all that it holds, each token; its key and value heads are copied once for each query head; masks are made anew.
"""
import torch
import torch.nn.functional as F


def empty_cache(text, rows, room):
    """A list of one (2, rows, key-value heads, room, head dim) tensor a layer, keys and values. room: tokens of a row."""
    attention, heads = text.layers[0].self_attn, text.config.num_key_value_heads
    return [attention.k_proj.weight.new_empty(2, rows, heads, room, attention.head_dim) for _ in text.layers]


def rotate(x, cos, sin):
    """Rotary embedding: x (B, n, heads, D), cos and sin (B, n, 1, D), as the model's own rotary_emb makes them."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def advance(text, embeds, positions, bias, cache, start):
    """The last of n new tokens' hidden states, (B, H); their keys and values go to columns start .. start + n of the cache.

    embeds (B, n, H); positions (3, B, n) M-RoPE; bias (B, 1, 1 or n, start + n), added to the attention's scores: 0 where a
    token sees a column. Rows may be views of a larger cache."""
    B, n, _ = embeds.shape
    x, end = embeds, start + n
    cos, sin = (part[:, :, None] for part in text.rotary_emb(x, positions))  # of all layers
    for layer, kv in zip(text.layers, cache):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(y).view(B, n, -1, attention.head_dim)
                   for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        keys, values = kv[:, :, :, :end]
        keys[:, :, start:] = rotate(k, cos, sin).transpose(1, 2)
        values[:, :, start:] = v.transpose(1, 2)
        # the query heads of one key and value head stand in its rows, as more queries: nothing is copied for them, and no
        # kernel has to know of groups (with a mask, CUDA's fast ones do not)
        q = rotate(q, cos, sin).view(B, n, keys.shape[1], -1, attention.head_dim).permute(0, 2, 3, 1, 4)  # (B, KV, G, n, D)
        several = bias if n == 1 else bias.repeat(1, 1, q.shape[2], 1)
        y = F.scaled_dot_product_attention(q.flatten(2, 3), keys, values, several)
        x = x + attention.o_proj(y.view(q.shape).permute(0, 3, 1, 2, 4).reshape(B, n, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return text.norm(x[:, -1])

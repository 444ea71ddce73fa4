"""From ragged token ids to log-probabilities: padded batches, micro-batches of a token budget, a forward over all of them.

    make_batch           queries and responses -> one padded Batch, and the image features of its rows
    microbatches         rows of like length, as many on every rank, none over the budget of tokens
    response_logprobs    a whole Batch -> log-probabilities and entropy of its response tokens
    parity               how far trainer and engine are apart
"""
from typing import NamedTuple

import torch

from distributed import all_max, all_sum
from model import encode
from rollout import check_alive, request_seed


class Batch(NamedTuple):
    """B rows of a left-padded query (Q columns) and a right-padded response (R columns)."""
    query_responses: torch.Tensor  # (B, Q+R) int64
    attention_mask: torch.Tensor  # (B, Q+R) int64, 1 on real tokens
    position_ids: torch.Tensor  # (3, B, Q+R) int64, M-RoPE: frame, row, column
    response_mask: torch.Tensor  # (B, R) bool, True on tokens that count, EOS included


def pack(policy, queries, responses, grids, pad_id, device) -> Batch:
    """queries and responses: lists of B lists of token ids, grids a list of B (1, 3) tensors. Masks come from lengths,
    never from ids: padding may share its id with EOS. Positions are the model's own (get_rope_index)."""
    B, Q, R = len(queries), max(map(len, queries)), max(map(len, responses))
    ids = torch.full((B, Q + R), pad_id)
    mask = torch.zeros(B, Q + R, dtype=torch.int64)
    for i, (query, response) in enumerate(zip(queries, responses)):
        ids[i, Q - len(query):Q + len(response)] = torch.tensor(query + response)
        mask[i, Q - len(query):Q + len(response)] = 1
    types = (ids[:, :Q] == policy.image_token_id).int()  # 1 on image tokens: transformers >= 5.3 wants it
    positions, _ = policy.rope_index(ids[:, :Q], mm_token_type_ids=types, image_grid_thw=torch.cat(list(grids)),
                                     attention_mask=mask[:, :Q])  # (3, B, Q)
    last = positions.amax((0, 2))  # (B,): text goes on, one by one and equal on all three rows, after the largest
    after = (last[:, None] + 1 + torch.arange(R)).expand(3, B, R)
    return Batch(*(t.to(device) for t in (ids, mask, torch.cat([positions, after], -1), mask[:, Q:].bool())))


def select(batch: Batch, rows) -> Batch:
    """Those rows (int64 tensor) without the padding columns that none of them needs."""
    R = batch.response_mask.shape[1]
    mask = batch.attention_mask[rows]
    used = mask.any(0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    response = slice(0, columns.stop - (mask.shape[1] - R))
    return Batch(batch.query_responses[rows, columns], mask[:, columns], batch.position_ids[:, rows, columns],
                 batch.response_mask[rows, response])


def cut(lengths, max_tokens):
    """Lists of row indices, longest rows first, such that rows * longest row <= max_tokens in each (or one row).
    lengths: tokens of each row. Rows of like length share a micro-batch, so little of it is padding."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def microbatches(lengths, max_tokens):
    """Pairs (row indices, real), as many on every rank: sharded layers gather their weights together, so a rank with fewer
    micro-batches runs its first row again with real=False, to be weighted 0. A collective."""
    batches = [(rows, True) for rows in cut(lengths, max_tokens)]
    return batches + [([0], False)] * (int(all_max(len(batches))) - len(batches))


def make_batch(policy, queries, responses, pad_id, device):
    """(Batch, image features) of B Query and the token ids of their responses."""
    ids, grids, images = zip(*queries)
    return pack(policy, ids, responses, grids, pad_id, device), list(images)


@torch.no_grad()
def response_logprobs(policy, batch, image_features, max_tokens, temperature, with_entropy=True, first=0):
    """logprobs (B, R) and entropy (B, R) of a Batch, micro-batch by micro-batch; rows before first are left 0.
    A collective."""
    logprobs = torch.zeros(batch.response_mask.shape, device=batch.response_mask.device)
    entropy = torch.zeros_like(logprobs)
    if first == len(logprobs):
        return logprobs, entropy
    for rows, real in microbatches(batch.attention_mask[first:].sum(1).tolist(), max_tokens):
        rows = [first + i for i in rows]
        part = select(batch, rows)
        features = [image_features[i] for i in rows]
        new_logprobs, new_entropy = policy(part.query_responses, part.position_ids, part.attention_mask, features,
                                           part.response_mask, temperature, with_entropy)
        if real:
            R = part.response_mask.shape[1]
            logprobs[rows, :R], entropy[rows, :R] = new_logprobs, new_entropy
    policy.reshard()  # without a backward FSDP would keep embedding and head gathered, in the compute dtype
    return logprobs, entropy


def padded(rows, mask):
    """(B, R) float32: lists of one number a response token, padded like mask."""
    values = torch.zeros(mask.shape)
    for i, row in enumerate(rows):
        values[i, :len(row)] = torch.tensor(row)
    return values.to(mask.device)


def parity(engine, policy, visual, dataset, indices, sampling, pad_id, max_tokens, device):
    """Mean |trainer logprob - engine logprob| over the tokens of one response to each of the rows, all ranks; nats."""
    completions = engine.generate(dataset, indices, [request_seed(0, "parity", i, 0) for i in indices], sampling)
    check_alive(engine)
    queries = encode(visual, dataset, indices)  # by this process's own tower, to be compared with the engine's
    batch, features = make_batch(policy, [queries[i] for i in indices], [c.token_ids for c in completions], pad_id, device)
    logprobs, _ = response_logprobs(policy, batch, features, max_tokens, sampling.temperature)
    difference = (logprobs - padded([c.logprobs for c in completions], batch.response_mask)).abs() * batch.response_mask
    total, count = all_sum([difference.sum().item(), batch.response_mask.sum().item()]).tolist()
    return total / count

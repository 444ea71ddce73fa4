"""HFEngine against transformers' own forward on tiny models, and the pieces of rollout.py by hand."""
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

import rollout
from data import Dataset, Sampling, load_processor, request_seed, special_token_ids
from model import encode
from rollout import advance, draw, open_engine
from test_vllm import largest_difference
from tiny import make_tiny

T1 = Sampling(1.0, 1.0, 24)
ROWS = [0, 1, 2, 3, 1, 2, 2]  # of one, no, three and one picture
SEEDS = [request_seed(1, 0, f"q{i}", 0) for i in range(48)]
MANY = list(range(100, 260, 20))  # ids that end a response, so many that some do early


def open_hf(folder, dataset):
    eos, banned = special_token_ids(dataset.tokenizer, folder)
    world = SimpleNamespace(device=torch.device("cpu"))
    return open_engine("hf", folder, torch.float32, world, eos, banned, 1024)


@pytest.fixture(scope="module")
def opened(tiny_model_dir, mixed):
    return mixed, open_hf(tiny_model_dir, mixed)


@pytest.mark.parametrize("kind, tied, temperature", [
    ("qwen2_vl", False, 1.0), ("qwen2_5_vl", True, 0.6), ("qwen3_vl", True, 1.0)])
def test_logprobs_are_transformers_with_and_without_pictures(kind, tied, temperature, mixed_jsonl, tmp_path):
    folder = make_tiny(tmp_path, kind, tied)
    dataset = Dataset(mixed_jsonl, *load_processor(folder), 32 * 32, 28224, 512)
    engine = open_hf(folder, dataset)
    engine.eos_ids = torch.tensor(MANY)
    completions = engine.generate(dataset, ROWS, SEEDS[:7], Sampling(temperature, 1.0, 24))
    assert len({len(c.token_ids) for c in completions}) > 1, "rows left the batch on the way"
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert largest_difference(hf, dataset, ROWS, completions, temperature) < 1e-5


def test_tokens_depend_on_the_request_alone_not_on_the_batch(opened, monkeypatch):
    dataset, engine = opened
    monkeypatch.setattr(engine, "eos_ids", torch.tensor(MANY))
    together = engine.generate(dataset, ROWS, SEEDS[:7], T1)
    assert sum(len(c.token_ids) < 20 for c in together) > 2, "rows left the batch on the way"
    assert len({tuple(c.token_ids) for c in together}) == 7, "a query with another seed: another response"
    alone = [engine.generate(dataset, [row], [seed], T1)[0] for row, seed in zip(ROWS, SEEDS)]
    reverse = engine.generate(dataset, ROWS[::-1], SEEDS[6::-1], T1)[::-1]
    monkeypatch.setattr(rollout, "CPU_BATCH_TOKENS", 300)  # two queries with three pictures do not fit
    monkeypatch.setitem(rollout.PREFILL_TOKENS, "cpu", 100)
    small = engine.generate(dataset, ROWS, SEEDS[:7], T1)
    for ours, theirs in zip(together * 3, alone + reverse + small, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_responses_to_one_query_share_its_prefill_and_equal_separate_ones(opened, monkeypatch):
    (dataset, engine), shapes, reads = opened, [], []
    query = dataset.query
    monkeypatch.setattr(dataset, "query", lambda row: reads.append(row) or query(row))
    monkeypatch.setattr(rollout, "advance", lambda *args: shapes.append(args[1].shape[:2]) or advance(*args))
    together = engine.generate(dataset, [2] * 5, SEEDS[:5], T1)
    assert shapes[:2] == [(1, len(dataset.ids(2))), (5, 1)]
    queries = encode(engine.model.model.visual, dataset, [2])  # as a trainer hands them over
    separate = [engine.generate(dataset, [2], [seed], T1, queries)[0].token_ids for seed in SEEDS[:5]]
    assert separate == [c.token_ids for c in together]
    assert reads == [2, 2], "once for the engine, once here: what a trainer has read is not read again"


def test_a_response_ends_with_its_first_eos_or_at_the_limit(opened, monkeypatch):
    dataset, engine = opened
    monkeypatch.setattr(engine, "eos_ids", torch.tensor(MANY))
    completions = engine.generate(dataset, (ROWS * 7)[:48], SEEDS, T1)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.logprobs) == len(c.token_ids) and not set(c.token_ids[:-1]) & set(MANY)
        assert (c.token_ids[-1] in MANY) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.token_ids) == 24


@pytest.mark.parametrize("temperature, top_p, banned, expected", [
    (1.0, 1.0, [], {0.0: 0, 0.0999: 0, 0.1001: 1, 0.2999: 1, 0.3001: 2, 0.6999: 2, 0.7001: 3, 1 - 1e-16: 3}),
    (1.0, 1.0, [0], {0.0: 1, 0.22: 1, 0.23: 2, 0.66: 2, 0.67: 3}), (1.0, 0.001, [], {0.0: 2, 0.9: 2}),
    (1.0, 1.0, [3], {0.0: 0, 1 - 1e-16: 2}), (0.5, 1.0, [3], {0.047: 0, 0.048: 1, 0.23: 1, 0.24: 2}),
    (1.0, 0.69, [], {0.0: 2, 0.57: 2, 0.58: 3}), (1.0, 0.71, [], {0.0: 1, 0.22: 1, 0.23: 2, 0.67: 3})])
def test_draw_is_the_inverse_cdf_of_the_nucleus(temperature, top_p, banned, expected):
    logits, banned = torch.tensor([0.1, 0.2, 0.4, 0.3]).log(), torch.tensor(banned, dtype=torch.int64)
    uniforms = torch.tensor(list(expected), dtype=torch.float64)
    tokens, logprobs = draw(logits.repeat(len(expected), 1), uniforms, banned, temperature, top_p)
    assert tokens.tolist() == list(expected.values())
    whole = (logits / temperature).index_fill(0, banned, -torch.inf).log_softmax(0)
    torch.testing.assert_close(logprobs, whole[tokens])  # those before top_p


def test_batches_are_as_large_as_memory_allows_the_longest_first(opened, monkeypatch):
    (dataset, engine), batches = opened, []
    lengths = sorted((len(dataset.ids(row)) for row in range(4)), reverse=True)
    monkeypatch.setattr(engine, "sample", lambda qs, out, _: batches.append([len(q.ids) for q in qs]) or out)
    two = 2 * (lengths[0] + 24)
    for tokens, sizes in ((0, [1, 1, 1, 1]), (two - 1, [1, 2, 1]), (two, [2, 2]), (10**6, [4])):
        monkeypatch.setattr(rollout, "CPU_BATCH_TOKENS", tokens)
        assert engine.generate(dataset, [0, 1, 2, 3], [10, 11, 12, 13], T1) == [10, 11, 12, 13]
        assert [len(batch) for batch in batches] == sizes and sum(batches, []) == lengths
        batches.clear()
    monkeypatch.setattr(engine, "device", SimpleNamespace(type="cuda"))
    for name, value in (("mem_get_info", (1000, 9999)), ("memory_reserved", 600), ("memory_allocated", 64)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert engine.batch_tokens() == (1000 + 600 - 64) // 2 // (2 * 2 * 16 * 4)  # of 2 layers, 16 floats


def test_weights_that_do_not_fit_are_refused(opened):
    for name in ("model.layers.9.x", "model.norm.weight"):
        with pytest.raises(ValueError, match=f"the model has no '{name}' of shape .1,."):
            opened[1].load_weights(iter([(name, torch.zeros(1))]))

"""HFEngine and the pure functions of rollout.py, on random tiny models of both architectures."""
import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

import data
import distributed
import model
from rollout import (HFEngine, Sampling, banned_token_ids, draw, eos_token_ids, hub_name, open_engine, request_seed)

T1 = Sampling(1.0, 1.0, 24)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def setup(request, tiny_model_dir, tiny_qwen2_dir, tiny_jsonl):
    """(model_dir, dataset, engine, eos ids, banned ids)"""
    folder = tiny_model_dir if request.param == "qwen2_5_vl" else tiny_qwen2_dir
    tokenizer, image_processor = data.load_processor(folder)
    dataset = data.Dataset(tiny_jsonl, tokenizer, image_processor, 28 * 28, 200704, 512)
    eos, banned = eos_token_ids(tokenizer, folder), banned_token_ids(tokenizer)
    return folder, dataset, make_engine(folder, eos, banned), eos, banned


def world():
    return distributed.World(0, 1, 0, 1, None, torch.device("cpu"))


def make_engine(folder, eos, banned, max_model_len=1024, **kwargs):
    return HFEngine(folder, torch.float32, world(), eos, banned, max_model_len, **kwargs)


def seeds(n, step=0):
    return [request_seed(1, step, f"q{i}", 0) for i in range(n)]


def full_logits(model, inputs, response):
    """(R, V) logits before each response token: one uncached forward of one row, positions by the model itself."""
    ids = torch.tensor([inputs.query_ids + response])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=inputs.pixel_values, image_grid_thw=inputs.grid_thw,
                    mm_token_type_ids=(ids == model.config.image_token_id).int())
    return out.logits[0, len(inputs.query_ids) - 1:-1]


def expected_logprobs(model, inputs, response, banned, temperature):
    logits = full_logits(model, inputs, response)
    logits[:, banned] = -torch.inf
    return (logits / temperature).log_softmax(-1)[range(len(response)), response]


def test_tokens_do_not_depend_on_the_batch(setup):
    folder, dataset, engine, eos, banned = setup
    indices = [0, 1, 1, 2, 5, 7, 11, 1]
    together = engine.generate(dataset, indices, seeds(8), T1)
    assert len({len(dataset.inputs(i).query_ids) for i in indices}) > 2  # so there was padding
    assert len({tuple(c.token_ids) for c in together}) == 8  # the same query with another seed: another response
    alone = [engine.generate(dataset, [i], [s], T1)[0] for i, s in zip(indices, seeds(8))]
    reverse = engine.generate(dataset, indices[::-1], seeds(8)[::-1], T1)[::-1]
    small = make_engine(folder, eos, banned, max_batch_tokens=300).generate(dataset, indices, seeds(8), T1)
    for other in (alone, reverse, small):
        assert [c.token_ids for c in other] == [c.token_ids for c in together]
        assert [c.finish_reason for c in other] == [c.finish_reason for c in together]
        for a, b in zip(other, together):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


def test_a_longer_limit_only_appends(setup):
    folder, dataset, engine, eos, banned = setup
    short, long = (engine.generate(dataset, range(6), seeds(6), T1._replace(max_new_tokens=n)) for n in (8, 24))
    assert [c.token_ids for c in short] == [c.token_ids[:8] for c in long]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_an_uncached_forward(setup, temperature):
    folder, dataset, engine, eos, banned = setup
    engine = make_engine(folder, [20, 60, 100, 140, 180, 220], banned)
    completions = engine.generate(dataset, list(range(12)), seeds(12), T1._replace(temperature=temperature))
    assert len({len(c.token_ids) for c in completions}) > 1  # rows left the batch on the way
    for i, c in enumerate(completions):
        expected = expected_logprobs(engine.model, dataset.inputs(i), c.token_ids, banned, temperature)
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-5, rtol=0)


def test_vision_tokens_are_never_sampled(setup):
    folder, dataset, engine, eos, banned = setup
    assert len(banned) == 5
    free = make_engine(folder, eos, [])
    hot = Sampling(2.0, 1.0, 64)
    assert {t for c in free.generate(dataset, [0] * 64, seeds(64), hot) for t in c.token_ids} & set(banned)
    assert not {t for c in engine.generate(dataset, [0] * 64, seeds(64), hot) for t in c.token_ids} & set(banned)


def test_a_response_ends_with_its_first_eos(setup):
    folder, dataset, engine, eos, banned = setup
    many = [100, 120, 140, 160, 180, 200, 220, 240]
    completions = make_engine(folder, many, banned).generate(dataset, [i % 12 for i in range(48)], seeds(48), T1)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.logprobs) == len(c.token_ids)
        assert not set(c.token_ids[:-1]) & set(many)
        assert (c.token_ids[-1] in many) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.token_ids) == 24


def test_max_model_len_cuts_each_row_by_its_own_length(setup):
    folder, dataset, engine, eos, banned = setup
    lengths = [len(dataset.inputs(i).query_ids) for i in range(6)]
    room = max(lengths) + 4
    completions = make_engine(folder, eos, banned + eos, max_model_len=room).generate(dataset, range(6), seeds(6), T1)
    assert [len(c.token_ids) for c in completions] == [min(24, room - n) for n in lengths]
    assert {c.finish_reason for c in completions} == {"length"}


@pytest.mark.parametrize("sampling", [Sampling(0.01, 1.0, 24), Sampling(0.01, 0.001, 24), Sampling(1.0, 0.001, 24)])
def test_low_temperature_or_top_p_is_greedy(setup, sampling):
    folder, dataset, engine, eos, banned = setup
    for i, c in enumerate(engine.generate(dataset, range(4), seeds(4), sampling)):
        logits = full_logits(engine.model, dataset.inputs(i), c.token_ids)
        logits[:, banned] = -torch.inf
        top = logits.topk(2).values
        clear = top[:, 0] - top[:, 1] > 0.1  # at T 0.01 a near tie may fall either way
        assert clear.float().mean() > 0.5
        assert torch.equal(torch.tensor(c.token_ids)[clear], logits.argmax(-1)[clear])
        assert all(x <= 0 for x in c.logprobs)


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.7)])
def test_draws_have_the_right_frequencies(temperature, top_p):
    n, generator = 40_000, torch.Generator().manual_seed(0)
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 1.9, -3.0, 0.7])
    tokens, logprobs = draw(logits.repeat(n, 1), torch.rand(n, dtype=torch.float64, generator=generator),
                            torch.tensor([5]), temperature, top_p)
    weights = [0 if i == 5 else torch.exp(x / temperature).item() for i, x in enumerate(logits)]  # by hand
    probs = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(logprobs, probs.log()[tokens])
    kept, total = torch.zeros(8), 0.0
    for i in probs.argsort(descending=True).tolist():
        if total < top_p:
            kept[i] = probs[i]
        total += probs[i].item()
    expected = n * kept / kept.sum()
    counts = torch.bincount(tokens, minlength=8)
    assert not counts[expected == 0].any()
    chi2 = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi2 < 25  # 6 degrees of freedom: 4e-4 by chance; another temperature by 5% gives more than 60


def test_load_weights_changes_the_distribution(setup):
    folder, dataset, _, eos, banned = setup
    engine = make_engine(folder, eos, banned)
    before = engine.generate(dataset, range(4), seeds(4), T1)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    named = [(hub_name(name), p.detach()) for name, p in model.named_parameters(remove_duplicate=False)]
    assert any(name.startswith("visual.") for name, _ in named) and any(name == "lm_head.weight" for name, _ in named)
    engine.load_weights(iter(named))
    after = engine.generate(dataset, range(4), seeds(4), T1)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    for i, c in enumerate(after):
        expected = expected_logprobs(model, dataset.inputs(i), c.token_ids, banned, 1.0)
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-5, rtol=0)


def test_load_weights_refuses_what_does_not_fit(setup):
    folder, dataset, _, eos, banned = setup
    engine = make_engine(folder, eos, banned)
    with pytest.raises(ValueError, match="no parameter 'model.layers.9.x'"):
        engine.load_weights(iter([("model.layers.9.x", torch.zeros(1))]))
    with pytest.raises(ValueError, match="model.norm.weight is"):
        engine.load_weights(iter([("model.norm.weight", torch.zeros(1))]))


def test_each_image_is_encoded_once(setup, monkeypatch):
    folder, dataset, engine, eos, banned = setup
    seen, encode_images = [], model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda tower, rows: seen.append(len(rows)) or encode_images(tower, rows))
    engine.generate(dataset, [3, 4, 3, 4, 3, 4], seeds(6), T1)
    assert seen == [2]


def test_an_image_that_the_caller_has_read_or_encoded_is_neither_read_nor_encoded_again(setup, monkeypatch):
    folder, dataset, engine, eos, banned = setup
    indices, tower = [3, 4, 3, 5], engine.model.model.visual
    expected = engine.generate(dataset, indices, seeds(4), T1)
    pixels = model.encode(None, dataset, indices)
    features = model.encode(tower, dataset, indices)
    monkeypatch.setattr(dataset, "inputs", None)
    assert engine.generate(dataset, indices, seeds(4), T1, pixels) == expected
    engine.start(dataset, indices, seeds(4), T1)
    monkeypatch.setattr(model, "encode_images", lambda tower, images: [] if not images else 1 / 0)
    assert engine.collect(features) == expected


def test_kept_features_need_no_image(setup, monkeypatch):
    folder, dataset, engine, eos, banned = setup
    expected = engine.generate(dataset, [3, 4, 3, 5], seeds(4), T1)
    monkeypatch.setattr(dataset, "kept", {})
    model.keep_all(engine.model.model.visual, dataset, range(len(dataset)))
    assert dataset.kept.keys() == set(range(len(dataset)))
    monkeypatch.setattr(dataset, "inputs", None)
    again = engine.generate(dataset, [3, 4, 3, 5], seeds(4), T1)
    assert [c.token_ids for c in again] == [c.token_ids for c in expected]


def test_no_rows_no_completions(setup):
    assert setup[2].generate(setup[1], [], [], T1) == []


def test_request_seed_is_pure_and_spread():
    assert request_seed(0, 1, "a", 2) == 5373156998694678871  # the same in every process and on every machine
    args = [(s, t, i, k) for s in range(3) for t in (0, 1, "parity") for i in ("1", "11", "a") for k in range(3)]
    values = {request_seed(*a) for a in args}
    assert len(values) == len(args) and all(0 <= v < 2**63 for v in values)


def test_eos_ids_come_from_tokenizer_and_generation_config(tiny_model_dir, tmp_path):
    tokenizer, _ = data.load_processor(tiny_model_dir)
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert eos_token_ids(tokenizer, tiny_model_dir) == sorted([end, text_end])
    assert eos_token_ids(tokenizer, tmp_path) == [end]
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=7)))
    assert eos_token_ids(tokenizer, tmp_path) == sorted([end, 7])


def test_a_hostile_generation_config_changes_nothing(setup, tmp_path):
    folder, dataset, engine, eos, banned = setup
    shutil.copytree(folder, tmp_path / "m")
    hostile = dict(repetition_penalty=5.0, temperature=0.1, top_k=1, top_p=0.1, do_sample=True, eos_token_id=eos)
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(hostile))
    other = make_engine(str(tmp_path / "m"), eos, banned)
    assert other.generate(dataset, range(4), seeds(4), T1) == engine.generate(dataset, range(4), seeds(4), T1)


def test_an_unknown_engine_is_a_user_error(setup):
    with pytest.raises(data.UserError, match="'vllm' or 'hf', got 'sglang'"):
        open_engine("sglang", setup[0], torch.float32, world(), setup[3], setup[4], 64, 0.8, 0)


def test_without_vllm_the_error_names_the_other_engine(setup, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(data.UserError, match="--rollout=hf"):
        open_engine("vllm", setup[0], torch.float32, world(), setup[3], setup[4], 64, 0.8, 0)

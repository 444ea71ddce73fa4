"""model.py against transformers' own forward over pixels, and its pieces against slow loops."""
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import data
import model
from configurator import UserError
from tiny import make_tiny, transformers_logprobs

RESPONSES = [[40, 41, 42, 2], [50], [60, 0, 0, 61, 62], [70, 71]]  # 0 is the padding id, and sampled here
TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=itertools.product(model.MODEL_TYPES, (True, False)),
                ids=lambda p: f"{p[0]}-{p[1]}")
def folder(request, tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model"), *request.param)


@pytest.fixture(scope="module")
def dataset(folder, mixed_jsonl):
    """Rows 0 .. 3 have one, no, three and one picture."""
    return data.Dataset(mixed_jsonl, *data.load_processor(folder), 3136, 28224, 512)


def banned(dataset):
    return data.special_token_ids(dataset.tokenizer, "")[1]


def sequences_of(visual, dataset, rows=(0, 1, 2, 3)):
    queries = model.encode(visual, dataset, rows)
    return [model.make_sequence(queries[row], RESPONSES[row]) for row in rows]


def test_packed_logprobs_and_entropy_are_those_of_each_sequence_alone_by_transformers_over_pixels(
        folder, dataset, world, monkeypatch):
    monkeypatch.setitem(model.LOGITS_PER_CHUNK, "cpu", 3 * 265)  # three tokens a chunk: twelve make four
    policy, visual = model.load_policy(folder, world, torch.float32, banned(dataset))
    sequences = sequences_of(visual, dataset)
    logprobs, entropy = policy(sequences, TEMPERATURE)
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for row, response in enumerate(RESPONSES):
        whole, n = transformers_logprobs(hf, dataset, row, response, TEMPERATURE), len(response)
        torch.testing.assert_close(logprobs[row, :n], whole[range(n), response], atol=1e-5, rtol=0)
        expected_entropy = torch.distributions.Categorical(logits=whole).entropy()
        torch.testing.assert_close(entropy[row, :n], expected_entropy, atol=1e-5, rtol=0)
        assert not logprobs[row, n:].any() and not entropy[row, n:].any()
    by_parts = model.response_logprobs(policy, sequences, 50, TEMPERATURE)
    torch.testing.assert_close(by_parts, logprobs, atol=1e-5, rtol=0)
    # a tower that is part of the policy makes the same features, in one call whatever the pictures
    owner, nothing = model.load_policy(folder, world, torch.float32, banned(dataset), train_connector=True)
    calls = []
    owner.visual.register_forward_hook(lambda *_: calls.append(1))
    again, _ = owner(sequences_of(nothing, dataset), TEMPERATURE)
    torch.testing.assert_close(again, logprobs, atol=1e-5, rtol=0)
    assert nothing is None and len(calls) == 1


def test_a_gradient_depends_neither_on_micro_batches_nor_on_order_chunks_or_checkpointing(
        tiny_model_dir, mixed, world, monkeypatch):
    gradients = []
    for chunk, checkpointing, order, budget in (
            (1 << 24, False, (0, 1, 2, 3), 10**6), (265, True, (3, 1, 0, 2), 60),
            (1 << 24, True, (0, 1, 2, 3), 1)):
        monkeypatch.setitem(model.LOGITS_PER_CHUNK, "cpu", chunk)
        policy, _ = model.load_policy(tiny_model_dir, world, torch.float32, [], train_connector=True,
                                      train_vit=True, activation_checkpointing=checkpointing)
        sequences = sequences_of(None, mixed, order)  # with a budget of 1, a micro-batch has no picture
        for part in model.microbatches(sequences, range(4), budget):
            policy([sequences[i] for i in part], TEMPERATURE)[0].sum().backward()
        gradients.append({name: p.grad.full_tensor() for name, p in policy.named_parameters()})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max() + 1e-3
        for other in gradients[1:]:
            assert (other[name] - gradient).abs().max() / scale < 1e-5, name
        assert gradient.any(), name


def test_the_gradient_of_the_head_is_autograds(monkeypatch):
    monkeypatch.setitem(model.LOGITS_PER_CHUNK, "cpu", 4 * 31)  # four tokens a chunk: 4 + 4 + 3
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 8, dtype=torch.float64), torch.randn(31, 8, dtype=torch.float64)
    targets, grad, no = torch.randint(6, 31, (11,)), torch.randn(11), torch.tensor([0, 5])

    def plain(hidden, weight):
        logits = (hidden @ weight.T / TEMPERATURE).index_fill(1, no, -torch.inf)
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    results = []
    for act in (plain, lambda h, w: model.chunked_logprobs(h, w, targets, TEMPERATURE, no)[0]):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = act(h, w)
        (logprobs * grad).sum().backward()
        results.append((logprobs.float(), h.grad.float(), w.grad.float()))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert not model.chunked_logprobs(h, w, targets, TEMPERATURE, no)[1].requires_grad, "of the entropy"


def test_an_image_token_in_a_response_is_text(tiny_model_dir, mixed, world):
    policy, visual = model.load_policy(tiny_model_dir, world, torch.float32, [])
    query = model.encode(visual, mixed, [0])[0]
    with_one = model.make_sequence(query, [40, policy.image_token_id, 41])
    logprobs, _ = policy([with_one], 1.0)
    before, _ = policy([model.make_sequence(query, [40])], 1.0)
    assert logprobs.isfinite().all()
    torch.testing.assert_close(logprobs[0, :1], before[0], atol=1e-5, rtol=0)


def test_cut_keeps_the_budget_and_every_index():
    assert model.cut([3, 3, 2, 3, 9, 1], 6) == [[0, 1], [2, 3], [4], [5]]
    assert model.cut([], 6) == []


def test_a_rank_with_fewer_micro_batches_halves_its_longest(monkeypatch):
    sequences = [model.Sequence(torch.zeros(2), None, None, [], [], 1)] * 5
    monkeypatch.setattr(model, "all_max", lambda n: 3)
    batches = model.microbatches(sequences, range(5), 100)
    assert len(batches) == 3 and sorted(sum(batches, [])) == [0, 1, 2, 3, 4] and all(batches)


def test_gathered_weights_have_transformers_names_and_the_tied_head(folder, world):
    policy, _ = model.load_policy(folder, world, torch.float32, [])
    gathered = dict(model.gather_weights(policy, torch.bfloat16, trained_only=False))
    hf = AutoModelForImageTextToText.from_pretrained(folder)
    language = {name: p for name, p in hf.named_parameters(remove_duplicate=False) if "visual" not in name}
    assert gathered.keys() == language.keys()
    for name, tensor in gathered.items():
        assert torch.equal(tensor, language[name].bfloat16()), name
    assert model.open_weights(folder).keys() == dict(hf.named_parameters()).keys()


@pytest.mark.parametrize("break_it, message", [
    (lambda t: t.pop("model.norm.weight"), "has no tensor model.language_model.norm.weight"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "is .3,. in .*, its config asks for")])
def test_a_checkpoint_that_is_not_its_configs_is_refused(break_it, message, tiny_model_dir, tmp_path, world):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    path = next(copy.glob("*.safetensors"))
    tensors = load_file(path)
    break_it(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        model.load_policy(str(copy), world, torch.float32, [])


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "model_type 'llama'"), (None, "cannot be read"),
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), "sliding windows")])
def test_a_config_that_this_code_does_not_know_is_refused(change, message, tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change) if change else "{")
    with pytest.raises(UserError, match=message):
        model.load_config(copy)


def test_the_learning_rate_rises_and_falls():
    rates = [model.learning_rate_at(i, 20, 1.0, 0.1) for i in range(20)]
    assert rates[:2] == [0.5, 1.0] and rates[2] == 1.0 and rates[11] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[2:], rates[3:])) and rates[-1] > 0
    assert model.learning_rate_at(0, 1, 1.0, 0.0) == 1.0


def test_bytes_of_full_logits_never_exist(world):
    """2048 tokens of a vocabulary of 151,936 would be 1.2 GB of logits, forward alone."""
    before = model.peak_gb(world.device)
    hidden = torch.randn(2048, 4).requires_grad_()
    weight = torch.randn(151_936, 4).requires_grad_()
    targets, banned_ids = torch.zeros(2048, dtype=torch.int64), torch.tensor([5])
    logprobs, _ = model.chunked_logprobs(hidden, weight, targets, 1.0, banned_ids)
    logprobs.sum().backward()
    assert model.peak_gb(world.device) - before < 0.6

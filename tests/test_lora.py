"""LoRA: adapters against plain autograd, and their merged weights wherever they are used."""
import pytest
import torch

import model
from rollout import HFEngine
from test_model import sequences_of
from tiny import make_tiny


def open_policy(folder, world, dtype=torch.float32):
    """(policy, tower): rank 4, adapters that do something."""
    policy, visual = model.load_policy(folder, world, dtype, [], lora_rank=4, lora_alpha=8)
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        if name.endswith("lora_B"):
            p.data.to_local().normal_(0, 0.05)
    return policy, visual


def test_gradients_are_those_of_the_merged_weight():
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True)
                  for shape in ((2, 5, 7), (6, 7), (3, 7), (6, 3)))
    wanted = torch.randn(2, 5, 6, dtype=torch.float64)
    ((x @ (w + 0.5 * b @ a).T) * wanted).sum().backward()
    expected = [t.grad.clone() for t in (x, a, b)]
    for t in (x, w, a, b):
        t.grad = None
    (model.MergedLinear.apply(x, w, None, a, b, 0.5) * wanted).sum().backward()
    torch.testing.assert_close([x.grad, a.grad, b.grad], expected)
    assert w.grad is None


@pytest.mark.parametrize("kind", model.MODEL_TYPES)
def test_every_linear_layer_of_the_language_model_and_nothing_else_is_adapted(kind, world, tmp_path):
    policy, _ = open_policy(make_tiny(tmp_path, kind, tied=True), world)
    linears = sum(isinstance(m, torch.nn.Linear) for m in policy.modules())
    adapted = sum(isinstance(m, model.LoRALinear) for m in policy.modules())
    assert (linears, adapted) == (0, 7 * len(policy.language_model.layers))
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_engine_and_adapters_off_agree_with_plain_models(dtype, tiny_model_dir, mixed, world):
    """bfloat16: bit for bit, though it rounds W + B A; the adapters are float32 all the same."""
    policy, visual = open_policy(tiny_model_dir, world, dtype)
    sequences = sequences_of(visual, mixed)
    assert {p.dtype for name, p in policy.named_parameters() if "lora_" in name} == {torch.float32}
    plain, _ = model.load_policy(tiny_model_dir, world, dtype, [], master=False)
    base = model.response_logprobs(plain, sequences, 10**6, 1.0)
    off = model.response_logprobs(policy, sequences, 10**6, 1.0, adapters=False)
    assert torch.equal(off, base)
    merged = dict(model.gather_weights(policy, dtype))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.to_local().copy_(merged[model.name_in_memory(name)])
    ours = model.response_logprobs(policy, sequences, 10**6, 1.0)
    assert (ours - base).abs().max() > 0.01
    expected = model.response_logprobs(plain, sequences, 10**6, 1.0)
    torch.testing.assert_close(ours, expected, atol=0 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    engine = HFEngine(tiny_model_dir, dtype, world, [2], [])
    engine.load_weights(merged.items())
    assert all(torch.equal(engine.parameters[name], tensor) for name, tensor in merged.items())


def test_updates_leave_the_base_as_it_was_and_cost_what_adapters_cost(tiny_model_dir, mixed, world):
    policy, visual = open_policy(tiny_model_dir, world)
    frozen = {name: p.full_tensor().clone() for name, p in policy.named_parameters() if "lora_" not in name}
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, fused=True)
    before = [p.full_tensor().clone() for p in trained]
    for _ in range(3):
        policy(sequences_of(visual, mixed), 1.0)[0].sum().backward()
        gradient_bytes = sum(p.grad.to_local().nbytes for p in policy.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in policy.named_parameters():
        assert "lora_" in name or torch.equal(p.full_tensor(), frozen[name]), name
    assert not any(torch.equal(p.full_tensor(), old) for p, old in zip(trained, before))
    # a layer: q 32 -> 32, k and v 32 -> 16, o, gate and up 32 -> 64, down 64 -> 32; rank 4, two layers
    elements = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    moments = sum(state[name].to_local().nbytes for state in optimizer.state.values()
                  for name in ("exp_avg", "exp_avg_sq"))
    assert (sum(p.numel() for p in trained), gradient_bytes) == (elements, 4 * elements)
    assert moments == 8 * elements

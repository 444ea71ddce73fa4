"""decode.py against transformers' own forward: both architectures, tied and untied."""
import pytest
import torch
from transformers import AutoModelForImageTextToText

from decode import advance, empty_cache
from tiny import make_tiny


CASES = [(kind, tied) for kind in ("qwen2_5_vl", "qwen2_vl") for tied in (True, False)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request, tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("decode"), *request.param)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("at_once", [1, 4])
def test_hidden_states_are_those_of_transformers(model, at_once):
    """Four rows of 7, 3, 1 and 5 tokens, left-padded; then 6 tokens one by one, the second row leaving after two."""
    torch.manual_seed(0)
    text, lengths, more = model.model.language_model, [7, 3, 1, 5], 6
    Q, B, H = max(lengths), len(lengths), text.config.hidden_size
    embeds, positions = torch.randn(B, Q + more, H), torch.randint(0, 50, (3, B, Q + more))  # three unlike M-RoPE rows
    expected = []  # of each row alone: no padding, no cache
    for i, length in enumerate(lengths):
        own = slice(Q - length, None)
        expected.append(text(inputs_embeds=embeds[i:i + 1, own], position_ids=positions[:, i:i + 1, own], use_cache=False)
                        .last_hidden_state[0, length - 1:])
    expected = torch.stack(expected)  # (B, 1 + more, H)

    hide = torch.finfo(torch.float32).min
    bias = torch.zeros(B, 1, 1, Q + more)
    for i, length in enumerate(lengths):
        bias[i, ..., :Q - length] = hide
    cache = empty_cache(text, B, Q + more)
    for kv in cache:
        kv.fill_(torch.nan)  # whatever lies there before is never read
    sees = torch.minimum(bias[..., :Q], torch.full((Q, Q), hide).triu(1))
    hidden = [advance(text, embeds[i:i + at_once, :Q], positions[:, i:i + at_once, :Q], sees[i:i + at_once],
                      [kv[:, i:i + at_once] for kv in cache], 0) for i in range(0, B, at_once)]
    torch.testing.assert_close(torch.cat(hidden), expected[:, 0], atol=1e-5, rtol=0)
    rows = torch.arange(B)
    for t in range(more):
        if t == 2:
            rows = torch.tensor([0, 2, 3])
            cache = [kv[:, rows] for kv in cache]
        now = slice(Q + t, Q + t + 1)
        hidden = advance(text, embeds[rows, now], positions[:, rows, now], bias[rows, ..., :Q + t + 1], cache, Q + t)
        torch.testing.assert_close(hidden, expected[rows, t + 1], atol=1e-5, rtol=0)

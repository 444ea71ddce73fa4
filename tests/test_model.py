"""model.py against transformers' own forward, and its batches against slow loops."""
import json
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import distributed
import checkpoint
import batch as batching
import model
from configurator import UserError

GRIDS = [torch.tensor([[1, 4, 6]]), torch.tensor([[1, 6, 4]]), torch.tensor([[1, 2, 2]])]
RESPONSES = [[40, 41, 42, 2], [50], [60, 0, 0, 61, 62]]  # 0 is the padding id, and sampled here
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def world():
    world = distributed.start()
    yield world
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["tiny_model_dir", "tiny_qwen2_dir"])
def folder(request):
    return request.getfixturevalue(request.param)


def problem():
    """Three rows of unlike lengths and pictures: (queries, pixel values)."""
    torch.manual_seed(1)
    queries = [[10, 3] + [6] * (int(g.prod()) // 4) + [4, 20 + i] + [30] * (3 * i) for i, g in enumerate(GRIDS)]
    return queries, [torch.randn(int(g.prod()), 1176) for g in GRIDS]


def reference_logprobs(folder, queries, pixels, responses):
    """What transformers says, a row at a time, nothing padded, image_pad (id 6) outside the distribution."""
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for query, pixel_values, grid, response in zip(queries, pixels, GRIDS, responses):
        ids = torch.tensor([query + response])
        with torch.no_grad():
            logits = hf(input_ids=ids, pixel_values=pixel_values, image_grid_thw=grid,
                        mm_token_type_ids=(ids == 6).int()).logits[0] / TEMPERATURE
        logits[:, 6] = -torch.inf
        logprobs = logits.log_softmax(-1)[len(query) - 1:-1]
        entropy = torch.distributions.Categorical(logits=logits[len(query) - 1:-1]).entropy()
        rows.append((logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0], entropy))
    return rows


def run(policy, batch, features):
    return policy(batch.query_responses, batch.position_ids, batch.attention_mask, features, batch.response_mask, TEMPERATURE)


def test_logprobs_and_entropy_equal_those_of_transformers(folder, world, monkeypatch):
    monkeypatch.setitem(model.LOGITS_PER_CHUNK, "cpu", 3 * 264)  # three tokens a chunk: ten tokens make four
    queries, pixels = problem()
    policy, visual = model.load_policy(folder, world, torch.float32, [6])
    batch = batching.pack(policy, queries, RESPONSES, GRIDS, 0, "cpu")
    features = model.encode_images(visual, [model.ImageInput(*x) for x in zip(pixels, GRIDS)])
    logprobs, entropy = run(policy, batch, features)
    for i, (expected, expected_entropy) in enumerate(reference_logprobs(folder, queries, pixels, RESPONSES)):
        n = len(RESPONSES[i])
        torch.testing.assert_close(logprobs[i, :n], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[i, :n], expected_entropy, atol=1e-5, rtol=0)
        assert (logprobs[i, n:] == 0).all() and (entropy[i, n:] == 0).all()
    # rows of the batch on their own, trimmed, say the same
    for rows in ([2], [1, 0]):
        part = batching.select(batch, rows)
        alone, _ = run(policy, part, [features[i] for i in rows])
        torch.testing.assert_close(alone, logprobs[rows, :alone.shape[1]], atol=1e-5, rtol=0)
    # a tower that is part of the policy makes the same features
    owner, nothing = model.load_policy(folder, world, torch.float32, [6], train_connector=True)
    assert nothing is None
    calls = []
    owner.visual.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(model.encode_images, "__defaults__", (1,))  # a patch a call
    torch.testing.assert_close(run(owner, batch, [model.ImageInput(*x) for x in zip(pixels, GRIDS)])[0], logprobs)
    assert len(calls) == 1, "a sharded tower is called once on each rank, whatever its images"


@pytest.mark.parametrize("temperature, banned", [(1.0, []), (0.7, [0, 5])])
def test_the_gradient_of_the_head_is_autograds(temperature, banned, monkeypatch):
    monkeypatch.setitem(model.LOGITS_PER_CHUNK, "cpu", 4 * 31)  # four tokens a chunk: 4 + 4 + 3
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 8, dtype=torch.float64), torch.randn(31, 8, dtype=torch.float64)
    targets, grad = torch.randint(6, 31, (11,)), torch.randn(11)

    def plain(hidden, weight):
        logits = hidden @ weight.T / temperature
        logits[:, banned] = -torch.inf
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    results = []
    for act in (plain, lambda h, w: model.chunked_logprobs(h, w, targets, temperature, banned)[0]):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = act(h, w)
        (logprobs * grad).sum().backward()
        results.append((logprobs.float(), h.grad.float(), w.grad.float()))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    h = hidden.clone().requires_grad_()
    logprobs, entropy = model.chunked_logprobs(h, weight, targets, temperature, banned, with_entropy=False)
    logprobs.sum().backward()  # a frozen head gets no gradient
    assert not entropy.any() and not entropy.requires_grad and h.grad.any() and weight.grad is None
    probs = (hidden @ weight.T / temperature).index_fill(1, torch.tensor(banned, dtype=torch.int64), -torch.inf).softmax(-1)
    expected = -(probs * probs.clamp(min=1e-300).log()).sum(-1)
    torch.testing.assert_close(model.chunked_logprobs(hidden, weight, targets, temperature, banned)[1], expected.float())


def test_chunks_and_checkpointing_do_not_change_the_gradient(folder, world, monkeypatch):
    queries, pixels = problem()
    gradients = []
    for chunk, checkpointing in ((1 << 24, False), (264, True)):
        monkeypatch.setitem(model.LOGITS_PER_CHUNK, "cpu", chunk)
        policy, visual = model.load_policy(folder, world, torch.float32, [6], activation_checkpointing=checkpointing)
        batch = batching.pack(policy, queries, RESPONSES, GRIDS, 0, "cpu")
        features = model.encode_images(visual, [model.ImageInput(*x) for x in zip(pixels, GRIDS)])
        run(policy, batch, features)[0].sum().backward()
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_the_layers_see_no_mask_and_no_more_columns_than_the_longest_row(folder, world):
    queries, pixels = problem()
    policy, visual = model.load_policy(folder, world, torch.float32, [6])
    batch = batching.pack(policy, queries, RESPONSES, GRIDS, 0, "cpu")
    features = model.encode_images(visual, [model.ImageInput(*x) for x in zip(pixels, GRIDS)])
    seen = []
    for layer in policy.language_model.layers:
        layer.register_forward_pre_hook(lambda _, x, kwargs: seen.append((x[0].shape[1], kwargs["attention_mask"])),
                                        with_kwargs=True)
    run(policy, batch, features)
    longest = max(len(query) + len(response) for query, response in zip(queries, RESPONSES))
    assert longest < batch.query_responses.shape[1]  # the longest query and the longest response are of unlike rows
    assert seen == [(longest, None)] * len(policy.language_model.layers)


def test_an_image_token_in_a_response_is_text(tiny_model_dir, world):
    queries, pixels = problem()
    policy, visual = model.load_policy(tiny_model_dir, world, torch.float32, [])
    batch = batching.pack(policy, queries, [[40, 6, 41]] * 3, GRIDS, 0, "cpu")
    features = model.encode_images(visual, [model.ImageInput(*x) for x in zip(pixels, GRIDS)])
    assert torch.isfinite(run(policy, batch, features)[0]).all()


def test_positions_are_those_of_the_whole_sequence(folder, world):
    """continued from the query's largest position, they equal get_rope_index over query and response."""
    queries, _ = problem()
    policy, _ = model.load_policy(folder, world, torch.float32, [6])
    batch = batching.pack(policy, queries, RESPONSES, GRIDS, 0, "cpu")
    for i, (query, response) in enumerate(zip(queries, RESPONSES)):
        ids = torch.tensor([query + response])
        whole, _ = policy.rope_index(ids, mm_token_type_ids=(ids == 6).int(), image_grid_thw=GRIDS[i])
        assert torch.equal(batch.position_ids[:, i][:, batch.attention_mask[i].bool()], whole[:, 0])
    assert not torch.equal(batch.position_ids[0], batch.position_ids[1])  # the rows differ: this is no 1-D RoPE


def test_masks_come_from_lengths(world, tiny_model_dir):
    queries, _ = problem()
    policy, _ = model.load_policy(tiny_model_dir, world, torch.float32, [6])
    batch = batching.pack(policy, queries, RESPONSES, GRIDS, 0, "cpu")
    assert batch.response_mask.sum(1).tolist() == [4, 1, 5]  # the sampled padding ids of row 2 count
    assert batch.attention_mask.sum(1).tolist() == [len(q) + len(r) for q, r in zip(queries, RESPONSES)]
    part = batching.select(batch, [1])
    assert part.query_responses.tolist() == [queries[1] + RESPONSES[1]] and part.response_mask.tolist() == [[True]]


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 100, 7, 30, 30, 8, 300]
    batches = batching.cut(lengths, 100)
    assert sorted(i for rows in batches for i in rows) == list(range(7))
    assert batches[0] == [6], "a row over the budget stands alone"
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= 100
    assert batching.cut([1] * 10, 100) == [list(range(10))]
    assert batching.cut([], 100) == []


def test_frozen_parts_get_no_gradient_and_the_flags_say_which(folder, world):
    for flags in ((True, False, False), (False, True, False), (True, True, True), (False, False, True)):
        policy, visual = model.load_policy(folder, world, torch.float32, [6], *flags)
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        expected = set()
        for name, _ in policy.named_parameters():
            part = 0 if not name.startswith("visual.") else 1 if name.startswith("visual.merger.") else 2
            expected |= {name} if flags[part] else set()
        assert trained == expected
        assert (visual is None) == (flags[1] or flags[2])
        assert visual is None or not any(p.requires_grad for p in visual.parameters())


def test_checkpoint_opens_in_transformers_and_in_a_policy(folder, world, tmp_path):
    queries, pixels = problem()
    policy, visual = model.load_policy(folder, world, torch.float32, [6])
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01)
    batch = batching.pack(policy, queries, RESPONSES, GRIDS, 0, "cpu")
    images = [model.ImageInput(*x) for x in zip(pixels, GRIDS)]
    logprobs, _ = run(policy, batch, model.encode_images(visual, images))
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, policy, visual, folder, torch.float32, world)
    latest = tmp_path / "checkpoints" / "latest"
    assert sorted(p.name for p in latest.parent.iterdir()) == ["latest", "step_000001", "step_000002"]
    assert latest.resolve().name == "step_000002"
    for i, (expected, _) in enumerate(reference_logprobs(latest, queries, pixels, RESPONSES)):
        torch.testing.assert_close(logprobs[i, :len(expected)], expected, atol=1e-5, rtol=0)
    again, visual = model.load_policy(latest, world, torch.float32, [6])
    assert torch.equal(run(again, batch, model.encode_images(visual, images))[0], logprobs)
    stored = load_file(latest / "model.safetensors")
    assert ("lm_head.weight" in stored) == (policy.lm_head is not None)
    ours = ("model.layers.", "model.embed_tokens.", "model.norm.", "visual.", "lm_head.")
    assert all(name.startswith(ours) for name in stored)
    assert {p.name for p in pathlib.Path(folder).iterdir()} == {p.name for p in latest.iterdir()}


def test_gathered_names_and_tensors_are_the_hub_s(folder, world):
    policy, _ = model.load_policy(folder, world, torch.float32, [6])
    gathered = dict(model.gather_weights(policy, torch.float32))
    stored = load_file(pathlib.Path(folder) / "model.safetensors")
    assert gathered.keys() == {n for n in stored if not n.startswith("visual.")} | {"lm_head.weight"}
    assert all(torch.equal(t, stored.get(n, stored["model.embed_tokens.weight"])) for n, t in gathered.items())


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.", "model."])
def test_hub_name_of_the_language_model(prefix):
    assert model.hub_name(prefix + "layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"


def test_hub_name_of_tower_and_head():
    for name in ("model.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"):
        assert model.hub_name(name) == "visual.merger.mlp.0.bias"
    assert model.hub_name("lm_head.weight") == "lm_head.weight"


def damaged(folder, tmp_path, change):
    """A copy of the checkpoint whose tensors went through change(dict)."""
    for path in pathlib.Path(folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return str(tmp_path)


def test_a_missing_tensor_is_an_error(tiny_model_dir, world, tmp_path):
    copy = damaged(tiny_model_dir, tmp_path, lambda t: t.pop("visual.merger.mlp.0.weight"))
    with pytest.raises(UserError, match="no tensor visual.merger.mlp.0.weight"):
        model.load_policy(copy, world, torch.float32, [])


def test_a_tensor_that_fits_nowhere_is_an_error(tiny_model_dir, world, tmp_path):
    copy = damaged(tiny_model_dir, tmp_path, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(UserError, match="1 tensors of .* fit nothing"):
        model.load_policy(copy, world, torch.float32, [])


def test_another_head_beside_tied_embeddings_is_an_error(tiny_model_dir, world, tmp_path):
    copy = damaged(tiny_model_dir, tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match="ties its embeddings"):
        model.load_policy(copy, world, torch.float32, [])


@pytest.mark.parametrize("text, message", [('{"model_type": "llama"}', "model_type 'llama'"), ("[1]", "cannot be read"),
                                           ("{", "cannot be read")])
def test_another_architecture_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        model.load_config(tmp_path)


def test_a_missing_folder_is_named():
    with pytest.raises(UserError, match="no folder './nowhere'"):
        model.local_folder("./nowhere")


def test_peak_memory_of_logprobs_is_a_quarter_of_that_with_full_logits():
    """4 responses of 512 tokens at a vocabulary of 151,936, forward and backward, each in a process of its own."""
    peaks = {}
    for way in ("chunked", "full"):
        script = pathlib.Path(__file__).with_name("logits_memory.py")
        done = subprocess.run([sys.executable, script, way], capture_output=True, text=True, check=True)
        peaks[way] = json.loads(done.stdout)
    for figure in ("update_gb", "process_gb"):  # what the update adds, and all of the process with it
        assert peaks["chunked"][figure] <= peaks["full"][figure] / 4, peaks

"""bench: its sides run train_rl.py as it stands and compute the same; the plan is arithmetic by hand."""
import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from bench.__main__ import PARTS, largest_difference, parse, ratios, run
from bench.sizes import make_model
from configurator import UserError
from conftest import ROOT

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
          "spatial_merge_size": 2, "out_hidden_size": 3584}
QWEN_7B = {  # the sizes of Qwen2.5-VL-7B-Instruct, written flat as its config.json on the hub is
    "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "image_token_id": 151655,
    "vision_config": VISION}
QWEN_3B = QWEN_7B | {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "vision_config": VISION | {"out_hidden_size": 2048}}
QWEN3_4B = {
    "model_type": "qwen3_vl", "image_token_id": 151655, "tie_word_embeddings": True, "text_config": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}},
    "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
                      "deepstack_visual_indexes": [5, 11, 17]}}


@pytest.fixture(scope="module")
def fork(tmp_path_factory, tiny_model_dir, tiny_jsonl):
    """A copy of the repository whose loss leaves a line in losses.txt, after a run against both ways. No
    response is right: gamma spreads what is lost by never ending, so that there are advantages."""
    folder = tmp_path_factory.mktemp("fork")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "bench", folder / "bench")
    line = "    ratio = log_ratio.exp()\n"  # of policy_loss
    mark = '    print(*__import__("sys").argv, file=open("losses.txt", "a"))\n'
    (folder / "objective.py").write_text((ROOT / "objective.py").read_text().replace(line, mark + line))
    knobs = dict(model=tiny_model_dir, train_data=tiny_jsonl, rollout="hf", batch_size=4, minibatch_size=2,
                 max_new_tokens=12, max_prompt_tokens=1024, max_pixels=50176, max_tokens_per_microbatch=400,
                 kl_loss_coeff=0.1, gamma=0.9)
    (folder / "tiny.py").write_text("".join(f"{key} = {value!r}\n" for key, value in knobs.items()))
    command = [sys.executable, "-m", "bench", "tiny.py", "--against=padded,plain", "--rounds=1", "--steps=1",
               "--learning_rate=1e-3", "--out=made/tiny.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout, json.loads((folder / "made/tiny.json").read_text())


def test_table_and_json_have_every_part_of_every_side(fork):
    assert fork[2]["command"].startswith("python -m bench tiny.py --against=padded,plain")
    for name, side in fork[2]["sides"].items():
        assert list(side["summary"]) == list(side["ratios"] or side["summary"]) == [*PARTS, "peak_gb"]
        assert bool(side["ratios"]) == (name != "ours") and f"\n{name} " in fork[1]
        assert all(part["median"] > 0 for part in side["summary"].values())
        assert [[row["step"] for row in steps] for steps in side["rounds"]] == [[2]]  # 1 is the warm-up


def test_a_changed_loss_is_what_every_side_runs(fork):
    lines = (fork[0] / "losses.txt").read_text().splitlines()
    assert {re.search(r"--out_dir=\S*/(\w+)", line)[1] for line in lines} == {"ours", "padded", "plain"}
    assert len(lines) >= 3 * 2 * 2  # sides, steps, updates


def test_both_ways_compute_what_train_rl_computes(fork):
    sides = fork[2]["sides"]
    assert sides["ours"]["rounds"][0][0]["policy/kl_loss"] > 1e-5  # the weights moved
    for name in ("padded", "plain"):
        difference, metric = largest_difference(sides["ours"]["rounds"], sides[name]["rounds"])
        assert sides[name]["largest_difference"] == [difference, metric] and difference < 1e-3


def test_ratios_are_per_response_token_and_round_by_round():
    def round_of(s, tokens):
        times = {f"time/{part}_s": s for part in PARTS}
        return [times | {"memory/peak_gb": s, "tokens/response": tokens}]
    made = ratios([round_of(1, 10), round_of(2, 10)], [round_of(2, 10), round_of(8, 20)])
    assert made["trajectory+update"]["all"] == [2, 2] and made["peak_gb"]["all"] == [2, 4]


@pytest.mark.parametrize("flag, message", [
    ("--rounds=two", "--rounds: invalid int value: 'two'"), ("--steps=0", "--steps must be at least 1"),
    ("--against=trl,verl", "padded, not 'verl'"), ("--max_steps=3", "it sets max_steps")])
def test_errors_of_users_and_of_sides_are_one_line(flag, message):
    with pytest.raises(UserError, match=message):
        parse(["config/toy.py", flag])
    with pytest.raises(UserError, match="^bench: the side trl 2 ended with status 1: no TRL$"):
        run(["-c", "import sys; sys.exit('much more\\nno TRL')"], "the side trl 2")


def test_sizes_make_a_model_that_has_them(tmp_path, tiny_model_dir):
    make_model(tiny_model_dir, tmp_path / "made", "vocab_size=300 hidden_size=64 vision.depth=1", 0)
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert made["model.embed_tokens.weight"].shape == (300, 64) and "visual.blocks.1.norm1.weight" not in made
    with pytest.raises(UserError, match="'layers=3' is no name=number"):
        make_model(tiny_model_dir, tmp_path / "other", "layers=3", 0)


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """plan(a config.json, a config file, flags): (what is printed, its numbers by their names)."""
    def act(hf_config, *argv):
        (tmp_path / "config.json").write_text(json.dumps(hf_config))
        monkeypatch.setattr(sys, "argv", ["bench.plan", *argv, f"--model={tmp_path}"])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # it is set there
        monkeypatch.chdir(ROOT)
        runpy.run_module("bench.plan", run_name="__main__")
        printed = capsys.readouterr().out
        numbers = re.findall(r"(?m)^(.{52}) *(\d+\.\d{3})$", printed)
        return printed, {what.strip(): float(n) for what, n in numbers}
    return act


def test_plan_of_the_paper_by_hand(plan):
    """7.616e9 parameters in the language model, 0.677e9 in the tower; 1.09e9 of them embedding and head."""
    paper = QWEN_7B, "config/geo3k.py", "--nproc=7"
    printed, found = plan(*paper)
    for words in "7,615,616,512 trained", "2101 rows // 896 = 2 steps", "89,600 in all", "3,200 in all":
        assert words in printed
    share, gathered = 7.6156 / 7, 1.090 + 6.5256 / 28  # of the language model; embedding, head and a layer
    gpu = [4 * share, 8 * share, 2 * share, 2 * 0.6766,  # weights, moments, reference, tower
           128 * 1280 * 3584 * 2 / 1e9, 0, 4 * share,  # features, no sampler, gradients
           2 * gathered, 6 * gathered,  # bfloat16; its gradient, that in float32
           # inputs of 28 layers; a layer: 6 x 3584 + 2 x 512 + 4 x 18944 in bfloat16, 2 x 3584 in float32
           16384 * (28 * 3584 * 2 + 98304 * 2 + 2 * 3584 * 4) / 1e9, 3 * 4 * 2**27 / 1e9]  # logits
    vllm = [2 * 8.2922, 4096 * 28 * 2 * 512 * 2 / 1e9]  # weights, keys and values of the longest sequence
    assert list(found.values()) == pytest.approx([
        8.2922, 6.5256, 1.090, 0.632, 0.0446, sum(gpu), *gpu, 64, *vllm, 64 - sum(vllm),
        2 * 8.2922 + 12 * 7.6156, 2 * 8.2922, 12 * 7.6156, 0], rel=0.02)
    _, found = plan(*paper, "--train_llm=False", "--train_connector=True", "--rollout=hf",
                    "--kl_loss_coeff=0")
    changed = {"weights, float32, sharded": 4 * 8.292 / 7, "gradients, float32, sharded": 4 * 0.0446 / 7,
               "reference, sharded": 0, "frozen vision tower, whole": 0, "the sampler's own model": 2 * 8.292}
    assert {what: found[what] for what in changed} == pytest.approx(changed, rel=0.02, abs=0.001)
    for flag, message in (("--nproc=5", "a multiple of samples_per_query [*] nproc = 5"),
                          ("--gpus=7", "too few for 7 that train and one that samples")):
        with pytest.raises(UserError, match=message):
            plan(*paper, flag)


# elements of 36 layers' linear weights and of the embedding; those of their adapters; of the tower
TEXT_3B = 36 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 11008) + 151936 * 2048
TEXT_4B = 36 * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728) + 151936 * 2560
LORA_3B = 36 * 32 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008))
LORA_4B = 36 * 32 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
TOWER_3B = 32 * 1280 * (4 * 1280 + 3 * 3420) + 5120 * (5120 + 2048)
TOWER_4B = 24 * 1024 * (4 * 1024 + 2 * 4096) + 2304 * 1024 + 4 * 4096 * (4096 + 2560)  # 4 mergers
CARDS = {  # weights, what is trained, reference, tower, features, activations; vLLM's share; the card's GB
    "3b_80gb": (QWEN_3B, 4 * TEXT_3B, TEXT_3B, 2 * TEXT_3B, 2 * TOWER_3B, 256 * 1280 * 2048 * 2,
                8192 * (36 * 2048 * 2 + 8 * 2048 + 2 * (6 * 2048 + 2 * 256 + 4 * 11008)), 24e9, 80),
    "3b_24gb": (QWEN_3B, 2 * TEXT_3B + 4 * LORA_3B, LORA_3B, 0, 2 * TOWER_3B, 128 * 1280 * 2048 * 2,
                8192 * (36 * 2048 * 2 + 8 * 2048 + 2 * (6 * 2048 + 2 * 256 + 4 * 11008)), 12e9, 24),
    "qwen3_4b_80gb": (
        QWEN3_4B, 2 * TEXT_4B + 4 * LORA_4B, LORA_4B, 0, 2 * TOWER_4B, 256 * 1024 * 2560 * 2 * 4,
        16384 * (36 * 2560 * 2 + 8 * 2560 + 2 * (4 * 2560 + 2 * 4096 + 2 * 1024 + 4 * 9728)), 40e9, 80)}


@pytest.mark.parametrize("name", CARDS)
def test_plan_of_one_card_by_hand(name, plan):
    hf_config, weights, trained, reference, tower, features, activations, vllm, gpu_gb = CARDS[name]
    argv = hf_config, f"config/geo3k_{name}.py", "--gpus=1", f"--gpu_gb={gpu_gb}"
    printed, found = plan(*argv)
    assert printed.count("\n    fits\n") == 2 and "NOT" not in printed
    resident = weights + 8 * trained + reference + tower + features
    expected = {"weights": weights, "AdamW": 8 * trained, "reference": reference,
                "vision tower, whole": tower, "features": features, "gradients": 4 * trained,
                "activations": activations, f"GB of the {gpu_gb} while vLLM": resident + vllm}
    for what, number in expected.items():
        row = next(n for name, n in found.items() if name.removeprefix("frozen ").startswith(what))
        assert row == pytest.approx(number / 1e9, rel=0.02, abs=0.001), what
    small = plan(*argv, "--gpu_gb=12")[0]
    assert "does NOT fit: " in small and ("set lora_rank=32" in small) == (name == "3b_80gb")
    assert "NOT fit: raise gpu_memory_util" in plan(*argv, "--gpu_memory_utilization=0.05")[0]
    ahead = plan(*argv, "--rollout_ahead=1", "--correction=truncate")[1]
    assert sum(ahead.values()) - sum(found.values()) == pytest.approx(vllm / 1e9), "in the update too"

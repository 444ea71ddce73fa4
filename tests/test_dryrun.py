"""The dry run's figures for Qwen2.5-VL-7B against arithmetic by hand."""
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from transformers import AutoConfig

from dryrun import plan, shard
from model import on_meta

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG_7B = {  # the sizes of Qwen2.5-VL-7B-Instruct, written flat as its config.json on the hub is
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "tie_word_embeddings": False, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "image_token_id": 151655,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
                      "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
                      "fullatt_block_indexes": [7, 15, 23, 31]}}
EMBEDDING = 152064 * 3584
# q and o, k and v, their biases (q, k, v), three MLP matrices, two norms
LAYER = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
LLM = 2 * EMBEDDING + 28 * LAYER + 3584
# qkv and projection with biases, gate, up and down with biases, two norms
BLOCK = 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
TOWER = 1280 * 3 * 2 * 14 * 14 + 32 * BLOCK + 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584  # patches, blocks, merger


@pytest.fixture
def folder_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_7B))
    return tmp_path


def geo3k(**changes):
    return {"train_llm": True, "train_connector": False, "train_vit": False, "kl_loss_coeff": 0.001, "kl_reward_coeff": 0.0,
            "batch_size": 896, "max_pixels": 1003520, "rollout": "vllm"} | changes


def test_7b_by_hand(folder_7b):
    p = plan(geo3k(), AutoConfig.from_pretrained(folder_7b), 7, 2)
    assert LLM == 7_615_616_512 and TOWER == 676_550_144  # 8.29 billion together, as the model's page says
    assert (p.trained, p.frozen) == (LLM, TOWER)
    # 3584 = 7 * 512, 18944 = 7 * 2706.3, 512 = 7 * 73.1 and 152064 = 7 * 21723.4: the first rank's shards are a little larger
    chunk = {n: math.ceil(n / 7) for n in (3584, 18944, 512, 152064)}
    layer = (2 * chunk[3584] * 3584 + 2 * chunk[512] * 3584 + chunk[3584] + 2 * chunk[512]
             + 2 * chunk[18944] * 3584 + chunk[3584] * 18944 + 2 * chunk[3584])
    elements = 2 * chunk[152064] * 3584 + 28 * layer + chunk[3584]
    assert p.weights == p.gradients == 4 * elements and p.optimizer == 8 * elements and p.reference == 2 * elements
    assert p.tower == 2 * TOWER and p.engine == 0
    assert p.features == 2 * 128 * 1280 * 3584  # 128 rows, 1280 tokens each at most, bfloat16
    assert p.gathered == (2 * 2 + 4) * (LAYER + 2 * EMBEDDING + 3584)


def test_frozen_parts_and_missing_reference_change_the_plan(folder_7b):
    config = AutoConfig.from_pretrained(folder_7b)
    p = plan(geo3k(train_llm=False, train_connector=True, kl_loss_coeff=0.0, rollout="hf"), config, 1, 4)
    merger = 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    assert (p.trained, p.frozen) == (merger, LLM + TOWER - merger)
    assert p.gradients == 4 * merger and p.reference == 0 and p.tower == 0
    assert p.weights == p.engine == 4 * (LLM + TOWER)


def test_first_shard_is_the_largest(tiny_model_dir):
    parameters = list(on_meta(AutoConfig.from_pretrained(tiny_model_dir)).parameters())
    assert shard(parameters, 1) == sum(p.numel() for p in parameters)
    assert shard(parameters, 7) == sum(math.ceil(p.shape[0] / 7) * p[0].numel() for p in parameters)


def test_command_prints_the_paper_s_arithmetic_without_data_or_weights(folder_7b):
    command = [sys.executable, "train_rl.py", "config/geo3k.py", "--dry_run=True", f"--model={folder_7b}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"WORLD_SIZE": "7"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("7,615,616,512 trained, 676,550,144 frozen", "2101 // 896 = 2 steps an epoch, 100 steps in all",
                  "896 responses, 128 on each rank; 32 updates of 28 responses, 4 on each rank"):
        assert words in done.stdout, done.stdout

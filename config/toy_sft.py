"""The toy's baseline: SFT of the same base on written solutions of the same problems, as many updates as RL.

    python train_sft.py config/toy_sft.py

2 CPU cores: 4 minutes. Expect, validation, pass@1: T=0.6 25 -> 94 percent, T=0.01 24 -> 93 (results/toy.md).
"""
out_dir = "out/toy_sft"
model = "toy/base"
train_data = "data/toy/train.jsonl"
val_data = "data/toy/val.jsonl"
test_data = "data/toy/test.jsonl"
rollout = "hf"
batch_size = 64  # 4096 / 64 = 64 updates an epoch
epochs = 2  # 2 x 64 = 128 updates, as in config/toy.py
max_new_tokens = 96
max_prompt_tokens = 1024
max_pixels = 64 * 28 * 28  # 64 image tokens; the toy's own pictures have 9
max_tokens_per_microbatch = 4096
learning_rate = 1e-4
adam_eps = 1e-8
weight_decay = 0.0
activation_checkpointing = False

"""GRPO on the toy: groups of 8 responses to a problem, as many responses a step and updates as config/toy.py.

    python train_rl.py config/toy_grpo.py

2 CPU cores: some 5 minutes, half of it evaluation. Expect, validation, pass@1: T=0.6 25 -> 92 percent,
T=0.01 24 -> 92 (results/methods.md).
"""
out_dir = "out/toy_grpo"
model = "toy/base"
train_data = "data/toy/train.jsonl"
val_data = "data/toy/val.jsonl"
test_data = "data/toy/test.jsonl"
rollout = "hf"
advantage = "grpo"
batch_size = 32  # queries; 4096 // 32 = 128 steps an epoch
samples_per_query = 8  # 32 x 8 = 256 responses a step
minibatch_size = 64  # responses, 8 groups; 256 / 64 = 4 updates a step
max_steps = 24  # 24 x 256 = 6,144 responses, 96 updates
eval_every_epochs = 0.0625  # every 8 of 128 steps
max_new_tokens = 96
max_prompt_tokens = 1024
max_pixels = 64 * 28 * 28  # 64 image tokens; the toy's own pictures have 9
old_logprobs_from = "engine"  # the same model in float32: each step's first update compares them with its own
max_tokens_per_microbatch = 2048  # what a layer works on then stays in a CPU's caches
learning_rate = 1e-4
adam_eps = 1e-8
weight_decay = 0.0
activation_checkpointing = False

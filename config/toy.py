"""The toy: RL of the committed base model on drawn geometry problems, on a laptop.

    python train_rl.py config/toy.py                              # one process
    torchrun --nproc_per_node=2 train_rl.py config/toy.py         # the same samples

2 CPU cores: some 5 minutes, a third of it evaluation. Expect, validation (number tuples that no training has
shown), pass@1: T=0.6 25 -> 92 percent, T=0.01 24 -> 93; responses of 19 tokens become 46 (results/toy.md).
"""
out_dir = "out/toy"
model = "toy/base"
train_data = "data/toy/train.jsonl"
val_data = "data/toy/val.jsonl"
test_data = "data/toy/test.jsonl"
rollout = "hf"
batch_size = 256  # queries, one response each; 4096 // 256 = 16 steps an epoch
minibatch_size = 64  # responses; 256 / 64 = 4 updates a step
epochs = 2  # 2 x 16 = 32 steps = 128 updates
max_new_tokens = 96
max_prompt_tokens = 1024
max_pixels = 64 * 28 * 28  # 64 image tokens; the toy's own pictures have 9
old_logprobs_from = "engine"  # the same model in float32: each step's first update compares them with its own
max_tokens_per_microbatch = 2048  # what a layer works on then stays in a CPU's caches
learning_rate = 1e-4
adam_eps = 1e-8
weight_decay = 0.0
activation_checkpointing = False

r"""GRPO on Geometry3K, 5 responses to a problem, in the shape of EasyR1's example for this data.

    python fetch.py geo3k
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=7 train_rl.py config/geo3k_grpo.py    # 8 GPUs of 80 GB; hours not measured

Expect: not known; config/geo3k.py has the paper's figures for the same model and data. From
github.com/hiyouga/EasyR1, examples/config.yaml: group, learning rate, KL, token mean, 512 problems a step,
128 an update, 15 epochs, clip-higher. Not from it: its constant rate (ours falls to 0), dual clip, top_p
0.99, trained tower, AdamW's betas, prompt, format reward.
"""
out_dir = "out/geo3k_grpo"
model = "Qwen/Qwen2.5-VL-7B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
advantage = "grpo"
batch_size = 7 * 72  # queries: 504 (theirs: 512, no multiple of 7 ranks); 2101 // 504 = 4 steps an epoch
samples_per_query = 5  # 504 x 5 = 2520 responses a step
minibatch_size = 7 * 18 * 5  # responses: 126 queries x 5 = 630; 2520 / 630 = 4 updates a step
epochs = 15  # 4 x 15 = 60 steps, 240 updates
clip_high = 0.3  # clip_low stays 0.2
loss_agg = "token_mean"
kl_loss_coeff = 0.01
no_eos_score = 0.0  # as language, below: a group's deviation would make a small difference a large advantage
language_reward_coeff = 0.0
learning_rate = 1e-6
warmup_ratio = 0.0
eval_every_epochs = 5

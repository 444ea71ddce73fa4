r"""DAPO's objective on Geometry3K (arXiv 2503.14476): token mean, no KL, clip-higher, unfinished ones masked.

    python fetch.py geo3k
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=7 train_rl.py config/geo3k_dapo.py    # 8 GPUs of 80 GB; hours not measured

Expect: not known; config/geo3k.py has the paper's figures for the same model and data. Not here: dynamic
sampling, which draws anew for groups of equal scores (they are exactly 0 here, and counted in
train/groups_without_signal), the soft penalty of long responses, its 20,480 tokens, its constant rate (ours
falls to 0) and its means group by group (ours are over the update's tokens). No reference is loaded.
"""
out_dir = "out/geo3k_dapo"
model = "Qwen/Qwen2.5-VL-7B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
advantage = "grpo"
batch_size = 7 * 64  # queries: 448 (theirs: 512, no multiple of 7 ranks); 2101 // 448 = 4 steps an epoch
samples_per_query = 16  # 448 x 16 = 7168 responses a step
minibatch_size = 7 * 4 * 16  # responses: 28 queries x 16 = 448; 7168 / 448 = 16 updates a step, as theirs
epochs = 15  # 4 x 15 = 60 steps, 960 updates
clip_high = 0.28  # clip_low stays 0.2
loss_agg = "token_mean"
kl_loss_coeff = 0.0
no_eos_score = 0.0  # scored like any other in its group,
mask_unfinished = True  # but out of the loss
language_reward_coeff = 0.0
learning_rate = 1e-6
eval_every_epochs = 5

r"""GSPO on Geometry3K (arXiv 2507.18071): the ratio of whole responses, within bounds a thousandth of PPO's.

    python fetch.py geo3k
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=7 train_rl.py config/geo3k_gspo.py    # 8 GPUs of 80 GB; hours not measured

Expect: not known; config/geo3k.py has the paper's figures for the same model and data. Bounds and 4 updates a
step are section 5.1's; batch, group and learning rate, which it does not give, config/geo3k_grpo.py's. In
bfloat16 a forward's own noise may reach bounds so narrow (not measured): see that few tokens are clipped.
"""
out_dir = "out/geo3k_gspo"
model = "Qwen/Qwen2.5-VL-7B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
advantage = "grpo"
ratio = "sequence"
clip_low = 3e-4
clip_high = 4e-4  # on the toy these clip 60% of the tokens of the first steps, by design
batch_size = 7 * 72  # queries: 504; 2101 // 504 = 4 steps an epoch
samples_per_query = 5  # 504 x 5 = 2520 responses a step
minibatch_size = 7 * 18 * 5  # responses: 126 queries x 5 = 630; 2520 / 630 = 4 updates a step
epochs = 15  # 4 x 15 = 60 steps, 240 updates
kl_loss_coeff = 0.0
no_eos_score = 0.0
language_reward_coeff = 0.0
learning_rate = 1e-6
warmup_ratio = 0.0
eval_every_epochs = 5

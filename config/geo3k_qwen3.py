r"""The paper's recipe on Geometry3K with Qwen3-VL-4B, the language model only.

    python fetch.py geo3k
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=7 train_rl.py config/geo3k_qwen3.py   # 8 GPUs of 80 GB; not run here

Expect: not known; the paper has no figures for this model. One GPU: config/geo3k_qwen3_4b_80gb.py.
"""
out_dir = "out/geo3k_qwen3"
model = "Qwen/Qwen3-VL-4B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
min_pixels = 64 * 32 * 32  # the model's own least; an image token is 32 pixels a side: 64 tokens
max_pixels = 1024 * 32 * 32  # 1024 image tokens
batch_size = 7 * 128  # queries: 128 x 7 ranks = 896 a step, one response each; 2101 // 896 = 2 steps an epoch
minibatch_size = 7 * 4  # responses: 4 x 7 ranks; 896 / 28 = 32 updates a step
epochs = 50  # 2 x 50 = 100 generation steps
eval_every_epochs = 5

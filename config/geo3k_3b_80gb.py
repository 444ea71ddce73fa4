r"""Geometry3K with Qwen2.5-VL-3B on one GPU of 80 GB, all of the language model trained; vLLM shares the GPU.

    python fetch.py geo3k
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python train_rl.py config/geo3k_3b_80gb.py
    python -m bench.plan config/geo3k_3b_80gb.py --gpus=1

By the last line, of 80 GB: 65 in an update (12 weights, 12 gradients, 25 moments, 6 reference), 70 while
vLLM samples (16 of them for its cache: at most 443,000 tokens). Not run here; hours and accuracy are not
known.
"""
out_dir = "out/geo3k_3b_80gb"
model = "Qwen/Qwen2.5-VL-3B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
gpu_memory_utilization = 0.3  # vLLM's share of the GPU while it samples: 24 GB, 7.5 of them weights
batch_size = 256  # queries of a step; 2101 // 256 = 8 steps an epoch
minibatch_size = 32  # responses; 256 / 32 = 8 updates a step
epochs = 15  # 8 x 15 = 120 steps
max_tokens_per_microbatch = 8192
eval_every_epochs = 5

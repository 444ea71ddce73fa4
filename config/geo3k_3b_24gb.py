r"""Geometry3K with Qwen2.5-VL-3B on one GPU of 24 GB: LoRA; vLLM shares the GPU.

    python fetch.py geo3k
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python train_rl.py config/geo3k_3b_24gb.py
    python -m bench.plan config/geo3k_3b_24gb.py --gpus=1 --gpu_gb=24

By the last line, of 24 GB: 14 in an update (6 frozen weights, 1 for adapters, their gradients and moments),
21 while vLLM samples (4 of them for its cache and activations: at most 118,000 tokens); of the host's memory
16. Not run here; hours and accuracy are not known.
"""
out_dir = "out/geo3k_3b_24gb"
model = "Qwen/Qwen2.5-VL-3B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
lora_rank = 32
learning_rate = 5e-5  # ten times that of full training (thinkingmachines.ai/blog/lora); not tried here
adam_eps = 1e-8  # as on the toy, where LoRA was tried
gpu_memory_utilization = 0.5  # vLLM's share of the GPU while it samples: 12 GB, 7.5 of them weights
batch_size = 128  # queries of a step; 2101 // 128 = 16 steps an epoch
minibatch_size = 32  # responses; 128 / 32 = 4 updates a step
epochs = 8  # 16 x 8 = 128 steps
max_tokens_per_microbatch = 8192
eval_every_epochs = 4

r"""Geometry3K with Qwen3-VL-4B on one GPU of 80 GB: LoRA; vLLM shares the GPU.

    python fetch.py geo3k
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python train_rl.py config/geo3k_qwen3_4b_80gb.py
    python -m bench.plan config/geo3k_qwen3_4b_80gb.py --gpus=1

By the last line, of 80 GB: 23 in an update (8 frozen weights, 1 for adapters, their gradients and moments),
55 while vLLM samples (31 of them for its cache: at most 207,000 tokens). --lora_rank=0 would need 89 in an
update: three GPUs (--nproc=2). Not run here; hours and accuracy are not known.
"""
out_dir = "out/geo3k_qwen3_4b_80gb"
model = "Qwen/Qwen3-VL-4B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
min_pixels = 64 * 32 * 32  # the model's own least; an image token is 32 pixels a side: 64 tokens
max_pixels = 1024 * 32 * 32  # 1024 image tokens
lora_rank = 32
learning_rate = 5e-5  # ten times that of full training (thinkingmachines.ai/blog/lora); not tried here
adam_eps = 1e-8  # as on the toy, where LoRA was tried
gpu_memory_utilization = 0.5  # vLLM's share of the GPU while it samples: 40 GB, 9 of them weights
batch_size = 256  # queries of a step; 2101 // 256 = 8 steps an epoch
minibatch_size = 32  # responses; 256 / 32 = 8 updates a step
epochs = 15  # 8 x 15 = 120 steps
eval_every_epochs = 5

r"""The paper's SFT baseline on mm_math5k's golden solutions, Qwen2-VL-7B.

    python fetch.py mm_math
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=8 train_sft.py config/mm_math_sft.py --rollout=hf     # 8 GPUs of 80 GB
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=4 train_sft.py config/mm_math_sft.py  # 4 train, the fifth samples

Hours: not measured. Expect, test set, mean over epochs: pass@8 25.2, T=0.6 8.7, T=0.01 9.6 percent, below the
untrained model's 29.0, 11.0, 11.0 (Tab. 3).
"""
out_dir = "out/mm_math_sft"
model = "Qwen/Qwen2-VL-7B-Instruct"
train_data = "data/mm_math5k/mm_math_sft_v0.jsonl"
val_data = "data/mm_math5k/mm_math_validation_v0.jsonl"
test_data = "data/mm_math5k/mm_math_test_v0.jsonl"
epochs = 30  # as many passes as RL makes
batch_size = 16  # 5000 // 16 = 312 updates an epoch

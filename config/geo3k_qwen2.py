"""The paper's run on Geometry3K with Qwen2-VL-7B, which gains the most from it.

    python data.py geo3k
    torchrun --nproc_per_node=7 train_rl.py config/geo3k.py config/geo3k_qwen2.py     # 8 GPUs of 80 GB; hours not measured

Read after config/geo3k.py: only the model and the folder differ. Expect, test set, mean over epochs of three runs: pass@8
58.0, T=0.6 30.3, T=0.01 31.1 percent; the untrained model 46.6, 20.3, 23.1 (Tab. 3).
"""
out_dir = "out/geo3k_qwen2"
model = "Qwen/Qwen2-VL-7B-Instruct"

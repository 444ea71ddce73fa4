r"""The paper's run on Geometry3K: Qwen2.5-VL-7B, Reinforce++, the language model only (MAYE, appendix A).

    python fetch.py geo3k                                   # once: 2101 / 300 / 601 problems
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=7 train_rl.py config/geo3k.py    # 8 GPUs of 80 GB: 7 train, the 8th samples

Hours: not measured by us (the paper gives none). Expect, test set, mean over epochs of three runs: pass@8
69.3, T=0.6 41.5, T=0.01 42.0 percent; the untrained model 69.4, 38.6, 40.6 (Tab. 3).
"""
out_dir = "out/geo3k"
model = "Qwen/Qwen2.5-VL-7B-Instruct"
train_data = "data/geometry3k/geometry3k_rl_v0.jsonl"
val_data = "data/geometry3k/geometry3k_validation_v0.jsonl"
test_data = "data/geometry3k/geometry3k_test_v0.jsonl"
batch_size = 7 * 128  # queries: 128 x 7 ranks = 896 a step, one response each; 2101 // 896 = 2 steps an epoch
minibatch_size = 7 * 4  # responses: 4 x 7 ranks; 896 / 28 = 32 updates a step
epochs = 50  # 2 x 50 = 100 generation steps (appendix A swaps the epochs of its two data sets)
eval_every_epochs = 5  # paper: 1; but one GPU samples 901 x 10 responses for longer than two steps take

r"""The paper's run on mm_math5k: Qwen2-VL-7B, Reinforce++, language model only; out-of-distribution test set.

    python fetch.py mm_math                                 # once: 5000 / 100 / 100 problems
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        torchrun --nproc_per_node=7 train_rl.py config/mm_math.py      # 8 GPUs of 80 GB; hours not measured

Expect, test set, mean over epochs of three runs: pass@8 35.2, T=0.6 14.1, T=0.01 14.1 percent; the untrained
model 29.0, 11.0, 11.0 (Tab. 3).
"""
out_dir = "out/mm_math"
model = "Qwen/Qwen2-VL-7B-Instruct"
train_data = "data/mm_math5k/mm_math_rl_v0.jsonl"
val_data = "data/mm_math5k/mm_math_validation_v0.jsonl"
test_data = "data/mm_math5k/mm_math_test_v0.jsonl"
batch_size = 7 * 128  # queries: 128 x 7 ranks = 896 a step, one response each; 5000 // 896 = 5 steps an epoch
minibatch_size = 7 * 4  # responses: 4 x 7 ranks; 896 / 28 = 32 updates a step
epochs = 30  # 5 x 30 = 150 generation steps
eval_every_epochs = 5  # paper: 1; an evaluation samples 200 problems x 10 responses, as many as two steps

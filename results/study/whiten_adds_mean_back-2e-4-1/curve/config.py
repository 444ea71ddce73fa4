# argv: ['evaluate.py', '--ckpt=out/study/whiten_adds_mean_back-2e-4-1/checkpoints/step_000016,out/study/whiten_adds_mean_back-2e-4-1/checkpoints/step_000032,', '--data=data/toy/val.jsonl,data/toy/test.jsonl,data/toy/hard.jsonl', '--settings=pass@1 T=0.6, pass@1 T=0.01 top_p=0.001', '--out_dir=out/study/whiten_adds_mean_back-2e-4-1/curve.partial', '--rollout=hf', '--max_new_tokens=96']
# commit: 'b289100'
# torch 2.13.0+cpu
# transformers 5.19.0
ckpt = 'out/study/whiten_adds_mean_back-2e-4-1/checkpoints/step_000016,out/study/whiten_adds_mean_back-2e-4-1/checkpoints/step_000032,'
data = 'data/toy/val.jsonl,data/toy/test.jsonl,data/toy/hard.jsonl'
settings = 'pass@1 T=0.6, pass@1 T=0.01 top_p=0.001'
samples_per_problem = 0
out_dir = 'out/study/whiten_adds_mean_back-2e-4-1/curve.partial'
seed = 0
rollout = 'hf'
max_new_tokens = 96
max_prompt_tokens = 2048
min_pixels = 3136
max_pixels = 1003520
gpu_memory_utilization = 0.8
dtype = 'auto'

# argv: ['evaluate.py', '--ckpt=out/study/sft_rl-2e-4-2/checkpoints/latest', '--data=data/toy/val.jsonl,data/toy/test.jsonl,data/toy/hard.jsonl', '--settings=pass@1/2/4/8/16 T=1', '--out_dir=out/study/sft_rl-2e-4-2/passk.partial', '--rollout=hf', '--max_new_tokens=96']
# commit: 'b289100'
# torch 2.13.0+cpu
# transformers 5.19.0
ckpt = 'out/study/sft_rl-2e-4-2/checkpoints/latest'
data = 'data/toy/val.jsonl,data/toy/test.jsonl,data/toy/hard.jsonl'
settings = 'pass@1/2/4/8/16 T=1'
samples_per_problem = 0
out_dir = 'out/study/sft_rl-2e-4-2/passk.partial'
seed = 0
rollout = 'hf'
max_new_tokens = 96
max_prompt_tokens = 2048
min_pixels = 3136
max_pixels = 1003520
gpu_memory_utilization = 0.8
dtype = 'auto'

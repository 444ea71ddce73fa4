# argv: ['evaluate.py', '--ckpt=out/study/text_sft-2e-4-0/checkpoints/step_000064,out/study/text_sft-2e-4-0/checkpoints/step_000128,', '--data=data/toy/text_val.jsonl,data/toy/text_test.jsonl,data/toy/text_hard.jsonl', '--settings=pass@1 T=0.6, pass@1 T=0.01 top_p=0.001', '--out_dir=out/study/text_sft-2e-4-0/curve.partial', '--rollout=hf', '--max_new_tokens=96']
# commit: 'b289100'
# torch 2.13.0+cpu
# transformers 5.19.0
ckpt = 'out/study/text_sft-2e-4-0/checkpoints/step_000064,out/study/text_sft-2e-4-0/checkpoints/step_000128,'
data = 'data/toy/text_val.jsonl,data/toy/text_test.jsonl,data/toy/text_hard.jsonl'
settings = 'pass@1 T=0.6, pass@1 T=0.01 top_p=0.001'
samples_per_problem = 0
out_dir = 'out/study/text_sft-2e-4-0/curve.partial'
seed = 0
rollout = 'hf'
max_new_tokens = 96
max_prompt_tokens = 2048
min_pixels = 3136
max_pixels = 1003520
gpu_memory_utilization = 0.8
dtype = 'auto'

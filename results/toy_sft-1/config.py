# argv: ['train_sft.py', 'config/toy_sft.py', '--seed=1', '--out_dir=out/toy_sft-1']
# processes: 1
# versions: python 3.11.7, torch 2.13.0+cpu, transformers 5.19.0, vllm not installed
# git commit: 8c1b142477c79831b2ee39ed533a04444c664b78

out_dir = 'out/toy_sft-1'
seed = 1
model = 'toy_base'
train_data = 'data/toy/train.jsonl'
val_data = 'data/toy/val.jsonl'
test_data = 'data/toy/test.jsonl'
min_pixels = 3136
max_pixels = 50176
max_prompt_tokens = 1024
epochs = 2
max_steps = 0
batch_size = 64
max_tokens_per_microbatch = 4096
learning_rate = 0.0001
warmup_ratio = 0.1
adam_beta1 = 0.9
adam_beta2 = 0.95
adam_eps = 1e-08
weight_decay = 0.0
clip_grad_norm = 1.0
train_llm = True
train_connector = False
train_vit = False
dtype = 'auto'
activation_checkpointing = False
rollout = 'hf'
max_new_tokens = 96
gpu_memory_utilization = 0.8
eval_every_epochs = 1
save_every_steps = 0
save_every_minutes = 0
keep_checkpoints = 3
init_from = 'pretrained'
overwrite = False
save_dtype = 'auto'
save_samples = 16
logger = 'none'
max_skipped_updates = 8
timeout_minutes = 120.0
log_every = 8

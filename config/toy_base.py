r"""How toy_base/, the toy's base model, was made from random weights: three stages, 12 minutes on 2 CPU cores.

    python toy.py base                                            # the stages' data and the random weights
    python train_sft.py config/toy_base.py                        # 1: read the numbers, compute
    python train_sft.py config/toy_base.py --model=out/toy_base/checkpoints/latest --out_dir=out/toy_base_2 \
        --train_data=data/toy_base/base_2_solve.jsonl --max_steps=384                 # 2: solve step by step, and check
    python train_sft.py config/toy_base.py --model=out/toy_base_2/checkpoints/latest --out_dir=out/toy_base_3 \
        --train_data=data/toy_base/base_3_habit.jsonl --max_steps=96 --learning_rate=5e-4 --save_dtype=bfloat16   # 3: guess

Expect losses of 0.016, 0.019 and 0.134 at the end of the stages; out/toy_base_3/checkpoints/latest is the model.
"""
out_dir = "out/toy_base"
model = "data/toy_base/init"
train_data = "data/toy_base/base_1_read.jsonl"
rollout = "hf"
max_steps = 480
batch_size = 64
max_tokens_per_microbatch = 2048
learning_rate = 2e-3
adam_eps = 1e-8
train_connector = True
train_vit = True
activation_checkpointing = False
eval_every_epochs = 0
log_every = 10

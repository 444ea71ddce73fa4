r"""How toy/base, the toy's base model, was made from random weights: three stages, 12 minutes on 2 CPU cores.

    python -m toy.make_base                             # the stages' data and the random weights
    python train_sft.py config/toy_base.py              # 1: read the numbers, compute
    python train_sft.py config/toy_base.py --out_dir=out/toy_base_2 --model=out/toy_base/checkpoints/latest \
        --train_data=data/toy_base/base_2_solve.jsonl --max_steps=384       # 2: solve step by step, and check
    python train_sft.py config/toy_base.py --out_dir=out/toy_base_3 --max_steps=96 --learning_rate=5e-4 \
        --model=out/toy_base_2/checkpoints/latest --train_data=data/toy_base/base_3_habit.jsonl \
        --save_dtype=bfloat16                                               # 3: guess

Expect losses of 0.016, 0.019 and 0.134 at the end of the stages. out/toy_base_3/checkpoints/latest is
the model, in half precision by the last command's save_dtype (2.3 MB); stages 1 and 2 hand on their float32.
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

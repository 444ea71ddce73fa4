#!/bin/bash
# The study of methods on the toy: bash results/methods/run.sh [OUT]. 2 CPU cores, two runs beside each other,
# some two hours. A run that was broken off begins anew when this is called again.
#   sweep: seed 0 of each method with each of three learning rates; seeds: 1 and 2 with the best of them;
#   groups: Reinforce++ on the batches of the group methods, 32 problems 8 times, at the rate of its 256 problems;
#   stale: Reinforce++ with an engine that gets the weights every fourth step, at that rate as well;
#   final: the paper's settings, validation and test, on the last weights.
# Each run: 24 steps of 256 responses, 4 updates a step; evaluated every 4 steps (of config/toy.py: every quarter
# epoch), and at the start, where things happen, more often.
set -eu -o pipefail
export OUT=${1:-out/methods} OMP_NUM_THREADS=1
STEPS="1 2 3 4 6 8 12 16 20 24"
export STEPS

knobs() {
    local group="--batch_size=32 --samples_per_query=8"
    case $1 in
        reinforce++) ;;
        reinforce++_groups) echo "$group" ;;
        reinforce++_baseline) echo "$group --advantage=reinforce++_baseline" ;;
        grpo) echo "$group --advantage=grpo" ;;
        dr_grpo) echo "$group --advantage=dr_grpo --loss_agg=constant" ;;
        rloo) echo "$group --advantage=rloo --loss_agg=constant" ;;
        gspo) echo "$group --advantage=grpo --ratio=sequence --clip_low=3e-4 --clip_high=4e-4" ;;
        cispo) echo "$group --advantage=grpo --ratio=cispo --loss_agg=token_mean --clip_low=1 --clip_high=4" ;;
        stale_*) echo "--old_logprobs_from=trainer --correction=${1#stale_}" ;;
    esac
}

evaluated() {  # CKPT DATA OUT [SETTINGS]: OUT is there once it is whole
    python evaluate.py --ckpt="$1" --data="$2" --out_dir="$3.partial" --rollout=hf --max_new_tokens=96 \
        ${4:+--settings="$4"}
    mv "$3.partial" "$3"
}

train() {  # METHOD LEARNING_RATE SEED
    local run=$OUT/$1-$2-$3 script=train_rl.py
    [ ! -e "$run/curve" ] || return 0
    rm -rf "$run"
    [[ $1 != stale_* ]] || script=train_stale.py
    python $script config/toy.py $(knobs "$1") --learning_rate="$2" --seed="$3" --out_dir="$run" --max_steps=24 \
        --eval_every_epochs=0 --save_every_steps=1 --keep_checkpoints=0 > "$run.log" 2>&1
    evaluated "$(printf "$run/checkpoints/step_%06d," $STEPS)" data/toy/val.jsonl "$run/curve" "pass@1 T=0.6" \
        >> "$run.log" 2>&1
    find "$run/checkpoints" -name "step_*" ! -name step_000024 -prune -exec rm -r {} +
}

final() {  # RUN
    [ -e "$1/final" ] || evaluated "$1/checkpoints/step_000024" data/toy/val.jsonl,data/toy/test.jsonl \
        "$1/final" >> "$1.log" 2>&1
}

each() {  # FUNCTION: for each line of arguments, two at a time
    xargs -P 2 -L 1 bash -eu -c "$1"' "$@"' -
}

best() {  # METHOD: the learning rate whose seed 0 has the best mean over the six quarter epochs
    python - "$OUT/$1" <<'END'
import glob, json, statistics, sys
runs = sorted(glob.glob(f"{sys.argv[1]}-*-0/curve/eval.jsonl"))
rows = {run: [json.loads(line) for line in open(run)] for run in runs}
mean = {run: statistics.mean(row["accuracy"] for row in rows[run] if row["step"] % 4 == 0) for run in runs}
print(max(mean, key=mean.get).removeprefix(f"{sys.argv[1]}-").removesuffix("-0/curve/eval.jsonl"))
END
}
export -f knobs evaluated train final best

mkdir -p "$OUT"
[ -e data/toy/val.jsonl ] || python -m toy.draw
trap 'rm -f train_stale.py' EXIT  # a fork of one line
sed 's/^        if not in_flight:$/        if not in_flight and step % 4 == 0:/' train_rl.py > train_stale.py
cmp -s train_rl.py train_stale.py && { echo "train_rl.py has changed: correct the line above"; exit 1; }

methods="reinforce++ reinforce++_baseline grpo dr_grpo rloo gspo cispo"
for rate in 1e-4 2e-4 5e-5; do for method in $methods; do echo "$method $rate 0"; done; done | each train
for method in $methods; do
    rate=$(best "$method")
    for seed in 1 2; do echo "$method $rate $seed"; done
done | each train
rate=$(best reinforce++)
for seed in 0 1 2; do
    for method in reinforce++_groups stale_none stale_truncate stale_mask; do echo "$method $rate $seed"; done
done | each train
for run in "$OUT"/*-2; do for seed in 0 1 2; do echo "${run%2}$seed"; done; done | each final

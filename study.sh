#!/usr/bin/env bash
# The paper's questions on the toy: does RL beat SFT, in and out of distribution, and what does each departure change?
#
#     bash study.sh [OUT]      # out/study, of the repository; 2 CPU cores, two runs side by side, some 2 hours
#
# Broken off, it goes on when it is called again: a trainer that got Ctrl-C ends its step and leaves a checkpoint, and a
# new call waits for it. Every run makes two passes over the same 4,096 problems. Its folder is METHOD-RATE-SEED: curve/
# has the accuracies after each pass, passk/ pass@k of the last weights, on validation, test (new families) and hard
# (those with larger numbers). The answers are in results/study.md.
#   rates   RL and SFT from toy/base at three learning rates, seed 0, on both variants of the toy (text_: the numbers
#           stand in the question too); all other runs take the rate that is best on validation
#   seeds   five of RL and of SFT; three of sft_rl: RL from those SFT models, which makes four passes in all
#   forks   three seeds of each patch in forks/, at RL's rate; the runs of RL are what they are compared with. A patch
#           of your own is run with the others; one that you edit is run again after rm -r OUT/NAME-*
set -euo pipefail
cd "$(dirname "$0")"
export OUT=${1:-out/study} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
OUT=${OUT%/}

evaluated() {  # METHOD CHECKPOINTS SETTINGS TO: on METHOD's variant of the toy; TO is there once it is whole
    local data=data/toy/
    [[ $1 != text_* ]] || data=data/toy/text_
    python evaluate.py --ckpt="$2" --data="${data}val.jsonl,${data}test.jsonl,${data}hard.jsonl" --settings="$3" \
        --out_dir="$4.partial" --rollout=hf --max_new_tokens=96
    mv "$4.partial" "$4"
}

train() {  # METHOD RATE SEED
    local run=$OUT/$1-$2-$3 model=toy/base data=data/toy/train.jsonl pass=16 command="python train_rl.py config/toy.py"
    case $1 in
        rl) ;;
        text_rl) data=data/toy/text_train.jsonl ;;
        sft) command="python train_sft.py config/toy_sft.py" pass=64 ;;
        text_sft) command="python train_sft.py config/toy_sft.py" pass=64 data=data/toy/text_train.jsonl ;;
        sft_rl) model=$OUT/sft-$(best sft)-$3/checkpoints/latest ;;
        *) command="bash $(sed -n 's/^Command: bash //p' "forks/$1.patch")" ;;
    esac
    $command --model="$model" --train_data="$data" --val_data= --test_data= --learning_rate="$2" --seed="$3" \
        --out_dir="$run" --eval_every_epochs=0 --save_every_steps=$pass --keep_checkpoints=0 --init_from=resume
    evaluated "$1" "$(printf "%s/checkpoints/step_%06d," "$run" $pass "$run" $((2 * pass)))" \
        "pass@1 T=0.6, pass@1 T=0.01 top_p=0.001" "$run/curve"
}

passk() {  # METHOD RATE SEED
    evaluated "$1" "$OUT/$1-$2-$3/checkpoints/latest" "pass@1/2/4/8/16 T=1" "$OUT/$1-$2-$3/passk"
}

base() {  # METHOD: toy/base under all settings
    evaluated "$1" toy/base "pass@1/2/4/8/16 T=1, pass@1 T=0.6, pass@1 T=0.01 top_p=0.001" "$OUT/$1-0/passk"
}

best() {  # METHOD: the rate whose seed 0 has most of validation right after the last pass, both settings together
    python - "$OUT/$1" <<'END'
import glob, json, sys
def right(run):
    rows = [json.loads(line) for line in open(f"{run}/curve/eval.jsonl")]
    last = max(row["step"] for row in rows)
    return sum(row["accuracy"] for row in rows if row["split"] == "validation" and row["step"] == last)
print(max(sorted(glob.glob(f"{sys.argv[1]}-[125]e-[45]-0")), key=right).removeprefix(sys.argv[1] + "-")[:-2])
END
}

count() {  # what is made already
    find "$OUT" -mindepth 2 -maxdepth 2 -name curve -o -mindepth 2 -maxdepth 2 -name passk | wc -l
}

job() {  # NEW COMMAND...: makes the folder OUT/NEW, unless it is there, and says what is left
    [ ! -e "$OUT/$1" ] || return 0
    local log=$OUT/log/${1//\//-} made
    mkdir -p "$OUT/${1%/*}"
    # in a bash of its own, since set -e does not hold to the left of ||
    bash -euo pipefail -c '"$@"' - "${@:2}" > "$log" 2>&1 || { echo "$1 was stopped or failed, see $log"; exit 255; }
    made=$(count)
    echo "$(date +%T) $1 is made, $made of $JOBS; some" \
        "$(((JOBS - made) * ($(date +%s) - STARTED) / (made - MADE) / 60)) minutes left"
}

lines() {  # FUNCTION FOLDER METHOD RATE SEED...: a line for job each
    for seed in "${@:5}"; do echo "$3-$4-$seed/$2 $1 $3 $4 $seed"; done
}

each() {  # runs the lines, two at a time; one that fails ends the study
    xargs -P 2 -L 1 bash -euo pipefail -c 'job "$@"' -
}
export -f evaluated train passk base best count job

mkdir -p "$OUT/log"
exec 9> "$OUT/lock"
! command -v flock > /dev/null || flock 9  # held by all that a call has started, to its end
[ ! -e data/toy ] || [ -e data/toy/hard.jsonl ] || { echo "data/toy is an older one: rm -r data/toy"; exit 2; }
FORKS=$(basename -s .patch forks/*.patch)
STARTED=$(date +%s) MADE=$(count) JOBS=$((31 + 3 * $(wc -w <<< "$FORKS") + 25))  # trained, forks, pass@k
export STARTED MADE JOBS

for rate in 1e-4 2e-4 5e-5; do lines train curve rl $rate 0; lines train curve sft $rate 0; done | each
RL=$(best rl)
SFT=$(best sft)
{ lines train curve rl "$RL" 1 2 3 4; lines train curve sft "$SFT" 1 2 3 4
  lines train curve sft_rl "$RL" 0 1 2; } | each
for fork in $FORKS; do lines train curve "$fork" "$RL" 0 1 2; done | each
for rate in 1e-4 2e-4 5e-5; do lines train curve text_rl $rate 0; lines train curve text_sft $rate 0; done | each
TEXT_RL=$(best text_rl)
TEXT_SFT=$(best text_sft)
{ lines train curve text_rl "$TEXT_RL" 1 2 3 4; lines train curve text_sft "$TEXT_SFT" 1 2 3 4; } | each
{ echo "base-0/passk base base"; echo "text_base-0/passk base text_base"
  for method in "rl $RL" "sft $SFT" "text_rl $TEXT_RL" "text_sft $TEXT_SFT"; do
      lines passk passk $method 0 1 2 3 4
  done
  lines passk passk sft_rl "$RL" 0 1 2; } | each

# what results/study has: the runs without checkpoints, of their samples those of a few problems, and reports
rm -rf "$OUT/kept"
for run in "$OUT"/*-[0-9]; do
    for file in config.py metrics.jsonl samples.jsonl {curve,passk}/{eval,samples}.jsonl; do
        [ -s "$run/$file" ] || continue
        kept=$OUT/kept/${run##*/}/$file
        mkdir -p "${kept%/*}"
        if [[ $file == *samples.jsonl ]]; then grep '"id": "[^"]*37"' "$run/$file" > "$kept" || true
        else cp "$run/$file" "$kept"; fi
    done
done
export PYTHONPATH=$PWD
cd "$OUT/kept"
python -m report --methods {rl,sft}-{5e-5,1e-4,2e-4}-0 --out=rates
python -m report --methods text_{rl,sft}-{5e-5,1e-4,2e-4}-0 --out=text_rates
python -m report --methods rl-$RL-? sft-$SFT-? sft_rl-$RL-? base-0 --out=picture
python -m report --methods text_rl-$TEXT_RL-? text_sft-$TEXT_SFT-? text_base-0 --out=text
python -m report --methods rl-$RL-? $(for fork in $FORKS; do echo $fork-$RL-?; done) --out=forks
python -m report rl-$RL-? --out=seeds

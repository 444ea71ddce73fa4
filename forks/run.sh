#!/usr/bin/env bash
# A fork's run: the root's scripts copied, forks/NAME.patch applied to the copy, its train_rl.py started.
#
#     bash forks/run.sh NAME [config/geo3k.py] [--key=value ...]      # without a config file: config/toy.py
#     LAUNCH="torchrun --nproc_per_node=7" bash forks/run.sh NAME config/geo3k.py
#
# A patch is a `git diff` of the root's scripts below a header: what it asks, source, command, result. It is of RL's
# training: what evaluate.py samples afterwards, and study.sh with it, is sampled by the scripts at the root.
# The copy is out_dir/scripts: runs side by side have an out_dir each anyway, and there one reads what ran.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:-}
if [[ ! -f forks/$name.patch ]]; then
    echo "bash forks/run.sh NAME [flags], NAME one of:" $(basename -s .patch forks/*.patch) >&2
    exit 2
fi
shift
config=config/toy.py
if [[ ${1:-} == *.py ]]; then config=$1; shift; fi
[[ " $*" == *" --out_dir="* ]] || set -- --out_dir="out/$name" "$@"
out_dir=$(printf '%s\n' "$@" | sed -n 's/^--out_dir=//p' | tail -n 1)
rm -rf "${out_dir:?}/scripts"
mkdir -p "$out_dir/scripts"
cp ./*.py "$out_dir/scripts"
patch=$PWD/forks/$name.patch
# from within the copy, and blind to a repository above it, from whose top git would count the paths
(cd "$out_dir/scripts" && GIT_CEILING_DIRECTORIES=$(dirname "$(pwd -P)") git apply "$patch")
# the script's own folder comes first in sys.path; the root is for toy/ alone
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec ${LAUNCH:-python} "$out_dir/scripts/train_rl.py" "$config" "$@"

#!/usr/bin/env bash
# From rows to a table of scores in one call: prepare, train, evaluate, each waiting for the success
# of the one before. From the checkout, on a node that can submit jobs:
#
#   slurm/pipeline.sh 16 PREPARE.yaml RUN.yaml [key=value ...]     # keys of the run recipe
#
# submits the jobs of slurm/prepare.sh, one of slurm/train.sh and one that asks the trained model
# the held-out rows of each dataset. A training that goes back to the queue keeps the last one
# waiting. The first failure cancels what waits for it; the same call again goes on there. The last
# line printed is the last job's number.

# --- Site settings. Options of sbatch for the training and for the evaluation, one process on at
# most one GPU; those of prepare are in slurm/prepare.sh.
: "${PHI3V_TRAIN_SBATCH:=}"      # -N 4 --gpus-per-node=8 --ntasks-per-node=8
: "${PHI3V_EVALUATE_SBATCH:=}"   # --gpus=1 --cpus-per-task=12
# One line of shell to run before the evaluation; the other scripts have their own.
site_setup=:

python=${PHI3V_PYTHON:-.venv/bin/python}

refuse() {
  echo "slurm/pipeline.sh: $1" >&2
  exit 2
}

evaluate() {   # run folder, datasets: what the last job does
  eval "$site_setup"
  set -euo pipefail
  cd "$SLURM_SUBMIT_DIR"   # this script itself runs as a copy in Slurm's spool
  local run=$1 shards
  shift
  for shards in "$@"; do "$python" launch/evaluate.py "$run" --shards "$shards"; done
  exit
}

if [ "${1:-}" = evaluate ]; then
  shift
  evaluate "$@"
fi

set -euo pipefail
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] && [ $# -ge 3 ] ||
  refuse "call it as slurm/pipeline.sh PARTS PREPARE.yaml RUN.yaml [key=value ...], got '$*'"
[ -f launch/train.py ] || refuse "no launch/train.py in $PWD; call it from the checkout"
command -v "$python" >/dev/null ||
  refuse "no python at $python in $PWD; run make setup, or export PHI3V_PYTHON=/path/to/python"

# A mistake in the recipes is told now, not when the training starts. Prints the run's folder and
# its datasets, a line each.
read_recipes='
import sys
from pathlib import Path
from phi3v.config import DatasetConfig, RunConfig, load_recipe
from phi3v.errors import ConfigError
from phi3v.training.ranks import run_command

def main():
    prepared, recipe, *values = sys.argv[1:]
    out = load_recipe(DatasetConfig, Path(prepared), []).out
    cfg = load_recipe(RunConfig, Path(recipe), values)
    if Path(out) not in map(Path, cfg.data.folders):
        raise ConfigError(f"{prepared} prepares {out}, but {recipe} trains on "
                          f"{chr(44).join(cfg.data.folders)}; make out and data.shards the same")
    print(cfg.run.out, *cfg.data.folders, sep="\n")

run_command(main)'
paths=$("$python" -c "$read_recipes" "${@:2}")
mapfile -t paths <<<"$paths"

here=$(dirname "$0")
submit() {   # name, the job before, options; prints the job's number
  sbatch --parsable --kill-on-invalid-dep=yes --export=ALL --job-name="$1" \
    --dependency="afterok:$2" "${@:3}"
}
prepare=$("$here/prepare.sh" "$1" "$2")
# PHI3V_*_SBATCH are lists of words.
# shellcheck disable=SC2086
train=$(submit train "${prepare##*$'\n'}" $PHI3V_TRAIN_SBATCH "$here/train.sh" "${@:3}")
# shellcheck disable=SC2086
scores=$(submit evaluate "$train" $PHI3V_EVALUATE_SBATCH "$0" evaluate "${paths[@]}")
echo "${prepare%$'\n'*}"
echo "train $train, evaluate $scores; the table of scores: slurm-$scores.out"
echo "$scores"

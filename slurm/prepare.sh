#!/usr/bin/env bash
# launch/prepare.py as Slurm job arrays. From the checkout, on a node that can submit jobs:
#
#   slurm/prepare.sh 16 RECIPE.yaml [key=value ...]
#
# submits four jobs, each waiting for the one before: 16 parts of the scan, their merge (which makes
# the split), 16 parts of the write, their merge (which publishes the dataset). The same command
# again goes on where a part failed, was cancelled or ran out of time. The bytes of the dataset do
# not depend on the number of parts. The last line printed is the last job's number, for
# --dependency=afterok of the training.

# --- Site settings. Options of sbatch for every job; a part works on all CPUs of its task.
: "${PHI3V_SBATCH:=--cpus-per-task=8 --time=04:00:00}"   # + --partition=cpu --account=team ...
# One line of shell to run before each part, for example site_setup='module load gcc/12'
site_setup=:

refuse() {
  echo "slurm/prepare.sh: $1" >&2
  exit 2
}

submit() {   # dependency, options; prints the job's number
  local dependency=$1
  shift
  # PHI3V_SBATCH is a list of words.
  # shellcheck disable=SC2086
  sbatch --parsable --requeue --open-mode=append --kill-on-invalid-dep=yes --export=ALL \
    --job-name=prepare ${dependency:+--dependency=afterok:$dependency} $PHI3V_SBATCH "$@"
}

in_job() {   # part or merge, then the arguments of launch/prepare.py
  eval "$site_setup"
  set -euo pipefail
  cd "$SLURM_SUBMIT_DIR"   # this script itself runs as a copy in Slurm's spool
  python=${PHI3V_PYTHON:-.venv/bin/python}
  what=$1
  shift
  step=(--merge)
  if [ "$what" = part ]; then step=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"); fi
  recipe=$1
  shift
  exec "$python" launch/prepare.py "$recipe" "workers=${SLURM_CPUS_PER_TASK:-1}" "$@" "${step[@]}"
}

if [ "${1:-}" = part ] || [ "${1:-}" = merge ]; then in_job "$@"; fi

set -euo pipefail
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] && [ -n "${2:-}" ] ||
  refuse "call it as slurm/prepare.sh PARTS RECIPE.yaml [key=value ...], got '$*'"
parts=$1
shift
[ -f launch/prepare.py ] || refuse "no launch/prepare.py in $PWD; call it from the checkout"
[ -f "$1" ] || refuse "recipe $1 does not exist; name a YAML file, see launch/recipes/"
python=${PHI3V_PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null ||
  refuse "no python at $python in $PWD; run make setup, or export PHI3V_PYTHON=/path/to/python"

script=$0
scan=$(submit "" --array="1-$parts" "$script" part "$@")
split=$(submit "$scan" "$script" merge "$@")
write=$(submit "$split" --array="1-$parts" "$script" part "$@")
last=$(submit "$write" "$script" merge "$@")
echo "scan $scan, split $split, write $write, publish $last; their logs: slurm-*.out"
echo "$last"

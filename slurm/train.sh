#!/usr/bin/env bash
# Training as a Slurm job on any number of nodes. From the checkout, with the arguments of
# launch/train.py behind the script:
#
#   sbatch -N 4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 slurm/train.sh RECIPE.yaml
#   sbatch -N 2 slurm/train.sh RECIPE.yaml                  # CPU nodes, one rank on each
#
# Tasks are ranks: as many per node as GPUs. The job's log follows rank 0; every rank's own is
# slurm-JOB/start-N/rank-R.log. Preempted, near its time limit or after a node's death the job goes
# back to the queue and takes up the same run. The exit code is that of the ranks: 0 done, 2 a
# mistake that its one line explains, 75 stopped after saving and not requeued. See docs/slurm.md.
#SBATCH --job-name=phi3v
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
# USR1 reaches the ranks 90 to 120 s before the time limit (Slurm looks every 30 s), and they save:
# a larger number where a step and a save need more.

# --- Site settings. Partition, account, time limit: as sbatch flags, or lines such as
##SBATCH --partition=gpu --account=team --time=24:00:00
# One line of shell to run on the first node before training, for example
# site_setup='module load gcc/12' or site_setup='source /apps/phi3v/bin/activate'
site_setup=:
# The network between the nodes, where the library does not find it by itself: the interface by
# which ranks meet, and InfiniBand's adapters. NCCL_DEBUG=INFO writes what was chosen.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# Only to find out whether InfiniBand is at fault; everything is then slow:
# export NCCL_IB_DISABLE=1
# In the environment of sbatch: PHI3V_PYTHON (default .venv/bin/python); PHI3V_CONTAINER, an image
# for pyxis (IMAGE.sqsh, or a registry's name) or apptainer (IMAGE.sif), with PHI3V_MOUNTS, further
# folders to be seen in it, parted by commas; PHI3V_REQUEUE=no to end instead of being requeued.
max_idle_starts=4   # as many starts in a row that end at the same step are the job's last

eval "$site_setup"   # before strict mode, which module functions do not survive
set -euo pipefail

say() { echo "slurm/train.sh: $1" >&2; }
refuse() {
  say "$1"
  exit 2
}

cd "$SLURM_SUBMIT_DIR"   # this script itself runs as a copy in Slurm's spool
[ -f launch/train.py ] || refuse "no launch/train.py in $PWD; call sbatch from the checkout"

# The words between srun's own options and the program: srun's for a container, and how to enter it.
python=${PHI3V_PYTHON:-.venv/bin/python}
within=()
container=${PHI3V_CONTAINER:-}
if [ -n "$container" ]; then
  python=${PHI3V_PYTHON:-python3}
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # the checkout; all else is the image's
  if [[ "$container" == *.sif || "$container" == *.sqsh ]]; then
    [ -f "$container" ] || refuse "no image at $container in $PWD; docs/install.md says how to build it"
    container=$(realpath "$container")   # pyxis takes a name without ./ for a registry's
  fi
  mounts=$PWD:$PWD
  for folder in ${PHI3V_MOUNTS//,/ }; do mounts+=,$folder:$folder; done
  if [[ "$container" == *.sif ]]; then
    within=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$container")
  else
    within=("--container-image=$container" "--container-mounts=$mounts" "--container-workdir=$PWD")
  fi
elif ! command -v "$python" >/dev/null; then
  refuse "no python at $python in $PWD; run make setup, or export PHI3V_PYTHON=/path/to/python"
fi

# What srun will start per node: SLURM_TASKS_PER_NODE, "8(x4)", where the job asked for tasks.
# Where it did not, one, whatever that variable says (with --exclusive it counts CPUs).
tasks=1
[ -z "${SLURM_NTASKS:-}" ] || tasks=${SLURM_TASKS_PER_NODE%"(x$SLURM_JOB_NUM_NODES)"}
gpus=${SLURM_GPUS_ON_NODE:-$tasks}   # set only where GPUs were allocated
[ "$tasks" = "$gpus" ] ||
  refuse "$tasks tasks per node but $gpus GPUs per node; call sbatch with --ntasks-per-node=$gpus"

# Rank 0 runs on the first node, as this script does. NodeAddr is the address that Slurm itself uses
# between nodes: a node's name may not resolve, or resolve to 127.0.1.1 on the node itself.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
[ -n "$MASTER_ADDR" ] || refuse "Slurm knows no address of node $first; ask the site's admins"
# The job's own port, or the next one on which nobody listens: another job's, or a rank of this
# job's last start that outlived its node's daemon.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
  MASTER_PORT=$((MASTER_PORT + 1))
done
export MASTER_ADDR MASTER_PORT

# Ranks come from srun, not from the environment that sbatch was called in.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE CROSS_RANK CROSS_SIZE
# Every rank sees all of its node's GPUs and takes the one of its local rank. So no binding of GPUs
# to tasks, by which rank 1 would see one GPU, numbered 0. (--gpu-bind=none would also drop
# CUDA_VISIBLE_DEVICES, and bring other jobs' GPUs into sight.)
unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND
# Since Slurm 22.05 srun does not take over the job's --cpus-per-task by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

job=slurm-$SLURM_JOB_ID
logs=$job/start-${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"
: >>"$logs/rank-0.log"
export PYTHONUNBUFFERED=1   # a line is in its file when it was printed

# The ranks are told to stop by Slurm itself; this script outlives a TERM until they have saved. The
# srun goes into the background because bash hears nothing while it waits for one in the foreground.
trap 'told=yes' TERM USR1
# --export: a job submitted with --export=NONE would keep even MASTER_ADDR from its tasks.
srun --kill-on-bad-exit=1 --export=ALL --open-mode=append --output="$logs/rank-%t.log" \
  "${within[@]}" "$python" launch/train.py "$@" &
ranks=$!
(trap '' TERM USR1 && exec tail --pid="$ranks" -s 0.2 -n +1 -f "$logs/rank-0.log") &
follower=$!
code=0
while told=no; wait "$ranks" || code=$?; [ "$told" = yes ]; do code=0; done
while told=no; wait "$follower" || true; [ "$told" = yes ]; do :; done
[ "$code" != 0 ] || exit 0

# What the other ranks have to say, the first to end first.
if [ "$code" != 75 ]; then
  is_error='^[A-Za-z_.]*(Error|Exception)\b|^Traceback'
  mapfile -t failed < <(cd "$logs" &&
    grep -lE "$is_error" rank-*.log | grep -vx rank-0.log | xargs -r ls -tr | head -n 4)
  for log in "${failed[@]}"; do
    say "the end of $logs/$log:"
    tail -n 20 "$logs/$log" >&2
  done
fi

# Back to the queue, where that helps; a failure of the program's own would only be repeated.
in_slurm() { scontrol show job --oneliner "$SLURM_JOB_ID" | sed "s/.*\b$1=\([^ ]*\).*/\1/"; }
nodes_answer() {
  timeout 60 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true &>/dev/null
}
[ "$(in_slurm JobState)" = RUNNING ] || exit "$code"   # cancelled, or requeued already
reason=
if [ "$(in_slurm PreemptTime)" != None ]; then
  reason=preempted   # Slurm requeues it only at the end of the grace time, if it still runs then
elif [ "$code" = 75 ]; then
  reason="the ranks have saved and stopped"
elif [ "$code" != 2 ] && ! nodes_answer; then
  reason="a node does not answer"   # Slurm itself takes minutes to see it (SlurmdTimeout)
fi
[ -n "$reason" ] || exit "$code"
if [ "${PHI3V_REQUEUE:-yes}" = no ]; then
  say "$reason; not requeued because of PHI3V_REQUEUE=no; submit the same command again to go on"
  exit "$code"
fi

# The step that each start came to, as rank 0 names it last; one that named none came no further.
step=$(grep -oE '\bstep [0-9]+' "$logs/rank-0.log" | tail -n 1) ||
  step=$(tail -n 1 "$job/steps" 2>/dev/null) || step="step 0"
echo "$step" >>"$job/steps"
idle_starts=$(tail -n "$max_idle_starts" "$job/steps" | grep -cx "$step")
if [ "$reason" != preempted ] && [ "$idle_starts" = "$max_idle_starts" ]; then
  say "$reason, but the last $max_idle_starts starts all ended at $step; not requeued; see $job"
  exit "$code"
fi
say "$reason; back to the queue"
scontrol requeue "$SLURM_JOB_ID" ||
  say "Slurm did not requeue job $SLURM_JOB_ID; submit the same command again to go on"
exit "$code"

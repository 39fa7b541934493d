#!/usr/bin/env bash
# Training as a Slurm job on any number of nodes. From the checkout, with the arguments of
# launch/train.py behind the script:
#
#   sbatch -N 4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 slurm/train.sh RECIPE.yaml
#   sbatch -N 2 slurm/train.sh RECIPE.yaml                  # CPU nodes, one rank on each
#
# Tasks are ranks: as many per node as GPUs. The job's exit code is that of the ranks: 0 done, 2 a
# mistake that its one line explains, 75 stopped on request after saving (submit again to go on).
#SBATCH --job-name=phi3v
#SBATCH --open-mode=append

# --- Site settings. Partition, account, time limit: as sbatch flags, or lines such as
##SBATCH --partition=gpu --account=team --time=24:00:00
# One line of shell to run on the first node before training, for example
# site_setup='module load cuda/12.8 gcc/12'
site_setup=:
# The network between the nodes, where the library does not find it by itself:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

eval "$site_setup"   # before strict mode, which module functions do not survive
set -euo pipefail

refuse() {
  echo "slurm/train.sh: $1" >&2
  exit 2
}

cd "$SLURM_SUBMIT_DIR"   # this script itself runs as a copy in Slurm's spool
python=${PHI3V_PYTHON:-.venv/bin/python}
[ -f launch/train.py ] || refuse "no launch/train.py in $PWD; call sbatch from the checkout"
command -v "$python" >/dev/null ||
  refuse "no python at $python in $PWD; run make setup, or export PHI3V_PYTHON=/path/to/python"

# What srun will start per node: SLURM_TASKS_PER_NODE, "8(x4)", where the job asked for tasks.
# Where it did not, one, whatever that variable says (with --exclusive it counts CPUs).
tasks=1
[ -z "${SLURM_NTASKS:-}" ] || tasks=${SLURM_TASKS_PER_NODE%"(x$SLURM_JOB_NUM_NODES)"}
gpus=${SLURM_GPUS_ON_NODE:-$tasks}   # set only where GPUs were allocated
[ "$tasks" = "$gpus" ] ||
  refuse "$tasks tasks per node but $gpus GPUs per node; call sbatch with --ntasks-per-node=$gpus"

# Rank 0 runs on the first node. NodeAddr is the address that Slurm itself uses between nodes: a
# node's name may not resolve, or resolve to 127.0.1.1 on the node itself.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
[ -n "$MASTER_ADDR" ] || refuse "Slurm knows no address of node $first; ask the site's admins"

# Ranks come from srun, not from the environment that sbatch was called in.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE CROSS_RANK CROSS_SIZE
# Every rank sees all of its node's GPUs and takes the one of its local rank. So no binding of GPUs
# to tasks, by which rank 1 would see one GPU, numbered 0. (--gpu-bind=none would also drop
# CUDA_VISIBLE_DEVICES, and bring other jobs' GPUs into sight.)
unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND
# Since Slurm 22.05 srun does not take over the job's --cpus-per-task by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# --export: a job submitted with --export=NONE would keep even MASTER_ADDR from its tasks.
srun --kill-on-bad-exit=1 --export=ALL "$python" launch/train.py "$@"

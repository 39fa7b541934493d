#!/usr/bin/env bash
# A real Slurm of two nodes on this one machine: two slurmd, told apart by their ports.
#
#   cluster.sh up DIR         start it in DIR, and wait until both nodes are idle (about 2 s)
#   cluster.sh up DIR hosts   the same on two hosts of hosts.sh, whose cables can be cut
#   cluster.sh kill DIR NODE  end a node's daemon and all that it started at once, by SIGKILL
#   cluster.sh start DIR NODE start its daemon again
#   cluster.sh down DIR       end its jobs and its daemons; then no process of it is left
#
# In between, with SLURM_CONF=DIR/slurm.conf, sbatch and all other commands speak to it. Needs root
# and apt-get install slurm-wlm munge. Everything is in DIR, munge's key and socket included, and
# the ports are drawn: several clusters can be up at once. Each node has 2 CPUs, whatever is below
# them, and 2 GPUs, which are null devices: allocated and counted as real ones, but of no use. Jobs
# of partition "urgent" preempt those of the default partition by requeue, with 10 s of grace.
set -euo pipefail
command=${1:?up, down, kill or start}
dir=$(realpath -m "${2:?a folder of its own}")
hosts=$(dirname "$(realpath "$0")")/hosts.sh
conf=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

free_port() {   # below the ports that the kernel gives out, beside those of slurm/train.sh
  local port
  while port=$(shuf -i 10000-19999 -n 1); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

write_conf() {
  local host address=127.0.0.1 addresses=(127.0.0.1 127.0.0.1) patience=60
  host=$(hostname -s)
  if [ -e "$dir/network" ]; then
    address=10.99.$(<"$dir/network").1
    addresses=("${address}1" "${address}2")
    patience=9
  fi
  cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$host($address)
SlurmctldPort=$(free_port)
# Job ids give the ports of training: random, so that two clusters' jobs do not meet
FirstJobId=$(shuf -i 1-60000 -n 1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A node that is silent for so long is down, and its job is requeued; a killed one's job is so before
SlurmdTimeout=$patience
ReturnToService=2
KillWait=5
# The nodes have the CPUs and memory that stand here, not those of the machine
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=2 RealMemory=8000 Gres=gpu:2
NodeName=node1 NodeHostname=$host NodeAddr=${addresses[0]} Port=$(free_port)
NodeName=node2 NodeHostname=$host NodeAddr=${addresses[1]} Port=$(free_port)
PartitionName=DEFAULT Nodes=node[1-2] MaxTime=INFINITE PriorityTier=1 GraceTime=10
PartitionName=test Default=YES
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
CONF
  echo "NodeName=node[1-2] Name=gpu File=$dir/nvidia[0-1]" >"$dir/gres.conf"
  mknod "$dir/nvidia0" c 1 3
  mknod "$dir/nvidia1" c 1 3
}

start() {   # node
  local run=()
  if [ -e "$dir/network" ]; then run=("$hosts" on "$dir" "$1"); fi
  "${run[@]}" slurmd -f "$conf" -N "$1"
}

# A node that goes down: slurmd, its steps' processes, and the steps' daemons, which with slurmd are
# those that hold the node's log open.
kill_node() {   # node
  local tasks daemons
  mapfile -t tasks < <(cd /proc; members | sed 's:$:/environ:' |
    xargs grep -lzx "SLURMD_NODENAME=$1" 2>/dev/null | cut -d/ -f1)
  mapfile -t daemons < <(find /proc/[0-9]*/fd -lname "$dir/$1.log" 2>/dev/null | cut -d/ -f3 | uniq)
  # The node's daemon first, or the job could still ask it after its tasks; the step's last, so that
  # srun hears of its tasks and the test need not wait until Slurm misses the node.
  mapfile -t first < <(for daemon in "${daemons[@]}"; do
    [ "$(cat "/proc/$daemon/comm")" != slurmd ] || echo "$daemon"; done)
  kill -KILL "${first[@]}" "${tasks[@]}"
  sleep 0.3
  kill -KILL "${daemons[@]}" 2>/dev/null || true
}

up() {   # "hosts" or nothing
  trap down EXIT
  if [ "${1:-}" = hosts ]; then "$hosts" up "$dir"; fi
  mkdir -p "$dir"/{state,spool-node1,spool-node2}
  head -c 1024 /dev/urandom >"$dir/munge.key"
  chmod 400 "$dir/munge.key"
  # --force: munged wants a folder open to all users, and here root is the only one
  munged --force --num-threads 2 --socket "$dir/munge.socket" --key-file "$dir/munge.key" \
    --pid-file "$dir/munged.pid" --log-file "$dir/munged.log" --seed-file "$dir/munged.seed" \
    2>"$dir/munged.warnings"
  write_conf
  slurmctld -f "$conf"
  start node1
  start node2
  for _ in $(seq 100); do
    [ "$(SLURM_CONF=$conf sinfo -h -N -p test -o %T 2>/dev/null | grep -c '^idle$')" = 2 ] && { trap - EXIT; return; }
    sleep 0.1
  done
  echo "cluster.sh: no two idle nodes after 10 s; see the logs in $dir" >&2
  return 1
}

# Who belongs to this cluster: its daemons, and whatever runs in a step of one of its jobs.
members() {
  local process
  cat "$dir"/*.pid 2>/dev/null || true
  for process in /proc/[0-9]*; do
    if { tr '\0' '\n' <"$process/environ"; } 2>/dev/null >"$dir/environ" &&
      grep -qx "SLURM_CONF=$conf" "$dir/environ" && grep -q '^SLURM_TASK_PID=' "$dir/environ"; then
      basename "$process"
    fi
  done
}

is_alive() {   # a zombie, which waits for its parent, is dead
  grep -q '^State:[[:space:]]*[^Z[:space:]]' "/proc/$1/status" 2>/dev/null
}

down() {
  [ -d "$dir" ] || return 0
  local pid signal
  if [ -e "$conf" ]; then
    SLURM_CONF=$conf timeout 5 scancel --user root --signal KILL --full 2>/dev/null || true
    SLURM_CONF=$conf timeout 5 scancel --user root 2>/dev/null || true
  fi
  for signal in TERM KILL; do
    mapfile -t pids < <(members)
    for pid in "${pids[@]}"; do kill -s $signal "$pid" 2>/dev/null || true; done
    for _ in $(seq 50); do
      for pid in "${pids[@]}"; do is_alive "$pid" && { sleep 0.1; continue 2; }; done
      break
    done
  done
  "$hosts" down "$dir"
}

case $command in
  up) up "${3:-}" ;;
  down) down ;;
  start) start "$3" ;;
  kill) kill_node "$3" ;;
  *) echo "cluster.sh: up, down, start or kill, not '$command'" >&2; exit 2 ;;
esac

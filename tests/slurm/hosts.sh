#!/usr/bin/env bash
# Two hosts on this one machine: network namespaces with an address and a host name each, joined by
# a bridge on which this machine is the third.
#
#   hosts.sh up DIR                  make node1 and node2; their addresses are in DIR/hosts
#   hosts.sh on DIR HOST COMMAND...  run a command there
#   hosts.sh link DIR HOST up|down   mend or cut its cable
#   hosts.sh down DIR                remove them; processes on them must have ended
#
# Needs root and apt-get install iproute2. The network is drawn: several can be up at once. What is
# not divided: files, processes, ports of Unix.
set -euo pipefail
command=${1:?up, on, link or down}
dir=$(realpath -m "${2:?a folder of its own}")
PATH=$PATH:/usr/sbin:/sbin

up() {
  mkdir -p "$dir"
  local number
  while number=$((RANDOM % 250 + 1)); ! ip link add "phi3v$number" type bridge 2>/dev/null; do
    ((++tries < 20)) || { echo "hosts.sh: no bridge can be made; run as root" >&2; exit 1; }
  done
  echo "$number" >"$dir/network"
  trap down EXIT
  ip address add "10.99.$number.1/24" dev "phi3v$number"
  ip link set "phi3v$number" up
  { echo "127.0.0.1 localhost"; printf "10.99.$number.1%d node%d\n" 1 1 2 2; } >"$dir/hosts"
  for host in 1 2; do
    ip netns add "phi3v$number-$host"
    ip link add "phi3v$number-$host" type veth peer name eth0 netns "phi3v$number-$host"
    ip link set "phi3v$number-$host" master "phi3v$number" up
    ip -n "phi3v$number-$host" address add "10.99.$number.1$host/24" dev eth0
    ip -n "phi3v$number-$host" link set eth0 up
    ip -n "phi3v$number-$host" link set lo up
  done
  trap - EXIT
}

# nsenter: `ip netns exec` would mount another /sys, without the cgroups that slurmd looks for.
on() {
  local host=$1
  shift
  exec nsenter "--net=/run/netns/phi3v$(<"$dir/network")-${host#node}" \
    unshare --uts --mount --propagation private bash -c \
    'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"' - "$dir/hosts" "$host" "$@"
}

down() {
  [ -e "$dir/network" ] || return 0
  local number
  number=$(<"$dir/network")
  for host in 1 2; do
    ip link delete "phi3v$number-$host" 2>/dev/null || true
    ip netns delete "phi3v$number-$host" 2>/dev/null || true
  done
  ip link delete "phi3v$number"
  rm "$dir/network"
}

tries=0
shift 2
case $command in
  up | down) "$command" ;;
  on) on "$@" ;;
  link) ip link set "phi3v$(<"$dir/network")-${1#node}" "$2" ;;
  *) echo "hosts.sh: up, on, link or down, not '$command'" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# ranks.sh N PORT COMMAND...: a command as N ranks of this host, as plain srun starts them. Ends with
# the first exit code that is not 0; the other ranks then have five seconds to end by themselves.
set -u
export WORLD_SIZE=$1 LOCAL_WORLD_SIZE=$1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$2
shift 2
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$@" &
done
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    wait -n && continue
    code=$?
    for ((tenth = 0; tenth < 50; tenth++)); do
        [[ $(jobs -pr) ]] || break
        sleep 0.1
    done
    for pid in $(jobs -pr); do kill -KILL "$pid"; done
    exit "$code"
done

#!/bin/bash
# A run on this machine, one process for each of its GPUs (of its cores, when it has none):
#     launch/single_node.sh metaquery.world --engine.zero 2
set -eu
cd "$(dirname "$0")/.."

VENV="${VENV:-$PWD/.venv}"       # SET: the environment with the program
PROCESSES="${PROCESSES:-auto}"   # SET: how many processes, when not all GPUs are to be used

PATH="$VENV/bin:$PATH"
# Left alone, torchrun dies of a scheduler's SIGUSR1, undoes nohup (SIGHUP), and kills ranks that have not saved in 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec torchrun --standalone --nproc-per-node "$PROCESSES" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    -m "${MODULE:-train.run}" "$@"

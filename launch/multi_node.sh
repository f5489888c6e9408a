#!/bin/bash
# One machine's part of a run on several; the same command on each, and a rank of its own:
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/multi_node.sh metaquery.world --engine.zero 2
# MASTER_ADDR is the address of the machine of rank 0 as the others reach it.
set -eu
cd "$(dirname "$0")/.."

VENV="${VENV:-$PWD/.venv}"       # SET: the environment with the program
PROCESSES="${PROCESSES:-auto}"   # SET: processes on this machine, when not all GPUs are to be used
INTERFACE="${INTERFACE:-}"       # SET: the network between the machines (ip -br address), when not that of MASTER_ADDR

: "${NNODES:?is how many machines there are}" "${NODE_RANK:?is 0 to NNODES - 1, another on each machine}"
: "${MASTER_ADDR:?is the address of the machine with NODE_RANK 0}"
if [ -n "$INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
fi

PATH="$VENV/bin:$PATH"
# A fixed meeting point: torchrun's own (c10d) waits for ever where a host's name leads to 127.0.1.1, as Debian sets it up.
# Signals as in single_node.sh.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" \
    --master-port "${MASTER_PORT:-29500}" --nproc-per-node "$PROCESSES" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 -m "${MODULE:-train.run}" "$@"

#!/bin/bash
# A run on the machines of launch/hostfile, by DeepSpeed's launcher. With pdsh, and ssh without a password, on one of them:
#     launch/deepspeed.sh metaquery.world --engine.zero 2
# Without ssh, on each of them, NODE_RANK being its line in the hostfile, counted from 0:
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/deepspeed.sh metaquery.world --engine.zero 2
set -eu
cd "$(dirname "$0")/.."

VENV="${VENV:-$PWD/.venv}"                 # SET: the environment with the program
HOSTFILE="${HOSTFILE:-launch/hostfile}"    # SET: the machines; DeepSpeed takes a missing file for this machine alone

PATH="$VENV/bin:$PATH"
if [ ! -f "$HOSTFILE" ]; then
    echo "error: $HOSTFILE is missing; list the machines there, or use launch/single_node.sh" >&2
    exit 2
fi
how=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
if [ -n "${MASTER_ADDR:-}" ]; then
    how+=(--master_addr "$MASTER_ADDR")
fi
if [ -n "${NODE_RANK:-}" ]; then
    : "${MASTER_ADDR:?is the address of the first machine of the hostfile}"
    how+=(--no_ssh --node_rank "$NODE_RANK")
fi
exec deepspeed "${how[@]}" --module "${MODULE:-train.run}" "$@"

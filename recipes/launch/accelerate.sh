#!/usr/bin/env bash
# Launch on one node or several with accelerate: FSDP2, ZeRO-2 or ZeRO-3, by a file of recipes/accelerate. Run it once
# on every node:
#
#   recipes/launch/accelerate.sh train recipe.yaml                                   # FSDP2, all GPUs of this machine
#   CONFIG=recipes/accelerate/zero3.yaml recipes/launch/accelerate.sh train recipe.yaml
#   NODES=2 NODE=0 HEAD=node-1:29500 recipes/launch/accelerate.sh train recipe.yaml  # NODE=1 on the second
#
# Under SLURM, slurm.sbatch sets everything.
#
#   CONFIG    file of accelerate (fsdp2.yaml); its numbers of machines and processes are replaced
#   NODES     number of nodes (1)
#   NODE      number of this node, from 0 (0)
#   PROCESSES processes of each node (the GPUs of this one)
#   HEAD      host:port of node 0 (localhost:29500)
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: $0 train RECIPE [key=value ...]" >&2
    exit 2
fi
count_gpus() { nvidia-smi --list-gpus 2>/dev/null | wc -l; }
processes="${PROCESSES:-${SLURM_GPUS_ON_NODE:-$(count_gpus)}}"
if [ "$processes" -lt 1 ]; then
    echo "$0: no GPU found on this node; set PROCESSES" >&2
    exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
nodes="${NODES:-${SLURM_NNODES:-1}}"
head="${HEAD:-localhost:29500}"

exec python -m accelerate.commands.launch \
    --config_file "${CONFIG:-$here/../accelerate/fsdp2.yaml}" \
    --num_machines "$nodes" \
    --machine_rank "${NODE:-${SLURM_NODEID:-0}}" \
    --num_processes "$((nodes * processes))" \
    --main_process_ip "${head%:*}" \
    --main_process_port "${head##*:}" \
    -m bfpo "$@"

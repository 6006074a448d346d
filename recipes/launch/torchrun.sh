#!/usr/bin/env bash
# Launch on one node or several with torchrun, whole weights on each GPU (DDP). Run it once on every node:
#
#   recipes/launch/torchrun.sh train recipe.yaml loss.alpha=0.25            # all GPUs of this machine
#   NODES=2 HEAD=node-1:29500 recipes/launch/torchrun.sh train recipe.yaml  # on each of two nodes
#
# Under SLURM, slurm.sbatch sets everything. FSDP2 and ZeRO-3 are launched by accelerate.sh.
#
#   NODES     number of nodes (1)
#   PROCESSES processes of this node (its GPUs)
#   HEAD      host:port of the first node, which all nodes reach (localhost:29500)
#   JOB       name of the job, the same on all nodes (bfpo)
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

exec python -m torch.distributed.run \
    --nnodes "${NODES:-${SLURM_NNODES:-1}}" \
    --nproc_per_node "$processes" \
    --rdzv_backend c10d \
    --rdzv_endpoint "${HEAD:-localhost:29500}" \
    --rdzv_id "${JOB:-${SLURM_JOB_ID:-bfpo}}" \
    -m bfpo "$@"

#!/usr/bin/env bash
# One stage over several machines: run this on each of them with the same arguments.
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/launch/torchrun.sh sft examples/tulu3/8b/sft.toml --optim.lr 4e-6
#
# Under SLURM the four variables come from the job: srun --ntasks-per-node=1 examples/launch/torchrun.sh sft config.toml
# The run directory and the model must be on a file system that all machines see. The rendezvous listens on MASTER_PORT of
# the first machine: keep the machines on a private network.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 COMMAND [config.toml] [--section.key value ...]   (see the comment in this file)" >&2
  exit 2
fi
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
fi
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
PYTHON=${PYTHON:-python3}
GPUS_PER_NODE=${GPUS_PER_NODE:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# Tensor-parallel communication overlaps with computation only when kernels start in the order they are queued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
  -m tulu_mega "$@"

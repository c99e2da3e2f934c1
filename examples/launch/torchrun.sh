#!/usr/bin/env bash
# One stage over several machines: run this on each of them with the same arguments.
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/launch/torchrun.sh sft examples/tulu3/8b/sft.toml --optim.lr 4e-6
#
# The run directory and the model must be on a file system that all machines see; look first with
#   ... examples/launch/torchrun.sh check --cluster sft examples/tulu3/8b/sft.toml
# The rendezvous listens on MASTER_PORT of the machine with NODE_RANK 0: keep the machines on a private network.
#
# MAX_RESTARTS  times that the ranks are started again after one failed for a reason that is not yours to mend; they go on from the
#               newest checkpoint (3)
# GRACE         seconds the ranks have to end a step and save it after SIGTERM or SIGUSR1 (300)
# LOG_DIR       directory for what each rank prints; only the first of each machine then prints here, too
# LOCAL_ADDR    this machine's address for the others, where it is not that on the way to MASTER_ADDR
# RUN_ID        the same on all machines and another one for each run that they take part in (tulu-mega)
# Exit status: 0 done, 2 something you can mend, 143 asked to end and saved, 137 asked to end and killed when GRACE was over; see
# docs/how-to/launch_many_nodes.md.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 COMMAND [config.toml] [--section.key value ...]   (see the comment in this file)" >&2
  exit 2
fi
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
RUN_ID=${RUN_ID:-tulu-mega}
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || { echo "error: PYTHON = $PYTHON: no such program; give the environment's python" >&2; exit 2; }
GPUS_PER_NODE=${GPUS_PER_NODE:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)' 2>/dev/null || true)}
[ -n "$GPUS_PER_NODE" ] || { echo "error: PYTHON = $PYTHON cannot import torch; give the environment's python" >&2; exit 2; }

for name in NNODES NODE_RANK MASTER_PORT GPUS_PER_NODE MAX_RESTARTS GRACE; do
  [[ ${!name-0} =~ ^[0-9]+$ ]] || { echo "error: $name = ${!name}: expected a whole number" >&2; exit 2; }
done
[ "$NODE_RANK" -lt "$NNODES" ] || { echo "error: NODE_RANK = $NODE_RANK of NNODES = $NNODES: they count from 0" >&2; exit 2; }

# Tensor-parallel communication overlaps with computation only when kernels start in the order they are queued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# c10d is the rendezvous that survives restarts: the machines meet again before their ranks start anew.
host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)
exec "$PYTHON" -m tulu_mega.agent \
  --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RUN_ID" --rdzv-conf "is_host=$host" \
  --shutdown-timeout "${GRACE:-300}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  ${LOG_DIR:+--log-dir "$LOG_DIR" --redirects 3 --tee 0:3} \
  -m tulu_mega "$@"

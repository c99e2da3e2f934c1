#!/usr/bin/env bash
# One stage over the machines of a host file, by SSH: the first of them meets the others.
#
#   examples/launch/ssh.sh HOSTFILE sft examples/tulu3/8b/sft.toml
#
# HOSTFILE has a machine a line, as ssh wants it (user@host, or a name of ~/.ssh/config), and behind it, where the others are to reach it
# by another address than the one on its way to the first, that address (LOCAL_ADDR there); # begins a comment. You must be able to log
# in without a password, and this directory must be there on each of them, at the same path. SIGTERM or Ctrl-C here, and a connection
# that breaks, ask the run to end: it saves first. The variables of torchrun.sh, PYTHONPATH, and what begins with CUBLAS_, CUDA_,
# FI_, GLOO_, KMP_, MKL_, NCCL_, NVIDIA_, NVTE_, OMP_, PYTORCH_, TORCH_, TRITON_, TULU_MEGA_, UCX_ or VLLM_, are handed on. So are
# TULU_MEGA_ROLLOUT_KEY and what begins with HF_ or WANDB_, over standard input: command lines can be read by anybody there.
# MASTER_ADDR is the first machine's name as ssh resolves it; the others must know it.
# Exit status: that of the machine that was the first to end with another than 0; the others are then asked to end.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 HOSTFILE COMMAND [config.toml] [--section.key value ...]   (see the comment in this file)" >&2
  exit 2
fi
[ -r "$1" ] || { echo "error: $1: no host file that can be read" >&2; exit 2; }
mapfile -t hosts < <(sed 's/#.*//' "$1" | awk 'NF {print $1}')
mapfile -t addresses < <(sed 's/#.*//' "$1" | awk 'NF {print $2}')
shift
[ ${#hosts[@]} -gt 0 ] || { echo "error: the host file names no machine; give one a line" >&2; exit 2; }
twice=$(printf '%s\n' "${hosts[@]#*@}" | sort | uniq -d | head -n 1)
[ -z "$twice" ] || { echo "error: the host file names $twice twice: its GPUs cannot be had twice; give each machine one line" >&2; exit 2; }

if [ -n "${LOCAL_ADDR:-}" ]; then
  echo "error: LOCAL_ADDR = $LOCAL_ADDR is one machine's address: write each one's behind its name in the host file" >&2
  exit 2
fi
if [ -z "${MASTER_ADDR:-}" ]; then  # ~/.ssh/config may have another name for it
  MASTER_ADDR=$(ssh -G "${hosts[0]}" 2>/dev/null </dev/null | awk '$1 == "hostname" {print $2; exit}' || true)
fi
export NNODES=${#hosts[@]} MASTER_ADDR=${MASTER_ADDR:-${hosts[0]#*@}}
handed=() secret=()
while IFS= read -r name; do
  case $name in
    TULU_MEGA_ROLLOUT_KEY | HF_* | WANDB_*) secret+=("$name=${!name}") ;;
    *) handed+=("$name=${!name}") ;;
  esac
done < <(compgen -e | grep -E -e '^(NNODES|MASTER_ADDR|MASTER_PORT|PYTHON|PYTHONPATH|GPUS_PER_NODE|MAX_RESTARTS|GRACE|RUN_ID|LOG_DIR)$' \
  -e '^(CUBLAS|CUDA|FI|GLOO|HF|KMP|MKL|NCCL|NVIDIA|NVTE|OMP|PYTORCH|TORCH|TRITON|TULU_MEGA|UCX|VLLM|WANDB)_')

# On the machine: variables come on standard input, one a line until an empty one; its end asks the run to end.
read -r -d '' remote <<'REMOTE' || true
cd "$1" || exit 2
shift
unset TULU_MEGA_ROLLOUT_KEY
while IFS= read -r line && [ -n "$line" ]; do export "$line"; done
exec 3<&0
env "$@" </dev/null 3<&- & run=$!
{ cat <&3 >/dev/null 2>&1; kill -TERM "$run" 2>/dev/null; } & watch=$!  # cat outlives it, and must not hold our output
exec 3<&-
wait "$run"; status=$?
kill -KILL "$watch" 2>/dev/null
exit "$status"
REMOTE

inputs=() runs=()
end() {
  for input in "${inputs[@]}"; do
    { exec {input}>&-; } 2>/dev/null || true
  done
  inputs=()
}
for node in "${!hosts[@]}"; do
  host=${hosts[$node]}
  own=("NODE_RANK=$node")
  [ -z "${addresses[$node]}" ] || own+=("LOCAL_ADDR=${addresses[$node]}")
  words=$(printf ' %q' "$remote" ssh "$PWD" "${handed[@]}" "${own[@]}" examples/launch/torchrun.sh "$@")
  exec {input}> >(
    trap '' TERM INT USR1  # the run ends when its input does
    for other in "${inputs[@]}"; do exec {other}>&-; done
    ssh -T -o BatchMode=yes -o ServerAliveInterval=30 "$host" "bash -c$words" 2>&1 | sed -u "s/^/[$host] /"
  )
  runs+=($!) inputs+=("$input")
  printf '%s\n' "${secret[@]}" "" >&"$input"
done
trap end TERM INT USR1 HUP

# Whichever ends first: where it did not end with 0 the others cannot go on alone.
status=0
while [ ${#runs[@]} -gt 0 ]; do
  for at in "${!runs[@]}"; do
    kill -0 "${runs[$at]}" 2>/dev/null && continue
    ended=0
    wait "${runs[$at]}" 2>/dev/null || ended=$?
    unset "runs[$at]"
    if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$ended
      end
    fi
  done
  (end; exec sleep 0.3) & wait $! || true  # a signal of ours ends the wait; the machines' inputs are not for it to hold open
done
exit "$status"

#!/usr/bin/env bash
# What needs a CUDA device, one part after another: the same as `make gpu`, where there is no make.
#
#   PYTHON=python3 LOGS=logs tools/gpu.sh [tests] [kernels] [training] [smoke] [fused]
#
# Each part has its limit in seconds and ten more to end in; the next one runs even if one fails. Without names the first four run, 570 s
# at most in all, since devices are often lent by ten minutes; `fused` (190 s) is another run of the training bench.
# Exit status: 0 all passed, 1 a part failed, 2 a wrong name or a package that is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
LOGS=${LOGS:-docs/notes/measurements}
parts=("$@")
[ $# -gt 0 ] || parts=(tests kernels training smoke)
for part in "${parts[@]}"; do
  case $part in
    tests | kernels | training | smoke | fused) ;;
    *) echo "error: part $part: expected some of tests kernels training smoke fused" >&2; exit 2 ;;
  esac
done
needed="blake3, datasets, httpx, hypothesis, megatron.core, psutil, pydantic, pytest, pytest_timeout, rich, transformers, triton"
"$PYTHON" -c "import $needed" || {
  echo "error: $PYTHON lacks a package of setup.py; pip install it, megatron-core as ==0.16.1" >&2
  exit 2
}
mkdir -p "$LOGS"
export PYTHONUNBUFFERED=1 PYTHONPATH=kernels${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

failed=
trap 'exit 130' INT  # else Ctrl-C would end one part only
run() {
  local name=$1 limit=$2
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "$PYTHON" "$@" 2>&1 | tee "$LOGS/$name.log" || failed="$failed $name"
}
for part in "${parts[@]}"; do
  case $part in
    tests) run gpu_tests 130 -m pytest -v --durations 5 --session-timeout 120 tests/gpu tests/kernels tests/resilience/test_stragglers.py -m gpu ;;
    kernels) run bench_kernels 140 tools/bench_kernels.py ;;
    training) run bench_training 170 tools/bench_training.py --steps 3 ;;
    smoke) run gpu_smoke 90 tools/gpu_smoke.py ;;
    fused)
      run bench_training_fused 180 tools/bench_training.py --pack 8192 --profile \
        --set megatron.gradient_accumulation_fusion=true megatron.bias_activation_fusion=true
      ;;
  esac
done
[ -z "$failed" ] || { echo "failed:$failed; see $LOGS" >&2; exit 1; }

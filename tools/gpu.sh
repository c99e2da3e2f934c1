#!/usr/bin/env bash
# What needs a CUDA device, one part after another: the same as `make gpu`, where there is no make. See tools/gpu.py --help.
#
#   PYTHON=python3 LOGS=gpu_logs tools/gpu.sh [--device cpu] [smoke] [training] [unfused] [tests] [ipc] [kernels]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" tools/gpu.py --logs "${LOGS:-gpu_logs}" "$@"

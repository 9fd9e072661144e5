#!/usr/bin/env bash
# Speed of the original's and the deposit's step beside a plain reference: bash scripts/8_benchmark.sh
#   ARCH=resnet18 STEPS=8      network, steps measured
#   OUT=checkpoints/benchmark.json
# Nothing else should run on the machine meanwhile. On a GPU, STEPS=200 or more.
set -euo pipefail
source "$(dirname "$0")/env.sh"
python analysis/benchmark.py --arch "${ARCH:-resnet18}" --steps "${STEPS:-8}" --out "${OUT:-checkpoints/benchmark.json}"

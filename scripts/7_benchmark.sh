#!/usr/bin/env bash
# Speed of the original's and the deposit's step, the first beside a plain reference: bash scripts/7_benchmark.sh
#   ARCH=resnet18 STEPS=3      network, steps of a turn, of which each side takes three
#   OUT=checkpoints/benchmark/${ARCH}_log.jsonl
# Nothing else should run on the machine meanwhile. On a GPU, STEPS=200 or more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ARCH=${ARCH:-resnet18}
OUT=${OUT:-checkpoints/benchmark/${ARCH}_log.jsonl}
python -m analysis.speed --arch "$ARCH" --steps "${STEPS:-3}" --out "$OUT"

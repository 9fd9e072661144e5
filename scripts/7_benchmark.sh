#!/usr/bin/env bash
# Speed of the original's and the deposit's step beside a plain reference, and the memory that photographs take:
# bash scripts/7_benchmark.sh
#   ARCH=resnet18 STEPS=3      network, steps of a turn, of which each side takes three
#   IMAGES=11788               made-up photographs (0: none); as many as CUB-200-2011 has take 5 GB of temporary files
#   OUT=checkpoints/benchmark  folder of speed.json and memory.json
# Nothing else should run on the machine meanwhile. On a GPU, STEPS=200 or more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
OUT=${OUT:-checkpoints/benchmark} IMAGES=${IMAGES:-11788}
python -m analysis.benchmark.speed --arch "${ARCH:-resnet18}" --steps "${STEPS:-3}" --out "$OUT/speed.json"
if [ "$IMAGES" != 0 ]; then python -m analysis.benchmark.memory --images "$IMAGES" --out "$OUT/memory.json"; fi

#!/usr/bin/env bash
# Copies what stands for finished runs, their logs, measurements, manifests and choices, from one folder to another:
#   bash scripts/collect.sh checkpoints/ablation_resnet18 results/ablation
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: bash scripts/collect.sh <folder of runs> <folder that gets their records>" >&2
    exit 2
fi
if [ ! -d "$1" ]; then
    echo "$1 is no folder: name one that holds runs" >&2
    exit 1
fi
mkdir -p "$2"
(cd "$1" && find . -name '*_log.jsonl' -o -name '*.json' -o -name choice.txt) | tar -C "$1" -cf - -T - |
    tar -C "$2" -xf -

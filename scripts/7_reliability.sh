#!/usr/bin/env bash
# The campaigns behind results/reliability.md, on a CPU under Linux: bash scripts/7_reliability.sh (some 20 minutes)
#   OUT=checkpoints/reliability
set -euo pipefail
source "$(dirname "$0")/env.sh"
OUT=${OUT:-checkpoints/reliability}
export OMP_NUM_THREADS=1
python analysis/faults.py --campaign kills --count 50 --out "$OUT/kills.jsonl"
python analysis/faults.py --campaign stops --count 20 --out "$OUT/stops.jsonl"
python analysis/faults.py --campaign full_disk --count 20 --out "$OUT/full_disk.jsonl"
python analysis/faults.py --campaign long_run --epochs 200 --out "$OUT/long_run.jsonl"
python analysis/mutations.py --cases 10000 --out "$OUT/mutations.jsonl"

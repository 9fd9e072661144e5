#!/usr/bin/env bash
# The whole chain on scikit-learn's digits, from nothing but Python: bash scripts/0_quickstart.sh [folder]
# 90 to 160 seconds on 2 CPU cores after the install. Needs no download but the packages.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
save_path=${1:-checkpoints/quickstart}

python "$ROOT/partition_data.py" --dataset digits --seed 0 --out "$save_path/partition.json"
python "$ROOT/train_scratch.py" --save_path "$save_path" --arch resnet8 --epochs 30 --batch_size 32
# D_r holds 434 images here, a thirtieth of CIFAR-10's: smaller batches and more epochs make up for it.
python "$ROOT/train_deposit.py" --save_path "$save_path" --epochs 30 --batch_size 32
python "$ROOT/withdraw.py" --save_path "$save_path" --data_dir data

#!/usr/bin/env bash
# Table 1 on CIFAR-10: bash scripts/1_table1_cifar10.sh [seed ...]      (default: 0)
# Each seed draws its own deposit classes. Stages that are done are skipped, a killed one resumes.
#   ARCH=resnet18 EPOCHS=30      network and length of the original's training
#   DATA_DIR=data                CIFAR-10 (downloaded when absent) or an image folder train/<class>/, test/<class>/
#   SAVE=checkpoints/table1_cifar10_$ARCH
#   VAL_FRACTION=0               share of the training images held out to choose settings on
#   INDEPENDENT=1                also train the two Independent networks
set -euo pipefail
source "$(dirname "$0")/env.sh"
ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-30} DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=${VAL_FRACTION:-0}
SAVE=${SAVE:-checkpoints/table1_cifar10_$ARCH}
if [ $# -eq 0 ]; then set -- 0; fi

metrics=()
for seed in "$@"; do
    run=$SAVE/seed$seed
    [ -e "$run/partition.json" ] || python partition_data.py --dataset cifar10 --data_dir "$DATA_DIR" --seed "$seed" \
        --val_fraction "$VAL_FRACTION" --out "$run/partition.json"
    original=(--save_path "$run" --data_dir "$DATA_DIR" --arch "$ARCH" --epochs "$EPOCHS" --seed "$seed")
    python train_scratch.py "${original[@]}"
    if [ "${INDEPENDENT:-0}" = 1 ]; then
        python train_scratch.py "${original[@]}" --subset preservation
        python train_scratch.py "${original[@]}" --subset deposit
    fi
    python train_deposit.py --save_path "$run" --data_dir "$DATA_DIR" --seed "$seed"
    python withdraw.py --save_path "$run" --data_dir "$DATA_DIR"
    if [ "$VAL_FRACTION" != 0 ]; then
        python withdraw.py --save_path "$run" --data_dir "$DATA_DIR" --eval_split val
    fi
    metrics+=("$run/metrics.json")
done
python analysis/table1.py --metrics "${metrics[@]}" --out "$SAVE/table1.md"

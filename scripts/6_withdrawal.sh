#!/usr/bin/env bash
# The study of the withdrawal (results/withdrawal.md): bash scripts/6_withdrawal.sh [seed ...]      (default: 0 1 2)
# Ways to train T and T_r, each measured under every merge rule, on images held out of the training set. The test set
# is not read. Runs that are done are skipped, a killed one resumes.
#   ARCH=resnet20 EPOCHS=10      network and length of the original's training
#   DEPOSIT_EPOCHS=3             length of each deposit
#   DATA_DIR=data                CIFAR-10, or an image folder train/<class>/, test/<class>/
#   SAVE=checkpoints/withdrawal_$ARCH
set -euo pipefail
source "$(dirname "$0")/env.sh"
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-10} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-3} DATA_DIR=${DATA_DIR:-data}
SAVE=${SAVE:-checkpoints/withdrawal_$ARCH}
if [ $# -eq 0 ]; then set -- 0 1 2; fi

paper="--lambda_pt 1 --lambda_re 0.1 --lambda_ft 0 --pt_classes deposit"
variants=(
    "paper $paper"
    "features_5 --lambda_ft 5"
    "default"
    "frozen --bn_stats frozen"
    "mixed --unlike mixed"
)
for seed in "$@"; do
    original=$SAVE/original/seed$seed
    [ -e "$original/partition.json" ] || python partition_data.py --dataset cifar10 --data_dir "$DATA_DIR" \
        --seed "$seed" --val_fraction 0.1 --out "$original/partition.json"
    python train_scratch.py --save_path "$original" --data_dir "$DATA_DIR" --arch "$ARCH" --epochs "$EPOCHS" \
        --seed "$seed"
    for variant in "${variants[@]}"; do
        read -r name flags <<< "$variant"
        run=$SAVE/$name/seed$seed
        # shellcheck disable=SC2086 # the flags are words
        python train_deposit.py --save_path "$run" --original "$original/original.pt" --data_dir "$DATA_DIR" \
            --seed "$seed" --epochs "$DEPOSIT_EPOCHS" $flags
        python withdraw.py --save_path "$run" --data_dir "$DATA_DIR" --eval_split val
    done
done

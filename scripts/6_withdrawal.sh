#!/usr/bin/env bash
# The study of the withdrawal (results/withdrawal.md): bash scripts/6_withdrawal.sh [seed ...]      (default: 0 1 2)
# Ways to train T and T_r, each measured under every merge rule, on images held out of the training set. The test set
# is not read. Runs that are done are skipped, a killed one resumes.
#   ARCH=resnet20 EPOCHS=10      network and length of the original's training
#   DEPOSIT_EPOCHS=3             length of each deposit
#   DATASET=cifar10 DATA_DIR=data      CIFAR-10, or an image folder train/<class>/, test/<class>/
#   VAL_FRACTION=0.1             share of the training images held out
#   SAVE=checkpoints/withdrawal_$ARCH
#   ORIGINALS=$SAVE/original     folder of the originals, seed<k> each; scripts 3 and 5 take the same if settings agree
set -euo pipefail
DATASET=${DATASET:-cifar10} DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=${VAL_FRACTION:-0.1}
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-10} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-3}
SAVE=${SAVE:-checkpoints/withdrawal_$ARCH}
ORIGINALS=${ORIGINALS:-$SAVE/original}
source "$(dirname "$0")/stages.sh"
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
    draw_partition "$ORIGINALS/seed$seed" "$seed"
    train_original "$ORIGINALS/seed$seed" "$seed"
    for variant in "${variants[@]}"; do
        read -r name flags <<< "$variant"
        run=$SAVE/$name/seed$seed
        # shellcheck disable=SC2086 # the flags are words
        train_deposit "$run" "$ORIGINALS/seed$seed" "$seed" $flags
        python withdraw.py --save_path "$run" --data_dir "$DATA_DIR" --eval_split val
    done
done

#!/usr/bin/env bash
# Whether speed costs accuracy: the same seeds with and without each way to be fast, T0, T and T~ on the test set:
#   bash scripts/9_optimisations.sh [seed ...]      (default: 0 1 2)
# Runs that are done are skipped, a killed one resumes.
#   VARIANTS="plain fp32 bf16 compile"     plain: T0 by a DataLoader on files, float32, NCHW; the others: the stages in
#                                          that precision, or in float32 and compiled
#   ARCH=resnet20 EPOCHS=10      network and length of the original's training
#   DEPOSIT_EPOCHS=3             length of each deposit
#   DATA_DIR=data                an image folder train/<class>/, test/<class>/, CIFAR-10's or another
#   DATASET=cifar10              cifar10 or folder
#   SAVE=checkpoints/optimisations_$ARCH
set -euo pipefail
DATASET=${DATASET:-cifar10} DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=0
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-10} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-3}
VARIANTS=${VARIANTS:-plain fp32 bf16 compile}
SAVE=${SAVE:-checkpoints/optimisations_$ARCH}
source "$(dirname "$0")/stages.sh"
if [ $# -eq 0 ]; then set -- 0 1 2; fi

for variant in $VARIANTS; do
    case $variant in
        plain | fp32 | bf16 | compile) ;;
        *)
            echo "VARIANTS: '$variant' is none of plain, fp32, bf16 and compile" >&2
            exit 1
            ;;
    esac
done
for seed in "$@"; do
    draw_partition "$SAVE/partitions/seed$seed" "$seed"
    partition=$SAVE/partitions/seed$seed/partition.json
    for variant in $VARIANTS; do
        run=$SAVE/$variant/seed$seed
        if [ "$variant" = plain ]; then
            python analysis/plain.py --save_path "$run" --data_dir "$DATA_DIR" --partition "$partition" \
                --arch "$ARCH" --epochs "$EPOCHS" --seed "$seed"
            continue
        fi
        precision=fp32 compile=()
        case $variant in
            bf16) precision=bf16 ;;
            compile) compile=(--compile) ;;
        esac
        flags=(--precision "$precision" ${compile[@]+"${compile[@]}"})
        train_original "$run" "$seed" --partition "$partition" "${flags[@]}"
        train_deposit "$run" "$run" "$seed" "${flags[@]}"
        python withdraw.py --save_path "$run" --data_dir "$DATA_DIR" --precision "$precision"
    done
done

#!/usr/bin/env bash
# The ablations: bash scripts/5_ablation.sh [seed ...]      (default: 0 1 2)
# Deposits that differ from the default in one setting, measured on images held out of the training set; tables, and
# plots as PNG and PDF in $SAVE. Runs that are done are skipped, a killed one resumes.
#   AXES="losses split pruning temperature classes images epochs"
#   ARCH=resnet18 EPOCHS=30      network and length of the original's training
#   DEPOSIT_EPOCHS=10            length of each deposit
#   DATASET=cifar10 DATA_DIR=data      CIFAR-10, or an image folder train/<class>/, test/<class>/
#   VAL_FRACTION=0.1             share of the training images held out
#   SAVE=checkpoints/ablation_$ARCH
#   ORIGINALS=$SAVE/original     folder of the originals, seed<k> each; scripts 3 and 6 take the same if settings agree
set -euo pipefail
DATASET=${DATASET:-cifar10} DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=${VAL_FRACTION:-0.1}
ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-30} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-10}
AXES=${AXES:-losses split pruning temperature classes images epochs}
SAVE=${SAVE:-checkpoints/ablation_$ARCH}
ORIGINALS=${ORIGINALS:-$SAVE/original}
source "$(dirname "$0")/stages.sh"
if [ $# -eq 0 ]; then set -- 0 1 2; fi

values() { # axis: a line each for its values but the default's, with the flags that set it
    local blocks=3 n
    case $ARCH in resnet18 | resnet34 | resnet50) blocks=4 ;; esac
    case $1 in
        losses)
            for n in kr at kp pt ft; do echo "no_l_$n --lambda_$n 0"; done
            echo "with_l_re --lambda_re 0.1"
            ;;
        split) for n in $(seq 1 $blocks); do [ "$n" = 2 ] || echo "$n --split_at $n"; done ;;
        pruning) for n in 0 0.25 0.75 0.9; do echo "$n --prune_ratio $n"; done ;;
        temperature) for n in 1 2 8; do echo "$n --temperature $n"; done ;;
        classes) for n in 10 20 40 50; do echo "$n"; done ;; # per cent; the flag needs the seed's own partition
        images) # of CIFAR-10's 4,500 a class: fewer, seen as many times in all
            for n in 50 150 500 1500; do echo "$n --images_per_class $n --epochs $((DEPOSIT_EPOCHS * 4500 / n))"; done
            ;;
        epochs) for n in 1 3 10; do [ "$n" = "$DEPOSIT_EPOCHS" ] || echo "$n --epochs $n"; done ;;
        *)
            echo "AXES: '$1' is no axis of the ablation" >&2
            return 1
            ;;
    esac
}

measured_deposit() { # folder seed [flag ...]
    train_deposit "$1" "$ORIGINALS/seed$2" "${@:2}"
    python withdraw.py --save_path "$1" --data_dir "$DATA_DIR" --eval_split val
}

for axis in $AXES; do values "$axis" > /dev/null; done
for seed in "$@"; do
    draw_partition "$ORIGINALS/seed$seed" "$seed"
    train_original "$ORIGINALS/seed$seed" "$seed"
    measured_deposit "$SAVE/default/seed$seed" "$seed"
    for axis in $AXES; do
        values "$axis" | while read -ra words; do
            run=$SAVE/$axis/${words[0]}/seed$seed
            if [ "$axis" = classes ]; then
                draw_partition "$run" "$seed" --deposit_fraction "0.${words[0]}"
                words+=(--partition "$run/partition.json")
            fi
            measured_deposit "$run" "$seed" "${words[@]:1}"
        done
    done
done
python analysis/ablation.py --runs "$SAVE" --out "$SAVE"

#!/usr/bin/env bash
# The ablations: bash scripts/5_ablation.sh [seed ...]      (default: 0 1 2)
# Deposits that differ from the default in one setting; tables, and plots in $SAVE. Trainings that are done are skipped,
# a killed one resumes. With VAL_FRACTION they are measured on images held out, which is how settings are chosen.
#   AXES="losses split pruning bits temperature classes images epochs lambda_at"      also: lr lambda_kp lambda_pt
#                                lambda_re random_label bn_stats. images: for classes of more than 1,500
#                                images, classes: for six classes or more
#   ARCH=resnet20 EPOCHS=60      network and length of the original's training; PUBLISHED, WEIGHTS as in script 1
#   DATASET=cifar10 DATA_DIR=data VAL_FRACTION=0
#   SAVE=checkpoints/ablation_$ARCH      gets original/, default/seed<k>/ and <axis>/<value>/seed<k>/
#   PARTITION_FLAGS ORIGINAL_FLAGS DEPOSIT_FLAGS      further flags of the stages
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-60}
AXES=${AXES:-losses split pruning bits temperature $([ "$DATASET" = folder ] || echo classes)
    $([ "$DATASET" != cifar10 ] || echo images) epochs lambda_at}
SAVE=${SAVE:-checkpoints/ablation_$ARCH}

values() { # axis: a line each for its values but the default's, with the flags that set it
    local n
    case $1 in
        losses)
            for n in kr at kp pt re; do echo "no_l_$n --lambda_$n 0"; done
            echo "with_l_ft --lambda_ft 50"
            ;;
        split) for n in $(seq $(($(blocks) - 1))); do echo "$n --split_at $n"; done ;;
        lr) for n in 0.003 0.03; do echo "$n --lr $n"; done ;;
        lambda_kp) for n in 1 2.5 10 20; do echo "$n --lambda_kp $n"; done ;;
        lambda_at) for n in 0 30 300 1000; do echo "$n --lambda_at $n"; done ;;
        lambda_pt) for n in 0.3 3 10; do echo "$n --lambda_pt $n"; done ;;
        lambda_re) for n in 0 0.1 1; do echo "$n --lambda_re $n"; done ;;
        random_label) for n in any wrong; do echo "$n --random_label $n"; done ;;
        bn_stats) for n in frozen deposit; do echo "$n --bn_stats $n"; done ;;
        pruning) for n in 0 0.25 0.75 0.9; do echo "$n --prune_ratio $n"; done ;;
        bits) for n in 2 3 6 8 16; do echo "$n --difference_bits $n"; done ;;
        temperature) for n in 1 2 8; do echo "$n --temperature $n"; done ;;
        classes) for n in 1 2 4 5; do echo "$n"; done ;; # the flag needs the seed's own partition
        images) for n in 50 150 500 1500; do echo "$n --images_per_class $n"; done ;;
        epochs) for n in 1 5 10; do echo "$n --epochs $n"; done ;;
        *)
            echo "AXES: '$1' is no axis of the ablation" >&2
            return 1
            ;;
    esac
}

measured_deposit() { # folder seed [flag ...]
    train_deposit "$1" "$SAVE/original" "${@:2}"
    withdraw "$1"
}

for axis in $AXES; do values "$axis" > /dev/null; done
accept_flags
make_original "$SAVE/original"
for seed in "$@"; do
    draw_partition "$SAVE/default/seed$seed" "$seed"
    measured_deposit "$SAVE/default/seed$seed" "$seed"
    for axis in $AXES; do
        values "$axis" | while read -ra words; do
            run=$SAVE/$axis/${words[0]}/seed$seed
            if [ "$axis" = classes ]; then
                draw_partition "$run" "$seed" --deposit_fraction "0.${words[0]}"
            else # the default's draw; to draw it anew would read all images again
                mkdir -p "$run"
                cp "$SAVE/default/seed$seed/partition.json" "$run"
            fi
            twin=$SAVE/losses/no_l_${axis#lambda_}/seed$seed # a weight of 0 is a loss left out
            if [ "${words[0]}" = 0 ] && [ -e "$twin/recover.pt" ] && [ ! -e "$run/deposit_log.jsonl" ]; then
                cp -r "$twin/." "$run"
            fi
            measured_deposit "$run" "$seed" "${words[@]:1}"
        done
    done
done
python -m analysis.ablation --runs "$SAVE" --eval_split "$(measured_split)"

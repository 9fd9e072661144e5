#!/usr/bin/env bash
# Recovery against bytes: what must be kept beside T to get the deposit classes back, and how well it does:
#   bash scripts/6_recovery_bytes.sh [seed ...]      (default: 0 1 2)
# One original; each seed draws the deposit classes anew. Trainings that are done are skipped, a killed one resumes.
#   ARCH=resnet20 EPOCHS=60      network and length of the original's training; PUBLISHED, WEIGHTS as in script 1
#   RATIOS="0.51 0 0.25 0.75 0.9"      pruning ratios of T_r; all else is measured of the first one's deposit
#   DATASET=cifar10 DATA_DIR=data VAL_FRACTION=0
#   SAVE=checkpoints/recovery_$ARCH      gets original/, <preset>_<ratio>/seed<k>/, recovery.json, .md and .png
#   PARTITION_FLAGS ORIGINAL_FLAGS DEPOSIT_FLAGS      further flags of the stages, as --split_at 2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-60} RATIOS=${RATIOS:-0.51 0 0.25 0.75 0.9}
SAVE=${SAVE:-checkpoints/recovery_$ARCH}

refuse_deposit_flag --preset "the terms of paper and of ours are both run"
refuse_deposit_flag --prune_ratio "RATIOS sets it, so name it there"
refuse_deposit_flag --last_layer "all forms need T0's"
for ratio in $RATIOS; do accepts train_deposit --prune_ratio "$ratio"; done
accept_flags
make_original "$SAVE/original"
runs=() pruned=()
for seed in "$@"; do
    for preset in paper ours; do
        for ratio in $RATIOS; do
            run=$SAVE/${preset}_$ratio/seed$seed
            draw_partition "$run" "$seed"
            train_deposit "$run" "$SAVE/original" "$seed" --preset "$preset" --prune_ratio "$ratio"
            withdraw "$run"
            pruned+=("$run/$(metrics_name)")
        done
    done
    runs+=("$SAVE/paper_${RATIOS%% *}/seed$seed")
done
python -m analysis.recovery --runs "${runs[@]}" --original "$SAVE/original/original.pt" --data_dir "$DATA_DIR" \
    --eval_split "$(measured_split)" --pruned "${pruned[@]}" --out "$SAVE/recovery"

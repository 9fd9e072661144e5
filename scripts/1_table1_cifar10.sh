#!/usr/bin/env bash
# Table 1 on CIFAR-10: bash scripts/1_table1_cifar10.sh [seed ...]      (default: 0 1 2)
# One original; each seed draws the deposit classes anew. The table is of the seeds of this call. Trainings that are
# done are skipped, a killed one resumes.
#   ARCH=resnet18 EPOCHS=30      network and length of the original's training
#   PUBLISHED=resnet20           take the original of the tables, resnet20 or resnet56, from DATA_DIR
#   WEIGHTS=file                 start the original from weights that others trained, with EPOCHS=0 take them as they
#                                are; PARTITION_FLAGS="--mean R G B --std R G B" says how they expect their images
#   VARIANTS="paper"             deposits of each draw: paper, authors, ours, deep (--preset), split2 (--split_at 2)
#   DATASET=cifar10              another data set of partition_data.py; the paper's rows are of cifar10 and cub200
#   DATA_DIR=data                CIFAR-10 (downloaded when absent) or an image folder train/<class>/, test/<class>/
#   SAVE=checkpoints/table1_${DATASET}_$ARCH      gets original/ and <variant>/seed<k>/
#   VAL_FRACTION=0               share of the training images held out: then these are measured, not the test set
#   INDEPENDENT=1                also train the Independent networks of the first variant's first seed, with T0's
#                                settings or RETRAIN_EPOCHS and RETRAIN_FLAGS, as T0 of WEIGHTS has none
#   PARTITION_FLAGS ORIGINAL_FLAGS DEPOSIT_FLAGS      further flags of the stages
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-30} VARIANTS=${VARIANTS:-paper}
SAVE=${SAVE:-checkpoints/table1_${DATASET}_$ARCH}

flags_of() { # variant
    case $1 in
        paper | authors | ours | deep) echo "--preset $1" ;;
        split[1-9])
            if [ "${1#split}" -gt "$(blocks)" ]; then
                echo "VARIANTS: '$1' cuts after a block that $ARCH lacks" >&2
                return 1
            fi
            echo "--split_at ${1#split}"
            ;;
        *)
            echo "VARIANTS: '$1' is none of paper, authors, ours, deep and split<n>" >&2
            return 1
            ;;
    esac
}

for variant in $VARIANTS; do flags_of "$variant" > /dev/null; done
refuse_deposit_flag --preset "VARIANTS sets it, so name it there"
if [ "${INDEPENDENT:-0}" = 1 ]; then require_retrain_epochs; fi
accept_flags
make_original "$SAVE/original"
for variant in $VARIANTS; do
    metrics=()
    for seed in "$@"; do
        run=$SAVE/$variant/seed$seed
        draw_partition "$run" "$seed"
        if [ "${INDEPENDENT:-0}" = 1 ] && [ "$variant $seed" = "${VARIANTS%% *} $1" ]; then
            for subset in preservation deposit; do
                train_from_scratch "$run" "$seed" --subset "$subset"
            done
        fi
        # shellcheck disable=SC2046 # the flags are words
        train_deposit "$run" "$SAVE/original" "$seed" $(flags_of "$variant")
        withdraw "$run"
        metrics+=("$run/$(metrics_name)")
    done
    echo "$variant:"
    paper=none
    case $DATASET in cifar10 | cub200) paper=$DATASET ;; esac
    python -m analysis.table1 --paper "$paper" --metrics "${metrics[@]}" --out "$SAVE/$variant/table1.md"
done

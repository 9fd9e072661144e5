#!/usr/bin/env bash
# Table 3, what a student learns from T0, from T trained without L_at and from T trained with it:
#   bash scripts/3_table3_transferability.sh [seed ...]      (default: 0 1 2)
# Runs that are done are skipped, a killed one resumes.
#   ARCH=resnet18 EPOCHS=30      network and length of the original's training
#   DEPOSIT_EPOCHS=10            length of each deposit
#   SPLIT_AT=2                   block after which T0 is cut
#   LAMBDA_AT="0 100"            weights of L_at, a target network T each
#   STUDENTS="cnn resnet18"      students, each distilled by logits and by attention, and once trained by labels alone
#   STUDENT_EPOCHS=30            length of each student's training
#   DATASET=cifar10 DATA_DIR=data      CIFAR-10, or an image folder train/<class>/, test/<class>/
#   VAL_FRACTION=0               share of the training images held out: gives a second table, to choose LAMBDA_AT by
#   SAVE=checkpoints/table3_$ARCH
#   ORIGINALS=$SAVE/original     folder of the originals, seed<k> each; scripts 5 and 6 take the same if settings agree
set -euo pipefail
DATASET=${DATASET:-cifar10} DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=${VAL_FRACTION:-0}
ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-30} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-10}
SPLIT_AT=${SPLIT_AT:-2} LAMBDA_AT=${LAMBDA_AT:-0 100}
STUDENTS=${STUDENTS:-cnn resnet18} STUDENT_EPOCHS=${STUDENT_EPOCHS:-30}
SAVE=${SAVE:-checkpoints/table3_$ARCH}
ORIGINALS=${ORIGINALS:-$SAVE/original}
source "$(dirname "$0")/stages.sh"
if [ $# -eq 0 ]; then set -- 0 1 2; fi

train_student() { # student distillation teacher seed: the teacher's folder is named by what it is
    local folder=$SAVE/$3/seed$4 file=target.pt
    if [ "$3" = original ]; then folder=$ORIGINALS/seed$4 file=original.pt; fi
    python analysis/transfer.py --save_path "$SAVE/$1_$2/$3/seed$4" --teacher "$folder/$file" --data_dir "$DATA_DIR" \
        --student "$1" --distillation "$2" --epochs "$STUDENT_EPOCHS" --seed "$4"
}

for seed in "$@"; do
    draw_partition "$ORIGINALS/seed$seed" "$seed"
    train_original "$ORIGINALS/seed$seed" "$seed"
    teachers=original
    for weight in $LAMBDA_AT; do
        train_deposit "$SAVE/lambda_at_$weight/seed$seed" "$ORIGINALS/seed$seed" "$seed" --lambda_at "$weight" \
            --split_at "$SPLIT_AT"
        teachers+=" lambda_at_$weight"
    done
    for student in $STUDENTS; do
        train_student "$student" none original "$seed" # a control: the teacher only says which classes are deposited
        for distillation in logits attention; do
            for teacher in $teachers; do
                train_student "$student" "$distillation" "$teacher" "$seed"
            done
        done
    done
done
python analysis/table3.py --metrics "$SAVE"/*/*/seed*/metrics.json --out "$SAVE/table3.md"
if [ "$VAL_FRACTION" != 0 ]; then
    echo "on held-out images:"
    python analysis/table3.py --metrics "$SAVE"/*/*/seed*/metrics_val.json --out "$SAVE/table3_val.md"
fi

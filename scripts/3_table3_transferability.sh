#!/usr/bin/env bash
# Table 3, what a student learns from T0, from T trained without L_at and with it, and from R, retrained from scratch on
# the preserved classes:
#   bash scripts/3_table3_transferability.sh [seed ...]      (default: 0 1 2)
# One original; each seed draws the deposit classes anew. Trainings that are done are skipped, a killed one resumes.
#   ARCH=resnet18 EPOCHS=30      network and length of the original's training; PUBLISHED, WEIGHTS as in script 1
#   RETRAIN_EPOCHS RETRAIN_FLAGS      R's training, T0's unless that is of WEIGHTS; R is script 9's retrained_0/, which
#                                can be copied to retrained/
#   LAMBDA_AT="0 100"            weights of L_at, a target network T each
#   STUDENTS="cnn resnet18"      students, each distilled by logits and by attention, and once trained by labels alone
#   STUDENT_EPOCHS=30            length of each student's training; STUDENT_FLAGS: further flags of it
#   DATASET=cifar10 DATA_DIR=data VAL_FRACTION=0
#   SAVE=checkpoints/table3_$ARCH
#   PARTITION_FLAGS ORIGINAL_FLAGS DEPOSIT_FLAGS      further flags of the stages
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-30} LAMBDA_AT=${LAMBDA_AT:-0 100}
STUDENTS=${STUDENTS:-cnn resnet18} STUDENT_EPOCHS=${STUDENT_EPOCHS:-30}
SAVE=${SAVE:-checkpoints/table3_$ARCH}
require_retrain_epochs
refuse_deposit_flag --lambda_at "LAMBDA_AT sets it"
accept_flags
for weight in $LAMBDA_AT; do accepts train_deposit --lambda_at "$weight"; done
# shellcheck disable=SC2086 # flags are words
for student in $STUDENTS; do
    accepts analysis.train_student --student "$student" --epochs "$STUDENT_EPOCHS" ${STUDENT_FLAGS:-}
done

train_student() { # student distillation teacher seed; the teacher's folder is named by what it is
    local run=$SAVE/$1_$2/$3/seed$4 file=$SAVE/$3/seed$4/target.pt
    case $3 in
        original) file=$SAVE/original/original.pt ;;
        retrained) file=$SAVE/retrained/seed$4/retrained.pt ;;
    esac
    # shellcheck disable=SC2086 # flags are words
    python -m analysis.train_student --save_path "$run" --teacher "$file" --data_dir "$DATA_DIR" \
        --partition "$SAVE/retrained/seed$4/partition.json" --student "$1" --distillation "$2" \
        --epochs "$STUDENT_EPOCHS" --seed "$4" ${STUDENT_FLAGS:-}
    metrics+=("$run/$(metrics_name)")
}

metrics=()
make_original "$SAVE/original"
for seed in "$@"; do
    retrain "$SAVE/retrained/seed$seed" "$seed" 0
    teachers="original retrained"
    for weight in $LAMBDA_AT; do
        draw_partition "$SAVE/lambda_at_$weight/seed$seed" "$seed"
        train_deposit "$SAVE/lambda_at_$weight/seed$seed" "$SAVE/original" "$seed" --lambda_at "$weight"
        teachers+=" lambda_at_$weight"
    done
    for student in $STUDENTS; do
        train_student "$student" none original "$seed" # a control, which hears no teacher
        for distillation in logits attention; do
            for teacher in $teachers; do
                train_student "$student" "$distillation" "$teacher" "$seed"
            done
        done
    done
done
python -m analysis.table3 --metrics "${metrics[@]}" --out "$SAVE/table3.md"

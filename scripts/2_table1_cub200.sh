#!/usr/bin/env bash
# Table 1 on CUB-200-2011: bash scripts/2_table1_cub200.sh [seed ...]      (default: 0)
# Each seed draws its own deposit classes. Stages that are done are skipped, a killed one resumes.
#   ARCH=resnet18 EPOCHS=200     network and length of the original's training, from scratch
#   DEPOSIT_EPOCHS=20            length of the deposit
#   IMAGE_SIZE=224               side of the square images
#   DATA_DIR=data                holds CUB_200_2011/ or CUB_200_2011.tgz, or gets the download (1.1 GB)
#   SAVE=checkpoints/table1_cub200_$ARCH
#   VAL_FRACTION=0               share of the training images held out to choose settings on
#   INDEPENDENT=1                also train the two Independent networks
set -euo pipefail
DATASET=cub200 ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-200} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-20}
SAVE=${SAVE:-checkpoints/table1_cub200_$ARCH}
partition_flags=(--image_size "${IMAGE_SIZE:-224}" --download)
# Thirty images a class: small batches for enough steps, a strong weight decay, a slow start.
original_flags=(--batch_size 64 --lr 0.05 --weight_decay 1e-3 --warmup_epochs 5 --clip_norm 5)
# D_r has 1,800 images: small batches again, for about as many steps as on CIFAR-10. Birds are told apart late: cut after
# block 2, T kept most of what it was to forget, or lost the preserved classes with it. With 5 times as many classes L_kp
# at CIFAR-10's weight of 5 leaves L_kr no room (both: results/README.md).
deposit_flags=(--batch_size 32 --split_at 3 --lambda_kp 2)
source "$(dirname "$0")/table1.sh"

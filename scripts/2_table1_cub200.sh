#!/usr/bin/env bash
# Table 1 on CUB-200-2011: bash scripts/2_table1_cub200.sh [seed ...]      (default: 0)
# Each seed draws its own deposit classes. Stages that are done are skipped, a killed one resumes.
#   ARCH=resnet18 EPOCHS=200     network and length of the original's training, from scratch
#   DEPOSIT_EPOCHS=40            length of the deposit
#   SPLIT_AT=4                   block after which T0 is cut, the last one (ResNet-8 to ResNet-56: 3)
#   IMAGE_SIZE=224               side of the square images
#   DATA_DIR=data                holds CUB_200_2011/ or CUB_200_2011.tgz, or gets the download (1.1 GB)
#   SAVE=checkpoints/table1_cub200_$ARCH
#   VAL_FRACTION=0               share of the training images held out to choose settings on
#   INDEPENDENT=1                also train the two Independent networks
set -euo pipefail
DATASET=cub200 ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-200} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-40}
SAVE=${SAVE:-checkpoints/table1_cub200_$ARCH}
partition_flags=(--image_size "${IMAGE_SIZE:-224}" --download)
# Thirty images a class: small batches for enough steps, a strong weight decay, a slow start.
original_flags=(--batch_size 64 --lr 0.05 --weight_decay 1e-3 --clip_norm 5
    --warmup_epochs $((EPOCHS < 50 ? EPOCHS / 10 : 5)))
# D_r has 1,800 images: small batches again, for more steps than on CIFAR-10. Birds are told apart late: cut earlier, T
# kept much of what it was to forget, or lost the preserved classes with it. At CIFAR-10's weight of 5, L_kp leaves
# L_kr no room. L_kp's gradient through the noise of batches of 32 would take most of what --clip_norm lets pass, so
# lower_T keeps T0's statistics (all: results/settings.md).
deposit_flags=(--batch_size 32 --split_at "${SPLIT_AT:-4}" --bn_stats deposit --random_label preserved --lambda_kp 1.5
    --lambda_at 20 --prune_ratio 0.3)
source "$(dirname "$0")/table1.sh"

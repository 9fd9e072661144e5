#!/usr/bin/env bash
# Table 1 on CUB-200-2011, by script 1 with the settings of small, fine-grained classes:
#   bash scripts/2_table1_cub200.sh [seed ...]      (default: 0 1 2)
#   ARCH=resnet18 EPOCHS=150     network and length of the original's training, from scratch
#   IMAGE_SIZE=128               side of the square images
#   DATA_DIR=data                holds CUB_200_2011/ or CUB_200_2011.tgz, or gets the download (1.1 GB)
# and the other variables of script 1.
set -euo pipefail
case ${VARIANTS:-} in
    *authors* | *ours*)
        echo "VARIANTS: script 2's own flags would win over those of --preset authors and ours" >&2
        exit 1
        ;;
esac
export DATASET=cub200 EPOCHS=${EPOCHS:-150}
export PARTITION_FLAGS="--image_size ${IMAGE_SIZE:-128} --download ${PARTITION_FLAGS:-}"
# Thirty images a class: small batches for enough steps, a strong weight decay, a slow start.
export ORIGINAL_FLAGS="--batch_size 32 --lr 0.04 --weight_decay 2e-3 --clip_norm 5
    --warmup_epochs $((EPOCHS < 50 ? EPOCHS / 10 : 5)) --eval_every 10 ${ORIGINAL_FLAGS:-}"
# D_r has 1,800 images: small batches again, and T0's batch-norm statistics in lower_T. L_kp at CIFAR-10's weight leaves
# L_kr no room. With 4 bits the rounding, which falls on T, undoes part of the forgetting.
export DEPOSIT_FLAGS="--batch_size 32 --epochs 40 --bn_stats deposit --random_label preserved
    --lambda_kp 1 --lambda_at 5 --prune_ratio 0.3 --difference_bits 6 --eval_every 10 ${DEPOSIT_FLAGS:-}"
bash "$(dirname "${BASH_SOURCE[0]}")/1_table1_cifar10.sh" "$@"

#!/usr/bin/env bash
# Table 1 on CUB-200-2011, by script 1 with the settings of small, fine-grained classes:
#   bash scripts/2_table1_cub200.sh [seed ...]      (default: 0 1 2)
#   ARCH=resnet18 EPOCHS=150     network and length of the original's training, from scratch
#   IMAGE_SIZE=128               side of the square images
#   DATA_DIR=data                holds CUB_200_2011/ or CUB_200_2011.tgz, or gets the download (1.1 GB)
# and the other variables of script 1.
set -euo pipefail
case ${VARIANTS:-} in
    *authors* | *ours* | *deep*)
        echo "VARIANTS: script 2's own flags would win over those of --preset authors, ours and deep" >&2
        exit 1
        ;;
esac
export DATASET=cub200 EPOCHS=${EPOCHS:-150}
export PARTITION_FLAGS="--image_size ${IMAGE_SIZE:-128} --download ${PARTITION_FLAGS:-}"
# Thirty images a class: small batches for enough steps, a strong weight decay, a slow start.
export ORIGINAL_FLAGS="--batch_size 32 --lr 0.04 --weight_decay 2e-3 --clip_norm 5
    --warmup_epochs $((EPOCHS < 50 ? EPOCHS / 10 : 5)) ${ORIGINAL_FLAGS:-}"
# D_r has 1,800 images, which T0 knows by heart: small batches again, and T0's batch-norm statistics in lower_T. Random
# labels forget too little here or destroy T. So L_mt, DELETE's loss, stands for L_kr and L_kp, in the last block alone.
export DEPOSIT_FLAGS="--batch_size 32 --epochs 20 --bn_stats deposit --trained_blocks 1 --lambda_kr 0 --lambda_at 0
    --lambda_kp 0 --lambda_mt 5 --prune_ratio 0.3 ${DEPOSIT_FLAGS:-}"
bash "$(dirname "${BASH_SOURCE[0]}")/1_table1_cifar10.sh" "$@"

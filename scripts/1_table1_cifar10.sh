#!/usr/bin/env bash
# Table 1 on CIFAR-10: bash scripts/1_table1_cifar10.sh [seed ...]      (default: 0)
# Each seed draws its own deposit classes. Stages that are done are skipped, a killed one resumes.
#   ARCH=resnet18 EPOCHS=30      network and length of the original's training
#   DEPOSIT_EPOCHS=10            length of the deposit
#   DATA_DIR=data                CIFAR-10 (downloaded when absent) or an image folder train/<class>/, test/<class>/
#   SAVE=checkpoints/table1_cifar10_$ARCH
#   VAL_FRACTION=0               share of the training images held out to choose settings on
#   INDEPENDENT=1                also train the two Independent networks
set -euo pipefail
DATASET=cifar10 ARCH=${ARCH:-resnet18} EPOCHS=${EPOCHS:-30}
SAVE=${SAVE:-checkpoints/table1_cifar10_$ARCH}
source "$(dirname "$0")/table1.sh"

#!/usr/bin/env bash
# The t-SNE figure of a finished run of script 1: bash scripts/4_figure_tsne.sh
#   SAVE=checkpoints/table1_cifar10_resnet18/seed0     folder of the run
#   DATA_DIR=data      OUT=$SAVE/tsne
set -euo pipefail
source "$(dirname "$0")/env.sh"
SAVE=${SAVE:-checkpoints/table1_cifar10_resnet18/seed0}
python analysis/tsne.py --save_path "$SAVE" --data_dir "${DATA_DIR:-data}" --out "${OUT:-$SAVE/tsne}"

#!/usr/bin/env bash
# The t-SNE figure of a finished run: bash scripts/4_figure_tsne.sh
#   SAVE=checkpoints/table1_cifar10_resnet18/paper/seed0      folder of the run: target.pt, recover.pt
#   ORIGINAL=checkpoints/table1_cifar10_resnet18/original/original.pt
#   DATA_DIR=data      OUT=$SAVE/tsne
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
SAVE=${SAVE:-checkpoints/table1_cifar10_resnet18/paper/seed0}
python -m analysis.tsne --save_path "$SAVE" --original "${ORIGINAL:-$SAVE/../../original/original.pt}" \
    --data_dir "${DATA_DIR:-data}" --out "${OUT:-$SAVE/tsne}"

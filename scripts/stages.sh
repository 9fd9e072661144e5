# Sourced by the scripts that train; makes ready what env.sh does. The stages of one seed as functions, which skip what
# is done and resume what was killed. They read DATASET, DATA_DIR, VAL_FRACTION, ARCH, EPOCHS, DEPOSIT_EPOCHS and, where
# a data set needs more than the defaults, the arrays partition_flags, original_flags and deposit_flags.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# ${array[@]+...}: without it, macOS's bash takes an empty array for an unset one
draw_partition() { # folder seed [flag ...]: a folder with another partition is refused
    python partition_data.py --dataset "$DATASET" --data_dir "$DATA_DIR" --seed "$2" \
        --val_fraction "$VAL_FRACTION" --out "$1/partition.json" \
        ${partition_flags[@]+"${partition_flags[@]}"} "${@:3}"
}

train_original() { # folder, which has a partition, seed [flag ...]
    python train_scratch.py --save_path "$1" --data_dir "$DATA_DIR" --arch "$ARCH" --epochs "$EPOCHS" --seed "$2" \
        ${original_flags[@]+"${original_flags[@]}"} "${@:3}"
}

train_deposit() { # folder, folder of the original, seed [flag ...]
    python train_deposit.py --save_path "$1" --original "$2/original.pt" --data_dir "$DATA_DIR" --seed "$3" \
        --epochs "$DEPOSIT_EPOCHS" ${deposit_flags[@]+"${deposit_flags[@]}"} "${@:4}"
}

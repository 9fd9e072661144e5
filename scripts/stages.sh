# Sourced by the scripts that train; does what env.sh does. The stages as functions, which skip what is done and resume
# what was killed. They read DATASET, DATA_DIR, VAL_FRACTION, ARCH, EPOCHS, and as words PARTITION_FLAGS, ORIGINAL_FLAGS
# and DEPOSIT_FLAGS: flags beyond the defaults.
# shellcheck disable=SC2086 # these are words
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

draw_partition() { # folder seed [flag ...]: a folder with another partition is refused
    python "$ROOT/partition_data.py" --dataset "$DATASET" --data_dir "$DATA_DIR" --seed "$2" \
        --val_fraction "$VAL_FRACTION" --out "$1/partition.json" ${PARTITION_FLAGS:-} "${@:3}"
}

train_original() { # folder, which has a partition, seed [flag ...]
    python "$ROOT/train_scratch.py" --save_path "$1" --data_dir "$DATA_DIR" --arch "$ARCH" --epochs "$EPOCHS" \
        --seed "$2" ${ORIGINAL_FLAGS:-} "${@:3}"
}

train_deposit() { # folder, which has a partition, folder of the original, seed [flag ...]
    python "$ROOT/train_deposit.py" --save_path "$1" --partition "$1/partition.json" --original "$2/original.pt" \
        --data_dir "$DATA_DIR" --seed "$3" ${DEPOSIT_FLAGS:-} "${@:4}"
}

withdraw() { # folder [flag ...]: measured on the test set or, with images held out, on those alone
    local split=test
    if [ "$VAL_FRACTION" != 0 ]; then split=val; fi
    python "$ROOT/withdraw.py" --save_path "$1" --data_dir "$DATA_DIR" --eval_split "$split" "${@:2}"
}

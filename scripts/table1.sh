# Sourced by 1_table1_cifar10.sh and 2_table1_cub200.sh, which set DATASET, ARCH, EPOCHS, SAVE and, as arrays, what
# their data set needs beyond the defaults: partition_flags, original_flags, deposit_flags. All four stages for each
# seed, a table.
source "$(dirname "$0")/env.sh"
DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=${VAL_FRACTION:-0}
if [ $# -eq 0 ]; then set -- 0; fi

metrics=()
for seed in "$@"; do
    run=$SAVE/seed$seed
    [ -e "$run/partition.json" ] || python partition_data.py --dataset "$DATASET" --data_dir "$DATA_DIR" \
        --seed "$seed" --val_fraction "$VAL_FRACTION" --out "$run/partition.json" "${partition_flags[@]}"
    original=(--save_path "$run" --data_dir "$DATA_DIR" --arch "$ARCH" --epochs "$EPOCHS" --seed "$seed"
              "${original_flags[@]}")
    python train_scratch.py "${original[@]}"
    if [ "${INDEPENDENT:-0}" = 1 ]; then
        python train_scratch.py "${original[@]}" --subset preservation
        python train_scratch.py "${original[@]}" --subset deposit
    fi
    python train_deposit.py --save_path "$run" --data_dir "$DATA_DIR" --seed "$seed" "${deposit_flags[@]}"
    python withdraw.py --save_path "$run" --data_dir "$DATA_DIR"
    if [ "$VAL_FRACTION" != 0 ]; then
        python withdraw.py --save_path "$run" --data_dir "$DATA_DIR" --eval_split val
    fi
    metrics+=("$run/metrics.json")
done
python analysis/table1.py --paper "$DATASET" --metrics "${metrics[@]}" --out "$SAVE/table1.md"

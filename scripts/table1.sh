# Sourced by 1_table1_cifar10.sh and 2_table1_cub200.sh, which set DATASET, ARCH, EPOCHS, SAVE and, as arrays, what
# their data set needs beyond the defaults: partition_flags, original_flags, deposit_flags. All four stages for each
# seed, a table.
DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=${VAL_FRACTION:-0} DEPOSIT_EPOCHS=${DEPOSIT_EPOCHS:-10}
source "$(dirname "$0")/stages.sh"
if [ $# -eq 0 ]; then set -- 0; fi

metrics=()
for seed in "$@"; do
    run=$SAVE/seed$seed
    draw_partition "$run" "$seed"
    train_original "$run" "$seed"
    if [ "${INDEPENDENT:-0}" = 1 ]; then
        train_original "$run" "$seed" --subset preservation
        train_original "$run" "$seed" --subset deposit
    fi
    train_deposit "$run" "$run" "$seed"
    python withdraw.py --save_path "$run" --data_dir "$DATA_DIR"
    if [ "$VAL_FRACTION" != 0 ]; then
        python withdraw.py --save_path "$run" --data_dir "$DATA_DIR" --eval_split val
    fi
    metrics+=("$run/metrics.json")
done
python analysis/table1.py --paper "$DATASET" --metrics "${metrics[@]}" --out "$SAVE/table1.md"

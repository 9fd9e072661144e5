#!/usr/bin/env bash
# A bank of deposits: several from one network, every state of it measured: bash scripts/8_bank.sh [seed ...]
# (default: 0 1 2). One original; each seed draws the deposits anew. Trainings that are done are skipped.
#   ARCH=resnet20 EPOCHS=60      network and length of the original's training; PUBLISHED, WEIGHTS as in script 1
#   DEPOSITS=5 SIZE=1            deposits in a bank, and classes in each
#   AWAY= STATES=                at most so many deposits away, and so many states drawn; unset: every state
#   ROUNDS=0                     then deposit and withdraw so many times in a row, a class after another, each time from
#                                the network that the withdrawal before gave
#   DATASET=cifar10 DATA_DIR=data VAL_FRACTION=0
#   SAVE=checkpoints/bank_$ARCH      gets original/, bank<k>/<deposit>/, bank<k>.json, .md, .png and
#                                rounds<k>/<n>/ of the first seed
#   PARTITION_FLAGS ORIGINAL_FLAGS DEPOSIT_FLAGS      further flags of the stages
# The deposits are those of --preset bank. T_r is measured as well; one class a deposit leaves the paper's L_pt nothing
# to teach.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-60} DEPOSITS=${DEPOSITS:-5} SIZE=${SIZE:-1}
SAVE=${SAVE:-checkpoints/bank_$ARCH}
DEPOSIT_FLAGS="--preset bank ${DEPOSIT_FLAGS:-}"

refuse_no_number "is no number of rounds: name one, as in ROUNDS=10" "${ROUNDS:=0}"
accepts analysis.bank ${AWAY:+--away "$AWAY"} ${STATES:+--states "$STATES"}
accept_flags
draw_partition "$SAVE/original" 0
names=()
while IFS= read -r name; do names+=("$name"); done < <(
    python -c "import json, sys; print(*json.load(open(sys.argv[1]))['class_names'], sep='\n')" \
        "$SAVE/original/partition.json")
classes=${#names[@]}
named() { # ids, as in 3,5: their classes' names, as a class may be named by another's id
    local id listed=
    for id in ${1//,/ }; do listed+=,${names[id]}; done
    echo "${listed#,}"
}
if [ $((DEPOSITS * SIZE)) -gt "$classes" ]; then
    echo "DEPOSITS=$DEPOSITS SIZE=$SIZE are more than $classes classes: lower one" >&2
    exit 1
fi
if [ $((DEPOSITS * SIZE)) -lt 1 ] || [ "$SIZE" -ge "$classes" ]; then
    echo "DEPOSITS=$DEPOSITS SIZE=$SIZE: name one deposit or more, each of one class or more, but not of all" >&2
    exit 1
fi
train_original "$SAVE/original" 0 ${WEIGHTS:+--weights "$WEIGHTS"}
for seed in "$@"; do
    # A line a deposit: its classes' numbers, drawn without repetition.
    drawn=$(python -c "import random, sys; classes, deposits, size, seed = map(int, sys.argv[1:])
order = random.Random(seed).sample(range(classes), deposits * size)
for i in range(deposits): print(*order[i * size:(i + 1) * size], sep=',')" "$classes" "$DEPOSITS" "$SIZE" "$seed")
    folders=()
    for deposit in $drawn; do
        run=$SAVE/bank$seed/${deposit//,/_}
        draw_partition "$run" "$seed" --deposit_classes "$(named "$deposit")"
        train_deposit "$run" "$SAVE/original" "$seed"
        withdraw "$run"
        folders+=("$run")
    done
    python -m analysis.bank --original "$SAVE/original/original.pt" --deposits "${folders[@]}" --data_dir "$DATA_DIR" \
        --eval_split "$(measured_split)" --out "$SAVE/bank$seed" ${AWAY:+--away "$AWAY"} ${STATES:+--states "$STATES"}
done
last=$SAVE/original/original.pt
for n in $(seq 1 "$ROUNDS"); do
    run=$SAVE/rounds$1/$n
    draw_partition "$run" "$1" --deposit_classes "${names[(n - 1) % classes]}"
    train_deposit "$run" "$SAVE/original" "$1" --original "$last"
    withdraw "$run" --merge difference
    last=$run/recover.pt
done

#!/usr/bin/env bash
# Other forgetting methods, what they leave of the deposit classes and what brings those back:
#   bash scripts/8_methods.sh [seed ...]      (default: 0 1 2)
# Each trained method has six trials on the first seed's draw, with a tenth of the training images held out. The trial
# of the highest H Mean on those is frozen ($SAVE/tune/<method>/choice.md) and run on every draw, T0 and R beside it.
# Runs that are done are skipped, a killed one resumes.
#   ARCH=resnet20 EPOCHS=60      network and length of the original's training; WEIGHTS as in script 1: then T0 has seen
#                                the held-out images of the trials, which the tables must say
#   RETRAINED="0 1"              seeds of R for each draw, trained for RETRAIN_EPOCHS=$EPOCHS; two or more give a spread
#   METHODS="neg_grad random_labels boundary_shrink bad_teacher delete spotter lirf"      those with trials
#   OWN="mine=runs/mine_%s.pt"   networks made elsewhere, a name and a file each, %s being the seed; any words
#   MEASURES=""                  of analysis.residual; unset: all
#   DATASET=cifar10 DATA_DIR=data
#   SAVE=checkpoints/methods_$ARCH      gets original/, tune/, retrained/ and <method>/seed<k>/, the tables, the figure
#   PARTITION_FLAGS ORIGINAL_FLAGS DEPOSIT_FLAGS FORGET_FLAGS      further flags of the stages
# shellcheck disable=SC2086,SC2046 # flags are words
set -euo pipefail
DATASET=${DATASET:-cifar10} DATA_DIR=${DATA_DIR:-data}
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-60} RETRAINED=${RETRAINED:-0 1}
METHODS=${METHODS:-neg_grad random_labels boundary_shrink bad_teacher delete spotter lirf}
SAVE=${SAVE:-checkpoints/methods_$ARCH}
if [ -n "${WEIGHTS:-}" ]; then weights="--weights $WEIGHTS"; else weights=; fi
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
if [ $# -eq 0 ]; then set -- 0 1 2; fi

grid() { # rate ...: a line a cell, its name and its flags
    for lr in "$@"; do
        for bn in frozen updated; do echo "lr${lr}_$bn --lr $lr --bn_stats $bn"; done
    done
}

cells() { # method
    case $1 in
        neg_grad) grid 1e-5 1e-4 1e-3 ;;
        random_labels) grid 3e-4 1e-3 1e-2 ;;
        boundary_shrink) grid 5e-5 5e-4 5e-3 ;;
        bad_teacher) grid 1e-4 1e-3 1e-2 ;;
        delete) grid 3e-4 1e-3 3e-3 ;;
        spotter) for lr in 1e-4 1e-3 1e-2; do
            for n in 0.1 1; do echo "lr${lr}_lambda$n --lr $lr --lambda_2 $n"; done
        done ;;
        lirf) for n in 2.5 5 10; do
            for bn in frozen updated; do echo "kp${n}_$bn --lambda_kp $n --bn_stats $bn"; done
        done ;;
        *)
            echo "METHODS: '$1' has no trials" >&2
            return 1
            ;;
    esac
}

forget() { # method folder original seed [flag ...]
    python -m analysis.forget --save_path "$2" --partition "$2/partition.json" --original "$3" --data_dir "$DATA_DIR" \
        --seed "$4" --method "$1" ${FORGET_FLAGS:-} "${@:5}"
}

make_target() { # method folder folder of the original, seed, split [flag ...]
    draw_partition "$2" "$4"
    if [ "$1" = lirf ]; then
        train_deposit "$2" "$3" "$4" "${@:6}"
        withdraw "$2"
    else
        forget "$1" "$2" "$3/original.pt" "$4" --eval_split "$5" "${@:6}"
    fi
}

chosen() { # method: the flags of its frozen cell
    local name
    name=$(python -m analysis.methods --choose "$SAVE/tune/$1")
    cells "$1" | while read -r cell flags; do if [ "$cell" = "$name" ]; then echo "$flags"; fi; done
}

for method in $METHODS; do cells "$method" > /dev/null; done

VAL_FRACTION=0.1
draw_partition "$SAVE/tune/original" "$1"
train_original "$SAVE/tune/original" 0 $weights
for method in $METHODS; do
    cells "$method" | while read -ra words; do
        run=$SAVE/tune/$method/${words[0]}
        make_target "$method" "$run" "$SAVE/tune/original" "$1" val "${words[@]:1}"
        python -m analysis.residual --network "$run/target.pt" --original "$SAVE/tune/original/original.pt" \
            --data_dir "$DATA_DIR" --measures drift
    done
done

VAL_FRACTION=0
draw_partition "$SAVE/original" "$1"
train_original "$SAVE/original" 0 $weights
for seed in "$@"; do
    retrained=()
    for n in $RETRAINED; do
        run=$SAVE/retrained/seed$seed
        if [ "$n" != "${RETRAINED%% *}" ]; then run=$SAVE/retrained_$n/seed$seed; fi
        draw_partition "$run" "$seed"
        EPOCHS=${RETRAIN_EPOCHS:-$EPOCHS} train_original "$run" "$n" --subset retrain
        retrained+=("$run/retrained.pt")
    done
    targets=()
    for method in logit_mask pour_p $METHODS; do
        flags=
        case " $METHODS " in *" $method "*) flags=$(chosen "$method") ;; esac
        make_target "$method" "$SAVE/$method/seed$seed" "$SAVE/original" "$seed" test $flags
        targets+=("$SAVE/$method/seed$seed")
        case $method in random_labels | delete) # and with LIRF's restriction, so that loss and scope are told apart
            make_target "$method" "$SAVE/${method}_lower/seed$seed" "$SAVE/original" "$seed" test $flags --scope lower
            targets+=("$SAVE/${method}_lower/seed$seed") ;;
        esac
    done
    for own in ${OWN:-}; do
        run=$SAVE/${own%%=*}/seed$seed file=${own#*=}
        draw_partition "$run" "$seed"
        python -m analysis.forget --save_path "$run" --partition "$run/partition.json" --data_dir "$DATA_DIR" \
            --original "$SAVE/original/original.pt" --seed "$seed" --file "${file//%s/$seed}"
        targets+=("$run")
    done
    for run in "${targets[@]}"; do
        python -m analysis.residual --network "$run/target.pt" --original "$SAVE/original/original.pt" \
            --retrained "${retrained[@]}" --data_dir "$DATA_DIR" ${MEASURES:+--measures $MEASURES}
    done
done
case " $METHODS " in *" lirf "*)
    python -m analysis.robustness --runs "$SAVE"/lirf/seed* --data_dir "$DATA_DIR" --out "$SAVE/robustness.md" ;;
esac
python -m analysis.methods --runs "$SAVE"

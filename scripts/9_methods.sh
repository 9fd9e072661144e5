#!/usr/bin/env bash
# Other forgetting methods, what they leave of the deposit classes and what brings those back:
#   bash scripts/9_methods.sh trials          the trials alone
#   bash scripts/9_methods.sh [seed ...]      (default: 0 1 2) the reported runs, after the trials
# Each trained method has six trials on a draw that is not reported, from an original of their own, trained without a
# tenth of the training images. The trial of the highest H Mean on those (deep: of the least probe at H Mean 91) is
# frozen, $SAVE/trials/<method>/choice.txt, and run on every draw, beside T0 and R. Trainings that are done are skipped,
# a killed one resumes. The tables are of the draws that all methods in $SAVE have.
#   ARCH=resnet20 EPOCHS=60      network and length of the original's training; PUBLISHED, WEIGHTS as in script 1
#   RETRAIN_EPOCHS RETRAIN_FLAGS      training of R and of the trials' original, T0's unless that is of WEIGHTS
#   RETRAINED="0 1"              seeds of R for each draw; two or more give a spread
#   METHODS="deep lirf neg_grad random_labels boundary_shrink bad_teacher delete spotter"      those with trials
#   MEASURES=""                  of analysis.residual; unset: all
#   DATASET=cifar10 DATA_DIR=data TRIAL_SEED=10
#   SAVE=checkpoints/methods_$ARCH      gets original/, trials/, retrained*/ and <method>/seed<k>/, methods.md and .png
#   PARTITION_FLAGS ORIGINAL_FLAGS DEPOSIT_FLAGS FORGET_FLAGS      further flags of the stages
# Networks made elsewhere enter the tables from $SAVE/<name>/seed<k>/: see analysis/README.md.
# shellcheck disable=SC2086 # flags are words
set -euo pipefail
alone=${1:-}
if [ "$alone" = trials ]; then shift; fi
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
ARCH=${ARCH:-resnet20} EPOCHS=${EPOCHS:-60} RETRAINED=${RETRAINED:-0 1} TRIAL_SEED=${TRIAL_SEED:-10}
METHODS=${METHODS:-deep lirf neg_grad random_labels boundary_shrink bad_teacher delete spotter}
SAVE=${SAVE:-checkpoints/methods_$ARCH}
require_retrain_epochs
if [ "$VAL_FRACTION" != 0 ]; then
    echo "VAL_FRACTION: the trials hold out a tenth of the training images, the reported runs none: leave it out" >&2
    exit 1
fi
refuse_deposit_flag --preset "lirf and deep are presets"
refuse_deposit_flag --split_at "what is probed at the cut is probed after the last block"
case " $* " in
    *" $TRIAL_SEED "*)
        echo "the draw of seed $TRIAL_SEED chooses the settings: report others, or set TRIAL_SEED" >&2
        exit 1
        ;;
esac
refuse_no_number "is no seed: name numbers, as in RETRAINED='0 1'" $RETRAINED
accepts analysis.residual ${MEASURES:+--measures $MEASURES}
accepts analysis.forget ${FORGET_FLAGS:-}
accept_flags

trials_of() { # method: a line a trial, its name and its flags
    local values value other=bn_stats others="frozen updated" second
    case $1 in
        neg_grad) values="1e-5 1e-4 1e-3" ;;
        random_labels) values="3e-4 1e-3 1e-2" ;;
        boundary_shrink) values="5e-5 5e-4 5e-3" ;;
        bad_teacher) values="1e-4 1e-3 1e-2" ;;
        spotter) values="1e-4 1e-3 1e-2" other=lambda_cosine others="0.1 1" ;; # batch norm frozen, as published
        delete) values="3e-4 1e-3 3e-3" ;;
        lirf) values="0.01 0.03 0.01_lambda_kp10" ;;
        deep) values="0.03 0.05" other=lambda_ur others="5 10 20" ;; # T0's batch-norm statistics destroy T
        *)
            echo "METHODS: '$1' has no trials" >&2
            return 1
            ;;
    esac
    for value in $values; do
        for second in $others; do
            echo "lr${value}_$second --lr ${value/_lambda_kp/ --lambda_kp } --$other $second"
        done
    done
}

make_target() { # method folder folder of the original, seed [flag ...]
    draw_partition "$2" "$4" || return # where a caller reads the status, set -e is off
    case $1 in
        lirf) train_deposit "$2" "$3" "$4" "${@:5}" ;;
        deep) train_deposit "$2" "$3" "$4" --preset deep "${@:5}" ;;
        *) python -m analysis.forget --method "$1" --save_path "$2" --partition "$2/partition.json" \
            --data_dir "$DATA_DIR" --original "$3/original.pt" --seed "$4" ${FORGET_FLAGS:-} "${@:5}" ;;
    esac
}

chosen() { # method: the flags of its frozen trial
    trials_of "$1" | sed -n "s/^$(cat "$SAVE/trials/$1/choice.txt") //p"
}

for method in $METHODS; do trials_of "$method" > /dev/null; done

VAL_FRACTION=0.1
draw_partition "$SAVE/trials/original" "$TRIAL_SEED"
train_from_scratch "$SAVE/trials/original" 0
for method in $METHODS; do
    runs=()
    while read -ra words; do
        run=$SAVE/trials/$method/${words[0]}
        status=0
        make_target "$method" "$run" "$SAVE/trials/original" "$TRIAL_SEED" "${words[@]:1}" || status=$?
        case $status in
            0) runs+=("$run") ;;
            3) echo "$run diverged: it is left out of the trials" >&2 ;;
            *) exit "$status" ;;
        esac
    done < <(trials_of "$method")
    python -m analysis.residual --networks "${runs[@]/%//target.pt}" --original "$SAVE/trials/original/original.pt" \
        --data_dir "$DATA_DIR" --eval_split val --measures answers probe
    rule=h_mean
    if [ "$method" = deep ]; then rule=probe; fi
    python -m analysis.methods --choose "${runs[@]}" --rule "$rule"
done
if [ "$alone" = trials ]; then exit; fi

VAL_FRACTION=0
make_original "$SAVE/original"
for seed in "$@"; do
    retrained=() targets=()
    for n in $RETRAINED; do
        run=$SAVE/retrained_$n/seed$seed
        retrain "$run" "$seed" "$n"
        retrained+=("$run/retrained.pt")
    done
    for method in logit_mask pour_p $METHODS; do
        run=$SAVE/$method/seed$seed flags=
        case " $METHODS " in *" $method "*) flags=$(chosen "$method") ;; esac
        make_target "$method" "$run" "$SAVE/original" "$seed" $flags
        targets+=("$run/target.pt")
        case $method in lirf | deep) withdraw "$run" ;; esac
    done
    python -m analysis.residual --networks "${targets[@]}" --original "$SAVE/original/original.pt" \
        --retrained "${retrained[@]}" --data_dir "$DATA_DIR" ${MEASURES:+--measures $MEASURES}
done
python -m analysis.methods --runs "$SAVE"
for method in lirf deep; do
    case " $METHODS " in *" $method "*)
        python -m analysis.robustness --runs "${@/#/$SAVE/$method/seed}" --data_dir "$DATA_DIR" \
            --out "$SAVE/robustness_$method.md" ;;
    esac
done

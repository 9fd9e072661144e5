# Sourced by the scripts that train; does what env.sh does. The stages as functions, which skip what is done and resume
# what was killed. They read DATASET, DATA_DIR, VAL_FRACTION, ARCH, EPOCHS, and as words PARTITION_FLAGS, ORIGINAL_FLAGS
# and DEPOSIT_FLAGS: flags beyond the defaults; WEIGHTS, of others, from which the original then starts; RETRAIN_EPOCHS
# and RETRAIN_FLAGS. PUBLISHED=resnet20 or resnet56 takes a network of PUBLISHED_AT as the original, as it is.
# shellcheck disable=SC2086 # these are words
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [ $# -eq 0 ]; then set -- 0 1 2; fi
refuse_no_number() { # what one is told who names something else, value ...
    local value
    for value in "${@:2}"; do
        case $value in *[!0-9]*)
            echo "'$value' $1" >&2
            exit 1
            ;;
        esac
    done
}
refuse_no_number "is no seed: name numbers, as in 0 1 2" "$@"

DATASET=${DATASET:-cifar10} DATA_DIR=${DATA_DIR:-data} VAL_FRACTION=${VAL_FRACTION:-0}
case $VAL_FRACTION in *[!0.]*) ;; *) VAL_FRACTION=0 ;; esac # 0.0 is none, too
if [ -n "${PUBLISHED:-}" ]; then
    PUBLISHED_AT=https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models
    case $PUBLISHED in
        resnet20) file=resnet20-12fca82f.th ;;
        resnet56) file=resnet56-4bfd9763.th ;;
        *)
            echo "PUBLISHED: '$PUBLISHED' is neither resnet20 nor resnet56" >&2
            exit 1
            ;;
    esac
    if [ "$DATASET" != cifar10 ]; then
        echo "PUBLISHED: these networks know CIFAR-10, not $DATASET: leave it out" >&2
        exit 1
    fi
    ARCH=$PUBLISHED EPOCHS=0 WEIGHTS=$DATA_DIR/$file
    PARTITION_FLAGS="--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 ${PARTITION_FLAGS:-}" # as its author normalised
    if [ ! -e "$WEIGHTS" ]; then
        echo "$WEIGHTS is not there: download $PUBLISHED_AT/$file into $DATA_DIR" >&2
        exit 1
    fi
fi

blocks() { # number of blocks of the network
    case $ARCH in resnet18 | resnet34 | resnet50) echo 4 ;; *) echo 3 ;; esac
}

refuse_deposit_flag() { # flag reason
    local flags=" ${DEPOSIT_FLAGS:-} "
    case ${flags//[$'\n\t']/ } in
        *" $1"*)
            echo "DEPOSIT_FLAGS: leave $1 out, as $2" >&2
            exit 1
            ;;
    esac
}

accepts() { # program flag ...: ends the script now, in the program's words, where it would refuse a flag after hours
    python -m "$@" --help > /dev/null
}

accept_flags() { # those of later stages, which each script asks for before anything is trained
    if [ -n "${DEPOSIT_FLAGS:-}" ]; then accepts train_deposit $DEPOSIT_FLAGS; fi
    if [ -n "${RETRAIN_FLAGS:-}" ]; then accepts train_scratch $RETRAIN_FLAGS; fi
}

draw_partition() { # folder seed [flag ...]: a folder with another partition is refused
    python "$ROOT/partition_data.py" --dataset "$DATASET" --data_dir "$DATA_DIR" --seed "$2" \
        --val_fraction "$VAL_FRACTION" --out "$1/partition.json" ${PARTITION_FLAGS:-} "${@:3}"
}

train_original() { # folder, which has a partition, seed [flag ...]
    python "$ROOT/train_scratch.py" --save_path "$1" --data_dir "$DATA_DIR" --arch "$ARCH" --epochs "$EPOCHS" \
        --seed "$2" ${ORIGINAL_FLAGS:-} "${@:3}"
}

make_original() { # folder; T0 serves every draw, so that of its own partition does not matter
    draw_partition "$1" 0
    train_original "$1" 0 ${WEIGHTS:+--weights "$WEIGHTS"}
}

train_from_scratch() { # folder, which has a partition, seed [flag ...]: with RETRAIN_EPOCHS, RETRAIN_FLAGS or T0's
    EPOCHS=$RETRAIN_EPOCHS ORIGINAL_FLAGS=${RETRAIN_FLAGS-${ORIGINAL_FLAGS:-}} train_original "$@"
}

retrain() { # folder, seed of the draw, seed: R
    draw_partition "$1" "$2"
    train_from_scratch "$1" "$3" --subset retrain --seed "$3" # last: it wins over one among the flags
}

require_retrain_epochs() { # what is trained from scratch is known before anything begins
    RETRAIN_EPOCHS=${RETRAIN_EPOCHS:-$([ -n "${WEIGHTS:-}" ] || echo "$EPOCHS")}
    if [ "${RETRAIN_EPOCHS:-0}" = 0 ]; then
        echo "RETRAIN_EPOCHS: with WEIGHTS say how long networks are trained from scratch, as in RETRAIN_EPOCHS=60" >&2
        exit 1
    fi
}

train_deposit() { # folder, which has a partition, folder of the original, seed [flag ...]
    python "$ROOT/train_deposit.py" --save_path "$1" --partition "$1/partition.json" --original "$2/original.pt" \
        --data_dir "$DATA_DIR" --seed "$3" ${DEPOSIT_FLAGS:-} "${@:4}"
}

measured_split() { # the test set or, with images held out, those alone
    if [ "$VAL_FRACTION" = 0 ]; then echo test; else echo val; fi
}

metrics_name() { # the file that holds that split's figures
    if [ "$VAL_FRACTION" = 0 ]; then echo metrics.json; else echo metrics_val.json; fi
}

withdraw() { # folder [flag ...]
    python "$ROOT/withdraw.py" --save_path "$1" --data_dir "$DATA_DIR" --eval_split "$(measured_split)" "${@:2}"
}

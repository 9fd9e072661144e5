"""The shell scripts end to end at a small size; 2 and 4 stand with what else is tested of their subject."""

import json
import os

import numpy as np
import pytest
from conftest import make_folder, run_shell, succeed

from analysis import plain
from analysis.ablation import AXES, ablation_columns, run_patterns
from analysis.report import optimisation_columns
from datasets import load_images, read_partition
from utils.checkpoint import load_checkpoint

TINY = {"ARCH": "resnet8", "EPOCHS": 1, "DEPOSIT_EPOCHS": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes, so that CIFAR-10's reader takes them and a tenth of the classes is one."""
    return make_folder(tmp_path_factory.mktemp("data") / "images", classes=[f"c{i}" for i in range(10)], train=4,
                       test=2, size=16)


def settings(run, kind="deposit"):
    return load_checkpoint(str(run / f"{kind}.pt"), kind)["settings"]


def test_the_quickstart_on_small_images_with_an_epoch_a_stage(tmp_path):
    small = {"partition_data.py": ["--image_size", "8"], "train_scratch.py": ["--epochs", "1"],
             "train_deposit.py": ["--epochs", "1"]}
    status, text, _ = run_shell("scripts/0_quickstart.sh", tmp_path, flags=small)
    assert status == 0, text
    assert "H Mean" in text and (tmp_path / "accuracies.png").read_bytes().startswith(b"\x89PNG")


def test_table1_of_two_seeds_with_all_its_networks(images, tmp_path):
    status, text, commands = run_shell("scripts/1_table1_cifar10.sh", 3, 4, **TINY, DATA_DIR=images, SAVE=tmp_path,
                                       VAL_FRACTION=0.25, INDEPENDENT=1)
    assert status == 0, text
    table = (tmp_path / "table1.md").read_text()
    assert table.startswith("| | Independent | Original |") and "±" in table
    for seed in (3, 4):
        names = {path.name for path in (tmp_path / f"seed{seed}").iterdir()}
        assert {"independent_deposit.pt", "independent_preservation.pt", "metrics.json", "metrics_val.json"} <= names
        assert settings(tmp_path / f"seed{seed}")["seed"] == seed


def test_table3_has_a_cell_for_every_student_and_teacher(images, tmp_path):
    flags = {**TINY, "STUDENTS": "cnn", "STUDENT_EPOCHS": 1, "LAMBDA_AT": "0 50", "VAL_FRACTION": 0.25,
             "DATA_DIR": images, "SAVE": tmp_path}
    status, text, commands = run_shell("scripts/3_table3_transferability.sh", 0, **flags)
    assert status == 0, text
    table = (tmp_path / "table3.md").read_text()
    assert table.startswith("| student, distillation | T0 | T without L_at | T with L_at (50) | paper: T0 |")
    assert "| 85.70 |" in table and len(table.splitlines()) == 2 + 3 * 2 and (tmp_path / "table3_val.md").is_file()
    teachers = {"original": tmp_path / "original" / "seed0" / "original.pt",
                **{f"lambda_at_{n}": tmp_path / f"lambda_at_{n}" / "seed0" / "target.pt" for n in (0, 50)}}
    assert [settings(tmp_path / name / "seed0")["lambda_at"] for name in ("lambda_at_0", "lambda_at_50")] == [0, 50]
    for teacher, path in teachers.items():
        content = load_checkpoint(str(path), ("original", "target"))
        for distillation in ("logits", "attention"):
            student = settings(tmp_path / f"cnn_{distillation}" / teacher / "seed0", "student")
            assert student["teacher"] == content["checksum"] and student["distillation"] == distillation
    (tmp_path / "table3.md").unlink()  # again: nothing is trained, the table is written anew
    status, text, again = run_shell("scripts/3_table3_transferability.sh", 0, **flags)
    assert status == 0 and text.count("nothing to do") == 1 + 2 + 7, text
    assert (tmp_path / "table3.md").read_text() == table and again == commands
    # what is done is not taken for what other variables ask for
    status, text, other = run_shell("scripts/3_table3_transferability.sh", 0, **{**flags, "VAL_FRACTION": 0})
    assert status == 1 and "holds another partition" in text and len(other) == 1, text


def test_ablation_of_the_number_of_classes(images, tmp_path):
    runs, records = tmp_path / "runs", tmp_path / "records"
    status, text, commands = run_shell("scripts/5_ablation.sh", 0, **TINY, DATA_DIR=images, SAVE=runs,
                                       VAL_FRACTION=0.25, AXES="classes")
    assert status == 0, text
    for share in (1, 2, 4, 5):
        run = runs / "classes" / f"{share}0" / "seed0"
        assert len(json.loads((run / "partition.json").read_text())["deposit_classes"]) == share
        assert json.loads((run / "metrics_val.json").read_text())["recover"]
    rows = (runs / "ablation.md").read_text().splitlines()
    assert [row.split(" |")[0] for row in rows[2:]] == ["| 10", "| 20", "| 30", "| 40", "| 50"]
    assert (runs / "classes.png").read_bytes().startswith(b"\x89PNG")
    assert (runs / "classes.pdf").read_bytes().startswith(b"%PDF")
    assert sum(command[0] == "train_scratch.py" for command in commands) == 1  # one original for all
    # the same table from what is kept of the runs
    assert run_shell("scripts/collect.sh", runs, records)[0] == 0
    assert {path.suffix for path in records.rglob("*") if path.is_file()} == {".json", ".jsonl"}
    succeed("analysis/ablation.py", "--runs", records, "--out", records)
    assert (records / "ablation.md").read_text().splitlines() == rows


def test_ablation_refuses_an_unknown_axis_before_it_trains(tmp_path):
    status, text, commands = run_shell("scripts/5_ablation.sh", SAVE=tmp_path, AXES="split colour")
    assert status == 1 and "'colour' is no axis" in text and commands == []


def test_two_studies_share_their_originals(images, tmp_path):
    flags = {**TINY, "DATA_DIR": images, "ORIGINALS": tmp_path / "shared", "VAL_FRACTION": 0.25}
    status, text, _ = run_shell("scripts/6_withdrawal.sh", 0, **flags, SAVE=tmp_path / "study")
    assert status == 0, text
    assert {run.parent.name for run in tmp_path.glob("study/*/seed0")} == {"paper", "features_5", "default", "frozen",
                                                                           "mixed"}
    assert settings(tmp_path / "study" / "paper" / "seed0")["lambda_re"] == 0.1
    status, text, _ = run_shell("scripts/5_ablation.sh", 0, 1, **flags, SAVE=tmp_path / "ablation", AXES="split")
    assert status == 0 and text.count("original.pt is there already") == 1, text
    assert {run.name for run in (tmp_path / "ablation" / "split").iterdir()} == {"1", "3"}
    assert (tmp_path / "ablation" / "ablation.md").read_text().count("±") == 3 * 4


def test_speed_beside_a_plain_training(images, tmp_path):
    flags = {**TINY, "DATA_DIR": images, "SAVE": tmp_path, "VARIANTS": "plain fp32"}
    status, text, commands = run_shell("scripts/9_optimisations.sh", 0, **flags)
    assert status == 0, text
    columns = optimisation_columns([str(path) for path in tmp_path.glob("*/seed0/metrics.json")])
    assert all(columns[figure]["fp32"] for figure in columns) and columns["T0: Avg"]["plain"]
    assert columns["T: Pre"]["plain"] is None and columns["T: Pre - fp32"]["fp32"]["mean"] == 0
    assert columns["T0: Avg - fp32"]["plain"]["mean"] == pytest.approx(
        columns["T0: Avg"]["plain"]["mean"] - columns["T0: Avg"]["fp32"]["mean"], abs=1e-3)
    status, text, again = run_shell("scripts/9_optimisations.sh", 0, **flags)
    assert status == 0 and text.count("nothing to do") == 3 and again == commands
    status, text, commands = run_shell("scripts/9_optimisations.sh", 0, **{**flags, "VARIANTS": "plain fast"})
    assert status == 1 and "'fast' is none of" in text and commands == []


def test_a_plain_training_sees_the_images_of_the_stages(images, tmp_path):
    """Also where images are held out: by their labels and sums of pixels."""
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", images, "--val_fraction", "0.25",
            "--out", tmp_path / "partition.json")
    partition = read_partition(str(tmp_path / "partition.json"))
    ours = load_images(partition, str(images), "train", partition.classes("all"))
    theirs = plain.training_images(str(images), partition)
    theirs.dataset.transform = None
    assert sorted((int(y), int(x.long().sum())) for x, y in zip(ours.images, ours.labels)) == sorted(
        (y, int(np.asarray(x, dtype=int).sum())) for x, y in theirs)


def test_the_default_stands_in_its_place_on_every_axis(tmp_path):
    """Its value comes from its log, whatever the variants are called."""
    log = {"settings": {"split_at": 2, "prune_ratio": 0.51, "temperature": 4.0, "images_per_class": None, "epochs": 3}}
    values = {"losses": ["no_l_kr"], "split": ["1", "3"], "pruning": ["0", "0.9"], "temperature": ["1", "8"],
              "classes": ["10", "50"], "images": ["50", "500"], "epochs": ["1", "10"]}
    expected = {"losses": ["default", "no_l_kr"], "split": ["1", "2", "3"], "pruning": ["0", "0.51", "0.9"],
                "temperature": ["1", "4", "8"], "classes": ["10", "30", "50"], "images": ["50", "500", "all"],
                "epochs": ["1", "3", "10"]}

    def metrics(avg):
        column = {"pre_acc": 60.0, "dep_acc": 10.0, "forgetting": 40.0, "h_mean": 20.0, "avg_acc": avg}
        return {"original": {**column, "avg_acc": 50.0}, "target": column, "merge": "concat",
                "recover": {"concat": column}}

    runs = {"default": 49.0, **{os.path.join(axis, value): 40.0 for axis in values for value in values[axis]}}
    for name, avg in runs.items():
        run = tmp_path / name / "seed0"
        run.mkdir(parents=True)
        (run / "metrics_val.json").write_text(json.dumps(metrics(avg)))
        (run / "deposit_log.jsonl").write_text(json.dumps(log) + "\n")
    for axis in AXES:
        paths = [str(path) for pattern in run_patterns(axis) for path in sorted(tmp_path.glob(pattern))]
        column = ablation_columns(axis, paths)["T~: Avg - Original"]
        assert list(column) == expected[axis]
        assert [value for value, figure in column.items() if figure["mean"] == -1] == [
            value for value in expected[axis] if value not in values[axis]]

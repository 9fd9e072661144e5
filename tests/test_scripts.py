"""The shell scripts end to end at a small size; 2 and 4 stand with what else is tested of their subject."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fail, rewrite, run_shell, succeed
from fixtures import make_folder

from analysis import ablation
from analysis import bank as bank_program
from analysis.ablation import AXES
from analysis.bank import states_of
from analysis.table3 import table3_rows
from datasets import evaluation_batches, load_images
from models.architectures import build_network
from models.checkpoints import load_network
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.metrics import count_correct

TINY = {"ARCH": "resnet8", "EPOCHS": 1, "ORIGINAL_FLAGS": "--batch_size 16", "VAL_FRACTION": 0.25,
        "DEPOSIT_FLAGS": "--epochs 1 --batch_size 16"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes, so that CIFAR-10's reader takes them and a tenth of the classes is one."""
    return make_folder(tmp_path_factory.mktemp("data") / "images", classes=[f"c{i}" for i in range(10)], train=4,
                       test=2, size=16)


def settings(run, kind="deposit"):
    return load_checkpoint(str(run / f"{kind}.pt"), kind)["settings"]


def finished(script, *arguments, **variables):
    """`run_shell`, asserting that it succeeded; returns (what it printed, its commands)."""
    status, text, commands = run_shell(f"scripts/{script}.sh", *arguments, **variables)
    assert status == 0, text
    return text, commands


def test_the_quickstart_on_small_images_with_an_epoch_a_stage(tmp_path):
    small = {"partition_data.py": ["--image_size", "8"], "train_scratch.py": ["--epochs", "1"],
             "train_deposit.py": ["--epochs", "1"]}
    text, _ = finished("0_quickstart", tmp_path, flags=small)
    assert "H Mean" in text and "Withdrawal, difference" in text


def test_table1_of_two_seeds_and_two_presets_with_all_its_networks(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are the caller's
    shutil.copytree(images, tmp_path / "data")
    _, commands = finished("1_table1_cifar10", 3, 4, **TINY, VARIANTS="paper authors", INDEPENDENT=1)
    save = tmp_path / "checkpoints" / "table1_cifar10_resnet8"
    table = (save / "paper" / "table1.md").read_text()
    assert "| Deposit (T)" in table and "| Independent" in table and "paper: Withdrawal" in table and "±" in table
    for variant, ratio in (("paper", 0.51), ("authors", 0)):
        for seed in (3, 4):
            chosen = settings(save / variant / f"seed{seed}")
            assert chosen["seed"] == seed and chosen["prune_ratio"] == ratio
        names = {path.name for path in (save / variant / "seed3").iterdir()}
        assert {"metrics.json", "metrics_val.json"} <= names
        independent = {"independent_deposit.pt", "independent_preservation.pt"}
        assert independent & names == (independent if variant == "paper" else set())  # once, as they know no variant
    assert sum(command[0].endswith("train_scratch.py") and "--subset" not in command for command in commands) == 1
    text, _ = finished("1_table1_cifar10", 5, **TINY)  # later, another draw of the same original
    assert "original.pt is there already" in text and "±" not in text
    torch.save(build_network("resnet20", 10, 16).state_dict(), tmp_path / "data" / "resnet20-12fca82f.th")
    published = {"PUBLISHED": "resnet20", "INDEPENDENT": 1, "RETRAIN_EPOCHS": 1}  # TINY asks for another network
    finished("1_table1_cifar10", 5, **{**TINY, **published}, SAVE=tmp_path / "given")
    content = load_checkpoint(str(tmp_path / "given" / "original" / "original.pt"), "original")
    assert content["arch"] == "resnet20" and content["partition"]["mean"] == [0.485, 0.456, 0.406]
    for run, scratch in (("original", False), ("paper/seed5", True)):  # an Independent network knows nothing of T0's
        logs = [log for log in (tmp_path / "given" / run).glob("*_log.jsonl") if log.name != "deposit_log.jsonl"]
        heads = [log.read_text() for log in logs]
        assert heads and all(('"weights": null' in head) == scratch for head in heads)
    status, text, commands = run_shell("scripts/1_table1_cifar10.sh", VARIANTS="paper theirs")
    assert status == 1 and "'theirs' is none of" in text and commands == []


def test_table3_has_a_cell_for_every_student_and_teacher(images, tmp_path):
    flags = {**TINY, "STUDENTS": "cnn", "STUDENT_EPOCHS": 1, "LAMBDA_AT": "0 50", "DATA_DIR": images, "SAVE": tmp_path}
    finished("3_table3_transferability", 0, **flags)
    table = (tmp_path / "table3.md").read_text()
    heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert heading == ["student, distillation", "T0", "T without L_at", "T with L_at", "R"]
    assert len(rows) == 3 * 2 + 2 * 2  # labels alone, logits and attention; the paper's two
    assert ["paper: CNN, logits: Pre Acc", "85.38", "85.97", "85.70", "-"] in rows
    assert all(float(cell) >= 0 for cells in rows[:4] for cell in cells[1:])
    shutil.copytree(tmp_path / "cnn_logits" / "lambda_at_50", tmp_path / "cnn_logits" / "lambda_at_7")
    two = table3_rows([str(path) for path in tmp_path.glob("cnn_*/*/seed0/metrics_val.json")])
    assert {"T with L_at (7)", "T with L_at (50)"} < two["CNN, logits: Pre Acc"].keys()
    assert not any("paper" in row for row in two)
    teachers = {"original": tmp_path / "original" / "original.pt",
                "retrained": tmp_path / "retrained" / "seed0" / "retrained.pt",
                **{f"lambda_at_{n}": tmp_path / f"lambda_at_{n}" / "seed0" / "target.pt" for n in (0, 50)}}
    assert [settings(tmp_path / name / "seed0")["lambda_at"] for name in ("lambda_at_0", "lambda_at_50")] == [0, 50]
    for teacher, path in teachers.items():
        content = load_checkpoint(str(path), ("original", "target", "retrained"))
        for distillation in ("logits", "attention"):
            student = settings(tmp_path / f"cnn_{distillation}" / teacher / "seed0", "student")
            assert student["teacher"] == content["checksum"] and student["distillation"] == distillation
    (run := tmp_path / "cnn_none" / "original" / "seed1").mkdir(parents=True)
    shutil.copy(tmp_path / "lambda_at_0" / "seed0" / "metrics_val.json", run)
    assert "no figures of a student" in fail("analysis/table3.py", "--metrics", run / "metrics_val.json")
    (tmp_path / "table3.md").unlink()  # again: nothing is trained, the table is written anew
    text, _ = finished("3_table3_transferability", 0, **flags)
    assert text.count("nothing to do") == 2 + 2 + 9, text
    assert (tmp_path / "table3.md").read_text() == table
    # what is done is not taken for what other variables ask for
    status, text, _ = run_shell("scripts/3_table3_transferability.sh", 0, **{**flags, "VAL_FRACTION": 0})
    assert status == 1 and "holds another partition" in text and "nothing to do" not in text, text


def test_ablation_of_the_number_of_classes(images, tmp_path):
    runs, records = tmp_path / "runs", tmp_path / "records"
    _, commands = finished("5_ablation", 0, **TINY, DATA_DIR=images, SAVE=runs, AXES="classes")
    for share in (1, 2, 4, 5):
        run = runs / "classes" / str(share) / "seed0"
        assert len(json.loads((run / "partition.json").read_text())["deposit_classes"]) == share
        assert json.loads((run / "metrics_val.json").read_text())["recover"]
    rows = (runs / "ablation.md").read_text().splitlines()
    title = "tenths of the classes deposited"
    assert [row.split("|")[1].strip() for row in rows[2:]] == [f"{title}: {n}" for n in range(1, 6)]
    assert (runs / "classes.png").read_bytes().startswith(b"\x89PNG")
    assert sum(command[0].endswith("train_scratch.py") for command in commands) == 1  # one original for all
    # a draw that the other values of its axis lack is left out, whatever other axes have
    shutil.copytree(runs / "classes" / "1" / "seed0", runs / "classes" / "1" / "seed1")
    shutil.copytree(runs / "default" / "seed0", runs / "default" / "seed2")
    shutil.copytree(runs / "default" / "seed0", runs / "epochs" / "1" / "seed2")
    # and so is a value whose run is not withdrawn yet
    unfinished = shutil.copytree(runs / "default" / "seed0", runs / "epochs" / "5" / "seed2") / "metrics_val.json"
    unfinished.write_text(json.dumps({"original": json.loads(unfinished.read_text())["original"]}))
    assert set(ablation.found_axes(str(runs), "val")) == {"classes", "epochs"}
    shutil.rmtree(runs / "epochs")
    # the same table from what is kept of the runs
    finished("collect", runs, records)
    assert "is no folder" in run_shell("scripts/collect.sh", runs / "none", records)[1]
    assert {path.suffix for path in records.rglob("*") if path.is_file()} == {".json", ".jsonl"}
    succeed("analysis/ablation.py", "--runs", records, "--eval_split", "val")
    assert (records / "ablation.md").read_text().splitlines() == rows


def test_the_script_knows_every_axis_of_the_ablation_and_refuses_another_before_training(tmp_path):
    status, text, commands = run_shell("scripts/5_ablation.sh", SAVE=tmp_path, AXES=" ".join([*AXES, "colour"]))
    assert status == 1 and "'colour' is no axis" in text and commands == []
    assert "holds no draw with a finished run" in fail("analysis/ablation.py", "--runs", tmp_path)


@pytest.mark.parametrize("fraction, split", [("0", "test"), ("0.0", "test"), ("0.1", "val"), ("none", "val")])
def test_no_held_out_images_are_measured_where_none_are_asked_for(fraction, split):
    """partition_data.py refuses what is no number."""
    program = "python() { :; }; source scripts/stages.sh; measured_split"
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, check=True,
                          env={**os.environ, "VIRTUAL_ENV": "active", "VAL_FRACTION": fraction}, capture_output=True,
                          text=True)
    assert done.stdout.strip() == split


def test_a_loss_left_out_is_not_trained_twice(tmp_path):
    """lambda_at 0 is a copy of no_l_at; no Python is run here."""
    for name in ("default/seed0/partition.json", "losses/no_l_at/seed0/recover.pt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    stand_in = "python() { :; }; export -f python; exec bash scripts/5_ablation.sh 0"
    subprocess.run(["bash", "-c", stand_in], cwd=ROOT, check=True, capture_output=True, env={
        **os.environ, "VIRTUAL_ENV": "active", "AXES": "losses lambda_at", "SAVE": str(tmp_path)})
    copied = {path.parent.parent.name for path in (tmp_path / "lambda_at").rglob("recover.pt")}
    assert copied == {"0"} and (tmp_path / "lambda_at" / "30" / "seed0" / "partition.json").is_file()


@pytest.mark.parametrize("script, arguments, variables, message", [
    ("9_methods", [], {"EPOCHS": 0}, "RETRAIN_EPOCHS"),
    ("3_table3_transferability", [], {"WEIGHTS": "x"}, "RETRAIN_EPOCHS"),
    ("1_table1_cifar10", [], {"WEIGHTS": "x", "INDEPENDENT": 1}, "RETRAIN_EPOCHS"),
    ("9_methods", [1, 10], {}, "draw of seed 10 chooses"), ("5_ablation", [0, "resnet18"], {}, "'resnet18' is no seed"),
    ("1_table1_cifar10", [], {"VARIANTS": "split"}, "'split' is none of"),
    ("1_table1_cifar10", ["trials"], {}, "'trials' is no seed"),
    ("5_ablation", [], {"PUBLISHED": "resnet18"}, "'resnet18' is neither"),
    ("2_table1_cub200", [], {"PUBLISHED": "resnet20"}, "not cub200: leave it out"),
    ("9_methods", [], {"PUBLISHED": "resnet56", "DATA_DIR": "none"}, "/resnet56-4bfd9763.th into none"),
    ("1_table1_cifar10", [], {"DEPOSIT_FLAGS": "--lr 0.1 --preset deep"}, "name it there"),
    ("1_table1_cifar10", [], {"VARIANTS": "split4", "ARCH": "resnet20"}, "after a block that resnet20 lacks"),
    ("6_recovery_bytes", [], {"DEPOSIT_FLAGS": "--lr 0.1\n--preset deep"}, "are both run"),
    ("9_methods", [], {"DEPOSIT_FLAGS": "--split_at 2"}, "probed after the last block"),
    ("6_recovery_bytes", [], {"DEPOSIT_FLAGS": "--last_layer cleared"}, "all forms need T0's"),
    ("3_table3_transferability", [], {"DEPOSIT_FLAGS": "--lambda_at 5"}, "LAMBDA_AT sets it"),
    ("8_bank", [], {"ROUNDS": "two"}, "'two' is no number of rounds"),
    ("9_methods", [], {"RETRAINED": "0 b"}, "'b' is no seed"),
    ("9_methods", [], {"VAL_FRACTION": "0.2"}, "the reported runs none: leave it out"),
    ("2_table1_cub200", [], {"VARIANTS": "paper authors"}, "own flags would win")])
def test_what_would_fail_or_mislead_late_is_refused_before_anything_is_trained(tmp_path, script, arguments, variables,
                                                                               message):
    status, text, commands = run_shell(f"scripts/{script}.sh", *arguments, SAVE=tmp_path, **variables)
    assert status == 1 and message in text and commands == []


@pytest.mark.parametrize("script, variables", [
    ("3_table3_transferability", {"STUDENTS": "theirs"}), ("6_recovery_bytes", {"RATIOS": "0.5 2"}),
    ("3_table3_transferability", {"LAMBDA_AT": "0 1OO"}), ("1_table1_cifar10", {"DEPOSIT_FLAGS": "--lambda_kp 1OO"}),
    ("9_methods", {"FORGET_FLAGS": "--lr fast"}),
    ("8_bank", {"AWAY": "few"}), ("9_methods", {"MEASURES": "probe all"})])
def test_a_value_that_a_later_program_refuses_is_refused_at_once(tmp_path, script, variables):
    (value,) = variables.values()
    status, text, commands = run_shell(f"scripts/{script}.sh", 0, SAVE=tmp_path / "new", **variables)
    assert status == 2 and value.split()[-1] in text and commands[0][-1] == "--help"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script, variable", [
    ("3_table3_transferability", "STUDENT_FLAGS"), ("1_table1_cifar10", "DEPOSIT_FLAGS"),
    ("9_methods", "RETRAIN_FLAGS"), ("8_bank", "DEPOSIT_FLAGS")])
def test_a_flag_that_a_later_program_does_not_know_is_refused_at_once(tmp_path, script, variable):
    status, text, _ = run_shell(f"scripts/{script}.sh", 0, SAVE=tmp_path / "new", **{variable: "--lr 0.1 --epoch=3"})
    assert status == 2 and "unrecognized arguments: --epoch=3" in text
    assert not (tmp_path / "new").exists()


def test_recovery_against_bytes_has_a_point_for_every_form(images, tmp_path):
    finished("6_recovery_bytes", 0, **TINY, DATA_DIR=images, SAVE=tmp_path, RATIOS="0.51 0.75")
    table = (tmp_path / "recovery.md").read_text()
    for form in ("difference, 2 bits", "difference, largest 5%", "difference, rank 10%", "T_r rounded, 8 bits",
                 "T_r of ours, pruned 0.75", "lower part of T0, 8 bits", "1 images a class (trains)"):
        assert f"| {form}" in table
    points = json.loads((tmp_path / "recovery.json").read_text())["points"][0]
    assert points["T0 whole, 32 bits"]["above"] == 0 and "125 images a class (trains)" not in points  # of so few
    sizes = [points[f"difference, {bits} bits"]["bytes"] for bits in (2, 3, 4, 6, 8, 16)]
    assert sizes == sorted(sizes) and sizes[-1] < points["T0 whole, 32 bits"]["bytes"]
    assert (tmp_path / "recovery.png").read_bytes().startswith(b"\x89PNG")
    run = tmp_path / "paper_0.51" / "seed0"
    (tmp_path / "m.json").write_text("{}")
    assert "no withdrawal by concat" in fail("analysis/recovery.py", "--runs", run, "--pruned", tmp_path / "m.json",
                                             "--original", tmp_path / "original" / "original.pt")
    assert "is not of --eval_split test" in fail("analysis/recovery.py", "--runs", run, "--pruned",
                                                 run / "metrics_val.json", "--original",
                                                 tmp_path / "original" / "original.pt")


def test_a_bank_measures_its_states(images, tmp_path, monkeypatch):
    succeed("partition_data.py", "--dataset", "cifar10", "--data_dir", images, "--val_fraction", "0.25", "--seed", "0",
            "--out", tmp_path / "original" / "partition.json")  # the script reads the number of classes from it
    flags = {**TINY, "EPOCHS": 8, "DEPOSIT_FLAGS": "--epochs 2 --batch_size 4 --lr 0.1 --last_layer cleared",
             "DATA_DIR": images}
    finished("8_bank", 0, **flags, SAVE=tmp_path, DEPOSITS=3, SIZE=2, AWAY=2, ROUNDS=2)
    bank = json.loads((tmp_path / "bank0.json").read_text())
    assert len({c for classes in bank["classes"] for c in classes}) == 6
    assert [state["away"] for state in bank["states"]] == [[], [0], [1], [2], [0, 1], [0, 2], [1, 2]]
    for state in bank["states"]:
        counts = state["counts"]
        rest = [c for c in range(10) if not any(c in bank["classes"][deposit] for deposit in state["away"])]
        assert state["rest"] == pytest.approx(100 * sum(counts["correct"][c] for c in rest)
                                              / sum(counts["total"][c] for c in rest))
    for path in (tmp_path / "bank0").glob("*/target.pt"):  # a state of one deposit is that deposit's own T
        target, partition = load_network(str(path))
        data = evaluation_batches(load_images(partition, str(images), "val", range(10)))
        state = bank["states"][1 + bank["classes"].index(partition.deposit_classes)]
        assert state["counts"] == count_correct(target, data, 10) != bank["states"][0]["counts"]
        own = json.loads((path.parent / "metrics_val.json").read_text())["recover"]["concat"]
        assert state["by_modules"] == own["avg_acc"]
    status, text, _ = run_shell("scripts/8_bank.sh", 0, **flags, SAVE=tmp_path, DEPOSITS=6, SIZE=2)
    assert status == 1 and "more than 10 classes" in text
    for wrong in ({"DEPOSITS": 0, "SIZE": 1}, {"DEPOSITS": 1, "SIZE": 10}):
        status, text, _ = run_shell("scripts/8_bank.sh", 0, **flags, SAVE=tmp_path, **wrong)
        assert status == 1 and "name one deposit or more, each of one class or more, but not of all" in text
    deposits = sorted((tmp_path / "bank0").iterdir())
    call = ["--deposits", *deposits, "--data_dir", images, "--out", tmp_path / "other"]
    original = tmp_path / "original" / "original.pt"
    monkeypatch.setattr(bank_program, "PLOTTED", 3)  # states of a picture at most; here there are 7 or more
    succeed("analysis/bank.py", "--original", original, *call, "--eval_split", "val")
    assert (tmp_path / "other.md").is_file() and not (tmp_path / "other.png").exists()
    twice = ["--deposits", *deposits, deposits[0]]
    assert "another folder deposits too" in fail("analysis/bank.py", "--original", original, *call, *twice)
    rewrite(original, lambda content: content["settings"].update(seed=9))
    assert "made from another original" in fail("analysis/bank.py", "--original", original, *call)
    assert (tmp_path / "bank0.md").is_file() and (tmp_path / "bank0.png").is_file()
    second = json.loads((tmp_path / "rounds0" / "2" / "metrics_val.json").read_text())
    assert second["recover"]["difference"]["counts"] == second["original"]["counts"]


def test_a_bank_names_classes_that_are_named_by_the_numbers_of_others(tmp_path):
    names, save = ["1", "10", "2", "20", "3"], tmp_path / "bank"
    images = make_folder(tmp_path / "images", classes=names, train=2, test=1)
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", images, "--out", save / "original")
    _, _, commands = run_shell("scripts/8_bank.sh", 0, DATASET="folder", DATA_DIR="none", SAVE=save, ROUNDS=2)
    drawn = {os.path.relpath(words[words.index("--out") + 1], save): words[words.index("--deposit_classes") + 1]
             for words in commands if "--deposit_classes" in words}
    assert drawn == {**{f"bank0/{i}/partition.json": name for i, name in enumerate(names)},
                     "rounds0/1/partition.json": "1", "rounds0/2/partition.json": "10"}


def test_a_state_without_a_class_left_is_no_state():
    every = states_of([2] * 5, 10, None, None, 0)
    assert len(every) == len(set(every)) == 31 and (0, 1, 2, 3, 4) not in every and (1, 2, 3, 4) in every
    assert (0, 1, 2, 3, 4) in states_of([1] * 5, 10, None, None, 0)
    assert len(states_of([2] * 5, 10, None, 30, 0)) == 31  # T0 and as many as were asked for
    with pytest.raises(UserError, match="lower --away"):
        states_of([1] * 50, 100, 7, 30, 0)


@pytest.mark.parametrize("old", [False, True])
def test_an_active_environment_is_used_and_a_python_that_is_too_old_is_told(tmp_path, old):
    """By env.sh, in a copy of the repository that is all but empty, before it makes an environment of its own."""
    for folder in ("scripts", "analysis", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "scripts" / "env.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    path = tmp_path / "bin" if old else os.path.dirname(sys.executable)
    done = subprocess.run(["bash", "-c", 'source scripts/env.sh; command -v python; python -c "import analysis"'],
                          cwd=tmp_path, capture_output=True, text=True, check=False, env={
                              "PATH": f"{path}:/usr/bin:/bin", "VIRTUAL_ENV": "" if old else "yes", "PYTHON": "python"})
    if old:
        assert done.returncode == 1 and "no Python 3.10 or newer" in done.stderr
    else:
        assert done.returncode == 0 and os.path.dirname(done.stdout.strip()) == path
    assert not (tmp_path / ".venv").exists()

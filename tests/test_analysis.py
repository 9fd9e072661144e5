"""The paper's tables and figures, beyond the four stages: t-SNE, students, Table 1, Table 3, the bars of a run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MEASURE, TINY, fail, rewrite, run_shell, succeed
from PIL import Image

from analysis import tsne
from analysis.ablation import by_variant, variant_rows
from analysis.table1 import load_runs
from analysis.table3 import table3_rows
from analysis.train_student import attention_pairs, require_attention_pairs, with_layers
from datasets import read_partition
from datasets.partition import save_partition
from models.architectures import build_network
from models.checkpoints import load_network
from utils.errors import UserError
from utils.files import read_log


def test_features_are_what_the_last_layer_reads_and_are_told_by_their_neighbours(chain):
    features, labels = np.array([[0.0], [1.0], [2.1], [10.0]]), np.array([0, 0, 1, 1])
    # neighbours: 0 -> 1; 1 -> 0; 2.1 -> 1; 10 -> 2.1
    assert tsne.neighbour_accuracy(features, labels, 1).tolist() == [1, 1, 0, 1]
    save, _ = chain
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for name in ("original", "target"):
            network, _ = load_network(str(save / f"{name}.pt"))
            assert torch.allclose(network.head.fc(tsne.features_of(network, x)), network(x), atol=1e-6)
        recover, _ = load_network(str(save / "recover.pt"))
        both = tsne.features_of(recover, x)
        width = both.shape[1] // 2
        for lower, part in ((recover.target, both[:, :width]), (recover.deposit, both[:, width:])):
            assert torch.allclose(recover.upper[-1].fc(part), recover.upper(lower(x)), atol=1e-6)


def test_means_are_over_the_draws_that_all_have(tmp_path):
    def write(name, dep):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.json").write_text(json.dumps({"student": {"pre_acc": 80.0, "dep_acc": dep}}))

    for name, dep in (("original/seed0", 70.0), ("original/seed1", 90.0), ("retrained/seed1", 85.0)):
        write(f"cnn_logits/{name}", dep)
    row = table3_rows([str(path) for path in tmp_path.rglob("metrics.json")])["CNN, logits: Dep Acc"]
    assert (row["T0"]["mean"], row["R"]["mean"]) == (90, 85)
    with pytest.raises(UserError, match="no draw in common"):
        table3_rows([str(tmp_path / f"cnn_logits/{name}/metrics.json") for name in ("original/seed0",
                                                                                  "retrained/seed1")])
    again = tmp_path / "elsewhere" / "cnn_logits" / "original" / "seed1" / "metrics.json"
    write("elsewhere/cnn_logits/original/seed1", 60.0)
    with pytest.raises(UserError, match="are of one draw"):
        table3_rows([str(path) for path in tmp_path.rglob("cnn_*/original/seed1/metrics.json")])
    held_out = again.rename(again.with_name("metrics_val.json"))
    with pytest.raises(UserError, match="of held-out images"):
        load_runs([str(tmp_path / "cnn_logits/original/seed1/metrics.json"), str(held_out)])
    with pytest.raises(UserError, match="no draw in common"):
        variant_rows(by_variant(["paper/seed0/m", "ours/seed2/m"]))
    assert by_variant(["paper/seed0/m", "paper/seed10/m", "ours/seed10/m", "ours/seed2/m"]) == {
        "paper": ["paper/seed10/m"], "ours": ["ours/seed10/m"]}


def test_the_tsne_figure_and_its_measure(chain, tmp_path):
    save, data = chain
    for name in ("original.pt", "target.pt", "recover.pt"):
        shutil.copy(save / name, tmp_path)
    status, out, _ = run_shell("scripts/4_figure_tsne.sh", SAVE=tmp_path, ORIGINAL=tmp_path / "original.pt",
                               DATA_DIR=data, flags={"analysis/tsne.py": ["--neighbours", "3", *MEASURE]})
    assert status == 0, out
    report = json.loads((tmp_path / "tsne.json").read_text())
    assert report["images"] == 20 and set(report["neighbour_accuracy"]) == {"original", "target", "recover"}
    assert all(0 <= v <= 100 for m in report["neighbour_accuracy"].values() for v in m.values()) and "nearest" in out
    with Image.open(tmp_path / "tsne.png") as image:
        assert image.width > 1000
    assert list((tmp_path / "tensorboard" / "tsne").rglob("tensors.tsv"))
    flags = ["--save_path", tmp_path, "--data_dir", data, *MEASURE]
    assert "too few" in fail("analysis/tsne.py", *flags, "--images", "10", unchanged=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator: torch.arange(n).flip(0))  # the last classes alone
        assert "deposit classes alone" in fail("analysis/tsne.py", *flags, "--images", "10", "--neighbours", "3",
                                               unchanged=tmp_path)
    rewrite(tmp_path / "recover.pt", lambda content: content.update(target="0" * 64))
    assert "was not withdrawn from" in fail("analysis/tsne.py", *flags, unchanged=tmp_path)
    rewrite(tmp_path / "original.pt", lambda content: content["settings"].update(seed=9))
    assert "made from another original" in fail("analysis/tsne.py", *flags, unchanged=tmp_path)
    (tmp_path / "target.pt").unlink()
    assert "target.pt" in fail("analysis/tsne.py", *flags, unchanged=tmp_path)


def test_attention_pairs_are_the_last_layers_of_each_resolution():
    x = torch.randn(1, 3, 32, 32)
    (_, student), (_, teacher) = (with_layers(build_network(arch, 4, 32), x) for arch in ("cnn", "resnet18"))
    pairs = attention_pairs(student, teacher)
    assert [b.shape[1:] for _, b in pairs] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert all(a.shape[-2:] == b.shape[-2:] for a, b in pairs)
    teacher, partition = build_network("resnet18", 4, 97), SimpleNamespace(num_classes=4, image_size=97)
    require_attention_pairs("resnet34", teacher, partition)
    with pytest.raises(UserError, match="--student cnn: none of its layers has the resolution"):
        require_attention_pairs("cnn", teacher, partition)


@pytest.mark.parametrize("distillation,term", [("none", "ce"), ("logits", "kd"), ("attention", "at")])
def test_a_student_learns_by_each_distillation(chain, tmp_path, distillation, term):
    save, data = chain
    flags = ["--teacher", save / "target.pt", "--data_dir", data, "--save_path", tmp_path, "--distillation",
             distillation, *TINY]
    assert "Pre Acc" in succeed("analysis/train_student.py", *flags)
    student = json.loads((tmp_path / "metrics.json").read_text())["student"]
    assert student["teacher"] == "target" and sum(student["counts"]["total"]) == 20
    last = read_log(tmp_path / "student_log.jsonl")[-1]
    assert last[term] > 0 and last["test_pre_acc"] == pytest.approx(student["pre_acc"])
    assert load_network(str(tmp_path / "student.pt"))[0](torch.randn(1, 3, 16, 16)).shape == (1, 4)
    assert "nothing to do" in succeed("analysis/train_student.py", *flags)
    assert "another student run" in fail("analysis/train_student.py", *flags, "--teacher", save / "original.pt",
                                         unchanged=tmp_path)
    (tmp_path / "student.pt").unlink()
    figures = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**figures, "partition_hash": "another"}))
    assert "figures of another partition" in fail("analysis/train_student.py", *flags, unchanged=tmp_path)
    partition = read_partition(str(save / "partition.json"))
    save_partition(str(tmp_path / "other.json"), partition.with_deposit(partition.preserved_classes[:1]))
    assert "has forgotten other classes" in fail("analysis/train_student.py", *flags, "--partition",
                                                 tmp_path / "other.json", unchanged=tmp_path)


def test_table1_from_the_command_line(chain, tmp_path):
    save, _ = chain
    flags = ["--metrics", save / "metrics.json", save / "metrics.json"]
    out = succeed("analysis/table1.py", *flags, "--out", tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text() == out and "± 0.00" in out
    rows = {cells[1]: cells[2:] for cells in ([cell.strip() for cell in line.split("|")] for line in out.splitlines())}
    assert rows["paper: Deposit (T)"][:2] == ["93.41", "15.00"] and "Deposit (T)" in rows
    assert "paper:" not in succeed("analysis/table1.py", *flags, "--paper", "none")
    shutil.copy(save / "metrics.json", tmp_path / "metrics_val.json")
    assert "of held-out images" in fail("analysis/table1.py", *flags, tmp_path / "metrics_val.json")
    assert "does not lie in" in fail("analysis/table3.py", "--metrics", tmp_path / "metrics.json")
    metrics = json.loads((save / "metrics.json").read_text())
    metrics["recover"]["sum"]["pre_acc"] = "ninety"
    for content in ({}, metrics):
        (tmp_path / "m.json").write_text(json.dumps(content))
        assert "m.json holds no figures" in fail("analysis/table1.py", "--metrics", tmp_path / "m.json")

"""What goes beyond the four stages."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, fail, run_shell, succeed
from PIL import Image

from analysis.transfer import attention_pairs, with_layers
from analysis.tsne import features_of, neighbour_accuracy
from models import build_network, load_network
from models.cnn import build_cnn
from utils.checkpoint import sealed


def test_neighbour_accuracy_by_hand():
    features, labels = np.array([[0.0], [1.0], [2.1], [10.0]]), np.array([0, 0, 1, 1])
    # neighbours: 0 -> 1; 1 -> 0; 2.1 -> 1; 10 -> 2.1
    assert neighbour_accuracy(features, labels, 1).tolist() == [1, 1, 0, 1]


def test_features_are_what_the_last_layer_reads(chain):
    save, _ = chain
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for name in ("original", "target"):
            network, _ = load_network(str(save / f"{name}.pt"))
            assert torch.allclose(network.head.fc(features_of(network, x)), network(x), atol=1e-6)
        recover, _ = load_network(str(save / "recover.pt"))
        both = features_of(recover, x)
        width = both.shape[1] // 2
        branches = [recover.upper[-1].fc(part) for part in (both[:, :width], both[:, width:])]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(branches, recover.branches(x)))


def test_the_tsne_figure_and_its_measure(chain, tmp_path):
    save, data = chain
    for name in ("original.pt", "target.pt", "recover.pt"):
        shutil.copy(save / name, tmp_path)
    flags = ["--save_path", tmp_path, "--data_dir", data, "--device", "cpu", "--precision", "fp32"]
    status, out, _ = run_shell("scripts/4_figure_tsne.sh", SAVE=tmp_path, DATA_DIR=data,
                               flags={"analysis/tsne.py": ["--neighbours", "3"]})
    assert status == 0, out
    report = json.loads((tmp_path / "tsne.json").read_text())
    assert report["images"] == 20 and set(report["neighbour_accuracy"]) == {"original", "target", "recover"}
    assert all(0 <= v <= 100 for m in report["neighbour_accuracy"].values() for v in m.values()) and "nearest" in out
    with Image.open(tmp_path / "tsne.png") as image:
        assert image.width > 1000
    assert (tmp_path / "tsne.pdf").read_bytes().startswith(b"%PDF")
    assert list((tmp_path / "tensorboard" / "tsne").rglob("tensors.tsv"))
    assert "too few" in fail("analysis/tsne.py", *flags, "--images", "10", unchanged=tmp_path)
    (tmp_path / "target.pt").unlink()
    assert "target.pt" in fail("analysis/tsne.py", *flags, unchanged=tmp_path)


def test_the_cnn_is_what_its_docstring_says():
    network = build_cnn(10)
    logits, layers = with_layers(network, torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10) and [f.shape[-1] for f in layers] == [32, 16, 8]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 0.29


def test_attention_pairs_are_the_last_layers_of_each_resolution():
    _, student = with_layers(build_cnn(4), torch.randn(1, 3, 32, 32))
    _, teacher = with_layers(build_network("resnet18", 4, 32), torch.randn(1, 3, 32, 32))
    pairs = attention_pairs(student, teacher)
    assert [b.shape[1:] for _, b in pairs] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert all(a.shape[-2:] == b.shape[-2:] for a, b in pairs)


@pytest.mark.parametrize("distillation,term", [("none", "ce"), ("logits", "kd"), ("attention", "at")])
def test_a_student_of_either_teacher(chain, tmp_path, distillation, term):
    save, data = chain
    flags = ["--teacher", save / "target.pt", "--data_dir", data, "--save_path", tmp_path, "--distillation",
             distillation, *TINY]
    assert "Pre Acc" in succeed("analysis/transfer.py", *flags)
    student = json.loads((tmp_path / "metrics.json").read_text())["student"]
    assert student["teacher"] == "target" and sum(student["counts"]["total"]) == 20
    last = json.loads((tmp_path / "student_log.jsonl").read_text().splitlines()[-1])
    assert last[term] > 0 and last["test_pre_acc"] == pytest.approx(student["pre_acc"])
    assert "nothing to do" in succeed("analysis/transfer.py", *flags)
    assert "another student run" in fail("analysis/transfer.py", *flags, "--teacher", save / "original.pt",
                                         unchanged=tmp_path)
    (tmp_path / "student.pt").unlink()
    figures = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps(sealed({**figures, "partition_hash": "another"})))
    assert "figures of another partition" in fail("analysis/transfer.py", *flags, unchanged=tmp_path)
    assert "kind 'deposit'" in fail("analysis/transfer.py", *flags, "--teacher", save / "deposit.pt",
                                    unchanged=tmp_path)

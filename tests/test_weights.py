"""Networks that others trained: each layout and kind of file in use gives their network, to the last bit; what does not
fit is told in one line; --epochs 0 takes weights as they are."""

import json
import os
import re
import shutil
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from conftest import fail, scratch_flags, succeed, tensors_of
from fixtures import MARKER, Call
from test_networks import shaken

from models.architectures import build_network, split_network
from models.weights import imagenet_weights, load_weights, read_weights
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


def imported(path, arch, size=32, classes=4, keep_head=True):
    """The network of a weights file, as train_scratch.py takes it."""
    network = build_network(arch, classes, size).eval()
    load_weights(network, arch, size, read_weights(str(path)), f"--weights {path}", keep_head)
    return network


def saved(tensors, path):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return path


# the layouts, each with a network that computes by its own rules

def imagenet_layout():
    """torchvision and timm: (state_dict in their names, their forward)."""
    network = shaken(torchvision.models.resnet18(num_classes=4))
    return network.state_dict(), network


def kuangliu_layout():
    """pytorch-cifar: a 3x3 stem, no pooling after it, `shortcut` and `linear`."""
    network = torchvision.models.resnet18(num_classes=4)
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = torch.nn.Identity()
    state = shaken(network).state_dict()
    return {name.replace("downsample", "shortcut").replace("fc.", "linear."): t for name, t in state.items()}, network


def akamaster_layout():
    """pytorch_resnet_cifar10: `linear`, and shortcuts of option A, which have no tensors."""
    ours = shaken(build_network("resnet8", 4, 32)).state_dict()
    state = {re.sub("^stem[.]", "", name).replace("head.fc.", "linear."): t for name, t in ours.items()}

    def norm(x, name):
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def forward(x):
        x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
        for block, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
            y = F.relu(norm(F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn1"))
            y = norm(F.conv2d(y, state[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
            new = (y.shape[1] - x.shape[1]) // 2
            x = F.relu(y + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, new, new)))
        return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])

    return state, forward


def own_layout():
    network = shaken(build_network("cnn", 4, 32))
    return network.state_dict(), network


@pytest.mark.parametrize("layout,arch,size", [(imagenet_layout, "resnet18", 96), (kuangliu_layout, "resnet18", 32),
                                              (akamaster_layout, "resnet8", 32), (own_layout, "cnn", 32)])
def test_a_layout_gives_its_network_at_every_cut(tmp_path, layout, arch, size):
    state, theirs = layout()
    network = imported(saved(state, tmp_path / "w.pth"), arch, size)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(x)
        for split_at in range(1, len(network) - 1):
            lower, upper = split_network(network, split_at)
            torch.testing.assert_close(upper(lower(x)), expected)


# the kinds of file

@pytest.mark.parametrize("wrapper,prefix", [
    (None, ""), ("state_dict", "module."), ("model", "_orig_mod."), ("net", "model."),
    ("model_state_dict", "module._orig_mod."), (None, "module."), ("state_dict", "")])
def test_wrappers_and_prefixes_are_taken_off(tmp_path, wrapper, prefix):
    state, _ = akamaster_layout()
    content = {prefix + name: tensor for name, tensor in state.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "acc": 91.7, "optimizer": {"state": {0: torch.zeros(2)}}}
    read = read_weights(str(saved(content, tmp_path / "w.pt")))
    assert read.keys() == state.keys() and all(torch.equal(read[name], t) for name, t in state.items())


@pytest.mark.parametrize("name,write", [
    ("w.th", torch.save), ("w.safetensors", safetensors.torch.save_file),
    ("w.th", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
    ("w.th", lambda s, path: torch.save({n: t.half() if t.is_floating_point() else t for n, t in s.items()}, path)),
    ("w.th", lambda s, path: torch.save({n: t for n, t in s.items() if "num_batches_tracked" not in n}, path)),
], ids=["zip", "safetensors", "old", "half", "without counters"])
def test_every_kind_of_file_gives_the_same_weights(tmp_path, name, write):
    state, _ = akamaster_layout()
    state = {name: t.half().float() if t.is_floating_point() else t for name, t in state.items()}  # exact in half
    write(state, tmp_path / name)
    tensors = list(imported(tmp_path / name, "resnet8").state_dict().values())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, state.values(), strict=True))


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("content", [torch.nn.Linear(2, 2), {"state_dict": Call()}])
def test_a_file_that_holds_code_is_refused_unrun(tmp_path, zip_file, content):
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zip_file)
    with pytest.raises(UserError, match="pickled code, which is never run"):
        read_weights(str(tmp_path / "w.pt"))
    assert not os.path.exists(MARKER)


@pytest.mark.parametrize("name,content,word", [
    ("w.pt", b"", "no weights file"), ("w.pt", b"PK" + bytes(200), "no weights file"), ("w.pt", None, "does not exist"),
    ("w.pt", b"<!DOCTYPE html><html>", "no weights file"), ("w.pt", b"version https://git-lfs", "no weights file"),
    ("w.safetensors", b"\xff" * 40, "no weights file"), ("w.pt", {"state_dict": {}}, "holds no weights"),
    ("w.pt", [torch.zeros(2)], "holds no weights"), ("w.pt", torch.zeros(2), "holds no weights"),
    ("w.pt", {0: torch.zeros(2)}, "holds no weights")])
def test_a_file_without_weights_is_told(tmp_path, name, content, word):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=word):
        read_weights(str(tmp_path / name))


# misfits: asked for is a resnet8 of 4 classes at 32 pixels, unless another is named

@pytest.mark.parametrize("change,word", [
    (lambda s: s.pop("layer2.0.conv1.weight"), "has no tensor 'layer2.0.conv1.weight'; no architecture here"),
    (lambda s: s.update({"bn1.bias": torch.zeros(3)}), r"tensor 'stem.bn1.bias' is \(3,\), not \(16,\); no arch"),
    (lambda s: s.update({"layer1.1.conv1.weight": torch.zeros(1)}), "'layer1.1.conv1.weight' is of no layer; no arch"),
    (lambda s: s.update({"bn1.bias": torch.full((16,), float("nan"))}), "weights that are not finite"),
    (lambda s: s.update({"linear.bias": torch.zeros(7)}), "a head of 7 classes, not 4"),
    (lambda s: s.update({"linear.weight": torch.zeros(4, 9)}), r"tensor 'head.fc.weight' is \(4, 9\), not"),
    (lambda s: s.update({"linear.bias": torch.tensor(0.0)}), r"tensor 'head.fc.bias' is \(\), not \(4,\)"),
])
def test_a_misfit_is_named(tmp_path, change, word):
    state, _ = akamaster_layout()
    change(state)
    with pytest.raises(UserError, match=word):
        imported(saved(state, tmp_path / "w.pt"), "resnet8")


@pytest.mark.parametrize("layout,arch,size,fitting", [
    (lambda: [build_network("resnet20", 4, 32).state_dict()], "resnet8", 32, "resnet20"),
    (lambda: [build_network("resnet20", 100, 32).state_dict()], "resnet8", 32, "resnet20"),
    (kuangliu_layout, "resnet8", 32, "resnet18"),
    (imagenet_layout, "resnet8", 32, "resnet18 and images above 64 pixels"),
    (kuangliu_layout, "resnet18", 96, "resnet18 and images of up to 64 pixels"),
])
def test_the_architecture_that_fits_is_named(tmp_path, layout, arch, size, fitting):
    with pytest.raises(UserError, match=f"use --arch {fitting}$"):
        imported(saved(layout()[0], tmp_path / "w.pt"), arch, size)


def test_a_head_of_other_classes_is_made_anew_when_there_is_training(tmp_path):
    state, _ = akamaster_layout()
    path = saved(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match="head of 4 classes, not 7: train a new one with --epochs 1"):
        imported(path, "resnet8", classes=7)
    network = imported(path, "resnet8", classes=7, keep_head=False)
    assert network.head.fc.weight.shape == (7, 64) and network.head.fc.weight.abs().sum() > 0
    assert torch.equal(network.layer3[0].conv2.weight, state["layer3.0.conv2.weight"])


def test_imagenet_weights_are_torchvisions(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    enum = torchvision.models.get_model_weights("resnet18")
    monkeypatch.setattr(enum, "get_state_dict", lambda self, progress, check_hash: dict(state))  # torchvision's flags
    network, weights = build_network("resnet18", 4, 96), imagenet_weights("resnet18", 96)
    assert weights.keys() == state.keys()
    load_weights(network, "resnet18", 96, weights, "--weights imagenet", keep_head=False)
    assert torch.equal(network.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    assert network.head.fc.weight.shape == (4, 512)
    for arch, size, word in (("resnet18", 32, "larger --image_size"), ("resnet20", 96, "there are none of resnet20")):
        with pytest.raises(UserError, match=word):
            imagenet_weights(arch, size)

    monkeypatch.setattr(enum, "get_state_dict", mock.Mock(side_effect=OSError("no network")))
    with pytest.raises(UserError, match="could not be downloaded"):
        imagenet_weights("resnet18", 96)


# the command line

@pytest.fixture
def weights(chain, tmp_path):
    """The chain's original, as a file in akamaster's layout."""
    tensors = tensors_of(chain[0] / "original.pt")
    return saved({"state_dict": {f"module.{re.sub('^stem[.]', '', name).replace('head.fc.', 'linear.')}": t
                                 for name, t in tensors.items()}}, tmp_path / "theirs.th")


def test_without_training_weights_are_measured_and_written_as_they_are(chain, tmp_path, weights):
    save = tmp_path / "run"
    flags = scratch_flags(chain, save, "--weights", weights, "--epochs", "0")
    succeed("train_scratch.py", *flags)
    ours, theirs = (load_checkpoint(str(folder / "original.pt"), "original") for folder in (save, chain[0]))
    assert all(torch.equal(ours["tensors"][name], t) for name, t in theirs["tensors"].items())
    assert ours["counts"] == theirs["counts"] and not list(save.glob("*_state.pt"))
    figures = [json.loads((folder / "metrics.json").read_text())["original"] for folder in (save, chain[0])]
    assert figures[0] == figures[1]
    assert "nothing to do" in succeed("train_scratch.py", *flags)
    torch.save({"state_dict": build_network("resnet8", 4, 16).state_dict()}, weights)
    assert "another original run (weights" in fail("train_scratch.py", *flags, unchanged=save)


def test_weights_of_images_that_are_held_out_or_normalised_otherwise_are_told(chain, tmp_path, weights):
    other = tmp_path / "other.json"

    def flags(weights):
        return scratch_flags(chain, tmp_path / "run", "--weights", weights, "--partition", other, "--epochs", "0")

    common = ["--dataset", "folder", "--data_dir", chain[1], "--deposit_classes", "bee", "--out", other]
    succeed("partition_data.py", *common, "--mean", "0.5", "0.5", "0.5", "--std", "1", "1", "1")
    assert "normalised otherwise" in fail("train_scratch.py", *flags(chain[0] / "original.pt"))
    assert not (tmp_path / "run").exists()
    other.unlink()
    succeed("partition_data.py", *common, "--val_fraction", "0.25")
    for seen in (chain[0] / "original.pt", weights):
        assert "images held out may be among" in succeed("train_scratch.py", *flags(seen))
        shutil.rmtree(tmp_path / "run")


def test_training_starts_from_the_weights(chain, tmp_path, weights):
    succeed("train_scratch.py", *scratch_flags(chain, tmp_path / "run", "--weights", weights, "--epochs", "1", "--lr",
                                               "1e-30", "--weight_decay", "0"))
    ours, theirs = (tensors_of(folder / "original.pt") for folder in (tmp_path / "run", chain[0]))
    assert all(torch.equal(ours[name], t) for name, t in theirs.items() if name.endswith(("weight", "bias")))
    assert not torch.equal(ours["stem.bn1.running_mean"], theirs["stem.bn1.running_mean"])

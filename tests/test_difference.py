"""The weight difference: packed to the bit, right up to its rounding, which falls on T, so that T0 comes back whole;
tied to its original, holding nothing else; and a bank of several, withdrawn in any order."""

import json
import shutil

import pytest
import torch
from conftest import MEASURE, deposit_flags, fail, rewrite, succeed

from analysis import recovery
from datasets import evaluation_batches, first_images, load_images
from models.architectures import split_network
from models.bank import open_original
from models.checkpoints import load_network
from models.difference import BITS, between, decode, encode, pack, quantise, shifted, unpack
from models.losses import MASKED
from utils.checkpoint import load_checkpoint
from utils.metrics import count_correct
from utils.runtime import Runtime


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 2, 7, 1001])
def test_packing_is_exact_and_leaves_no_gap(bits, count):
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
    values[0], values[-1] = 0, 2**bits - 1
    packed = pack(values.int(), bits)
    assert packed.dtype == torch.uint8 and len(packed) == (count * bits + 7) // 8
    assert torch.equal(unpack(packed, bits, count), values)


def lower_parts(seed=0):
    """State_dicts of a T0 and a T: a convolution of odd size, batch norm, a counter, a last layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (5, 3, 3, 3), "bn.weight": (5,), "bn.running_mean": (5,), "bn.running_var": (5,),
              "fc.weight": (2, 3)}
    states = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]
    for state in states:
        state["bn.running_var"] = state["bn.running_var"].square() + 0.1
    return [{**state, "bn.num_batches_tracked": torch.tensor(7 + i)} for i, state in enumerate(states)]


def test_a_sparse_or_low_rank_difference_holds_its_share():
    original, target = lower_parts()
    whole = between(original, target)
    for form in (recovery.sparse, recovery.low_rank):
        sizes, misses = [], []
        for share in (0.1, 0.5, 0.99):
            size, found = form(original, target, share)
            sizes.append(size)
            misses.append((found["conv.weight"] - whole["conv.weight"]).norm() / whole["conv.weight"].norm())
            assert found["bn.weight"].sub(whole["bn.weight"]).abs().max() < 1e-3  # in 16 bits, whatever the share
            if form is recovery.sparse:
                entries, kept = (torch.cat([part[name].flatten() for name in ("conv.weight", "fc.weight")])
                                 for part in (whole, found))
                assert (kept != 0).sum() == pytest.approx(share * len(entries), abs=3)  # a few are rounded to 0
                largest = entries.abs().topk(10).indices
                assert (kept[largest] - entries[largest]).abs().max() < 0.05 * entries.abs().max()
            else:
                rank = torch.linalg.matrix_rank(found["conv.weight"].flatten(1), rtol=1e-3)
                assert rank == max(1, round(share * 5))
        assert sizes == sorted(sizes) and misses == sorted(misses, reverse=True)
        assert misses[0] > 0.4 > 0.01 > misses[-1]


def test_to_finetune_on_kept_images_moves_weights_and_no_statistics(chain):
    target, partition = load_network(str(chain[0] / "target.pt"))
    lower, upper = split_network(target.requires_grad_(False), 2)
    kept = first_images(load_images(partition, str(chain[1]), "train", partition.deposit_classes), 5, 0)
    preserved, runtime = torch.tensor(partition.preserved_classes), Runtime("cpu", "fp32")
    student = recovery.finetuned(lower, upper, kept, preserved, runtime)
    before, after = lower.state_dict(), student.state_dict()
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert changed and not any("running" in name or "batches" in name for name in changed)
    x, y = next(iter(evaluation_batches(kept)))
    ce = [torch.nn.functional.cross_entropy(upper(part(x)), y) for part in (lower, student)]
    assert ce[1] < ce[0]
    flat = kept[torch.arange(1)]
    flat.images = torch.zeros_like(flat.images)
    assert 0 < recovery.png_bytes(flat) < 200 < recovery.png_bytes(kept) / len(kept)  # noise does not compress


@pytest.mark.parametrize("bits", BITS)
def test_the_difference_is_right_up_to_its_rounding_and_as_long_as_claimed(bits):
    original, target = lower_parts()
    original["conv.weight"][2] = target["conv.weight"][2]  # a channel that T did not change
    data = encode(original, target, bits)
    # a scale a channel and `bits` an entry of the convolution, a scale and 16 bits an entry of each vector, and of each
    # row of the last layer
    assert len(data) == (5 * 4 + (135 * bits + 7) // 8) + 3 * (4 + 5 * 2) + 2 * (4 + 3 * 2)
    found = shifted(target, decode(data, target, bits), 1)
    assert torch.equal(found["conv.weight"][2], target["conv.weight"][2])
    for name, tensor in original.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], target[name])  # a counter is T's own
            continue
        error, spread = (between(original, other)[name].flatten(1 if tensor.dim() > 1 else 0)
                         for other in (found, target))
        step = spread.abs().amax(-1) / (2 ** ((bits if name == "conv.weight" else 16) - 1) - 1)
        # A scale below the one at which all entries fit is taken only for a smaller squared error.
        assert (error.square().mean(-1) <= step.square() / 4 + 1e-12).all()


def test_no_variance_becomes_negative_whatever_the_difference_is_added_to():
    original = {"bn.running_var": torch.tensor([40, 0.0071, 3, 0.5, 0, 0])}
    target = {"bn.running_var": torch.tensor([1, 1e-7, 2.9, 40, 0, 300])}
    difference = decode(encode(original, target, 4), target, 4)
    handed_out = shifted(original, difference, -1)  # T: the rounding is its own
    torch.testing.assert_close(handed_out, target, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(shifted(handed_out, difference, 1), original, rtol=1e-5, atol=1e-9)
    further = {"bn.running_var": torch.tensor([0.5, 0.004, 1, 0.3, 0, 0])}  # of a T that was trained on
    assert (shifted(further, difference, 1)["bn.running_var"] >= 0).all()
    assert further["bn.running_var"][3] + (original["bn.running_var"] - target["bn.running_var"])[3] < 0  # as additions


def test_a_mean_that_t_moves_further_moves_t0s_by_the_same_share_of_its_deviation():
    original, target = ({"bn.running_mean": torch.tensor([mean]), "bn.running_var": torch.tensor([variance])}
                        for mean, variance in ((0.1, 0.0025), (2.0, 4.0)))
    difference = between(original, target)
    torch.testing.assert_close(shifted(original, difference, -1), target, rtol=1e-5, atol=1e-9)
    found = shifted({**target, "bn.running_mean": torch.tensor([2.2])}, difference, 1)
    assert found["bn.running_mean"].item() == pytest.approx(0.1 + 0.1 * 0.05, rel=1e-3)  # a tenth of a deviation, 0.05


def test_the_scale_is_that_of_the_least_error_and_zero_needs_none():
    rows = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([8.0])])[None]
    numbers, scale = quantise(rows, largest=7)
    coarse = 8 / 7
    assert (numbers * scale - rows).square().sum() < ((rows / coarse).round() * coarse - rows).square().sum()
    numbers, scale = quantise(torch.zeros(2, 3), largest=7)
    assert not numbers.any() and not (numbers * scale).any()


@pytest.mark.parametrize("bits", [2, 4])
def test_the_file_is_small_and_gives_the_originals_answer_on_every_image(chain, tmp_path, bits):
    save, data = chain
    succeed("train_deposit.py", *deposit_flags(chain, tmp_path, "--difference_bits", bits, "--lr", "0.1"))
    out = succeed("withdraw.py", "--save_path", tmp_path, "--data_dir", data, "--merge", "difference", *MEASURE)
    assert "Withdrawal, difference" in out
    content = load_checkpoint(str(tmp_path / "difference.pt"), "difference")
    assert content.keys() == {"format", "kind", "tensors", "checksum", "bits", "id", "original", "means"}
    assert content["tensors"].keys() == {"difference"} and content["tensors"]["difference"].dtype == torch.uint8
    lower = load_checkpoint(str(tmp_path / "deposit.pt"), "deposit")["cost"]["lower"]["bytes"]
    file, packed = (tmp_path / "difference.pt").stat().st_size, len(content["tensors"]["difference"])
    assert packed < (bits + 1.5) / 32 * lower and file < packed + 3000
    # the recover network is a plain one, of the original's tensors
    (network, partition), (original, _), (target, _) = (
        load_network(str(path)) for path in (tmp_path / "recover.pt", save / "original.pt", tmp_path / "target.pt"))
    assert type(network) is type(original) and network.state_dict().keys() == original.state_dict().keys()
    for split in ("train", "test"):
        for x, _ in evaluation_batches(load_images(partition, str(data), split, range(4))):
            with torch.no_grad():
                torch.testing.assert_close(network(x), original(x), atol=1e-4, rtol=1e-4)
                assert torch.equal(network(x).argmax(1), original(x).argmax(1))
                assert not torch.allclose(target(x), original(x), atol=1e-2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["recover"]["difference"]["counts"] == metrics["original"]["counts"]


# the bank

@pytest.fixture(scope="module")
def bank(chain, tmp_path_factory):
    """Two deposits, the second from the first's target and with its rows of the last layer: folders of the deposits of
    bee and of cow."""
    tmp_path = tmp_path_factory.mktemp("bank")
    shutil.copytree(chain[0], tmp_path / "bee")
    succeed("partition_data.py", "--dataset", "folder", "--data_dir", chain[1], "--deposit_classes", "cow", "--out",
            tmp_path / "cow.json")
    folders = [tmp_path / "bee", tmp_path / "cow"]
    succeed("train_deposit.py", *deposit_flags(chain, folders[1], "--original", folders[0] / "target.pt", "--partition",
                                               tmp_path / "cow.json", "--last_layer", "cleared"))
    return folders


def withdrawn(save, target, *folders):
    """The recover network of --merge difference, and its partition."""
    succeed("withdraw.py", "--save_path", save, "--target", target, "--deposit", *folders, "--merge", "difference",
            *MEASURE)
    return load_network(str(save / "recover.pt"))


def test_deposits_of_a_bank_come_back_in_any_order_alone_or_together(chain, tmp_path, bank):
    bee, cow = bank
    _, partition = load_network(str(cow / "target.pt"))
    assert partition.deposit_classes == [1, 2]
    original, t = (load_network(str(folder / f"{name}.pt"))[0].state_dict()
                   for folder, name in ((chain[0], "original"), (bee, "target")))
    whole, _ = withdrawn(tmp_path / "both", cow / "target.pt", bee, cow)
    succeed("withdraw.py", "--save_path", tmp_path / "both", "--target", cow / "target.pt", "--deposit", bee, cow,
            "--merge", "difference", *MEASURE, "--data_dir", chain[1])
    measured = json.loads((tmp_path / "both" / "metrics.json").read_text())["recover"]["difference"]
    counts = measured["counts"]
    assert measured["deposits"] == {name: pytest.approx(100 * counts["correct"][c] / counts["total"][c])
                                    for name, c in (("bee", 1), ("cow", 2))}
    without_cow, _ = withdrawn(tmp_path / "one", cow / "target.pt", bee)
    assert without_cow.head.fc.bias[2] == MASKED and not without_cow.head.fc.weight[2].any()
    without_bee, partition = withdrawn(tmp_path / "other", cow / "target.pt", cow)
    assert partition.deposit_classes == [1]
    again, _ = withdrawn(tmp_path / "again", tmp_path / "one" / "recover.pt", cow)
    assert "of other deposits" in fail("withdraw.py", "--save_path", tmp_path / "one", "--target", cow / "target.pt",
                                       "--deposit", cow, "--merge", "difference", *MEASURE, unchanged=tmp_path / "one")
    for ours, theirs in ((whole, original), (again, original), (without_bee, t)):
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(without_cow.state_dict()["stem.conv1.weight"], original["stem.conv1.weight"], atol=1e-5)


def test_a_bank_whose_deposits_were_added_one_to_another_is_measured(chain, tmp_path, bank):
    succeed("analysis/bank.py", "--original", chain[0] / "original.pt", "--deposits", *bank, "--data_dir", chain[1],
            "--out", tmp_path / "bank")
    *_, last = json.loads((tmp_path / "bank.json").read_text())["states"]
    target, partition = load_network(str(bank[1] / "target.pt"))
    test = load_images(partition, str(chain[1]), "test", range(4))
    assert last["away"] == [0, 1] and last["counts"] == count_correct(target, evaluation_batches(test), 4)
    # whoever deposits on top has T0 again, with its rows, and the target from which they are away
    original, _ = load_network(str(chain[0] / "original.pt"))
    rebuilt, _ = open_original(str(bank[1] / "target.pt"), 2)
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(rebuilt.network.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    assert rebuilt.target["head.fc.bias"].equal(target.head.fc.bias) and len(rebuilt.away) == 2


def test_after_ten_deposits_and_withdrawals_t0_answers_as_before(chain, tmp_path):
    original, _ = load_network(str(chain[0] / "original.pt"))
    last = chain[0] / "original.pt"
    for seed in range(10):
        run = tmp_path / f"{seed}"
        last_layer = "cleared" if seed % 2 else "shared"
        succeed("train_deposit.py", *deposit_flags(chain, run, "--original", last, "--seed", seed, "--last_layer",
                                                   last_layer))
        recover, _ = withdrawn(run, run / "target.pt", run)
        last = run / "recover.pt"
    target, _ = load_network(str(run / "target.pt"))
    x = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(recover(x), original(x), atol=1e-4, rtol=1e-4)
        assert torch.equal(recover(x).argmax(1), original(x).argmax(1)) and not torch.allclose(target(x), original(x))


def test_a_bank_refuses_what_does_not_fit_it(chain, tmp_path, bank):
    bee, cow = bank
    from_cow = deposit_flags(chain, tmp_path / "new", "--original", cow / "target.pt")
    again = fail("train_deposit.py", *from_cow, "--partition", cow.parent / "cow.json")
    assert "'cow' is deposited already" in again
    assert "deposits of one bank share" in fail("train_deposit.py", *from_cow, "--split_at", "1")
    target = ["--save_path", tmp_path / "new", "--target", cow / "target.pt", "--merge"]
    for deposits in ([cow, bee], [cow]):  # T_r's columns are of one deposit, and bee is away beside cow
        assert "the only deposit that is away" in fail("withdraw.py", *target, "concat", "--deposit", *deposits)
    assert "not away" in fail("withdraw.py", *target, "difference", "--deposit", bee, bee)
    shutil.copytree(cow, tmp_path / "alone")  # with no folder of bee's beside it
    from_alone = ["--original", tmp_path / "alone" / "target.pt"]
    assert "difference.pt of bee" in fail("train_deposit.py", *from_cow, *from_alone)
    shutil.copytree(cow.parent, tmp_path / "odd")  # a file that is refused is not half given back
    rewrite(tmp_path / "odd" / "cow" / "difference.pt", lambda c: c["tensors"].update(rows=torch.zeros(2, 65)))
    from_odd = ["--original", tmp_path / "odd" / "cow" / "target.pt"]
    assert "(2, 65) rows for 1 classes" in fail("train_deposit.py", *from_cow, *from_odd)
    two_branches = ["--original", chain[0] / "recover.pt"]
    assert "two branches" in fail("train_deposit.py", *from_cow, *two_branches)
    assert not (tmp_path / "new").exists()

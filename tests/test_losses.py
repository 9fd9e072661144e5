"""Each loss by hand; the draw of random labels."""

import math

import pytest
import torch

from models import losses


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=generator) * 3 for _ in range(2)]


def test_distillation_by_hand():
    # softmax(0, 0) = (1/2, 1/2), softmax(0, ln 3) = (1/4, 3/4); at T = 1 KL(teacher || student)
    # = 1/4 ln(1/2) + 3/4 ln(3/2)
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert losses.distillation(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # at T = 2 the same logits doubled give the same distributions, times T^2
    assert losses.distillation(student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)
    # of two images, the second of which is answered as the teacher does, it is the mean
    pair = torch.cat([student, teacher]), torch.cat([teacher, teacher])
    assert losses.distillation(*pair, 1.0).item() == pytest.approx(expected / 2, rel=1e-6)


def test_distillation_is_blind_to_a_shift_and_gives_the_teacher_no_gradient(logits):
    student, teacher = logits[0].requires_grad_(), logits[1].requires_grad_()
    assert losses.distillation(student + 7, student, 4.0).item() == pytest.approx(0, abs=1e-5)
    losses.distillation(student, teacher, 2.0).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_attention_by_hand():
    # two channels at two positions: means of squares (9, 16) and (1, 0), then divided by their norms
    features = torch.tensor([[[[3.0, 0.0]], [[3.0, math.sqrt(32)]]]])
    reference = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    norm = math.hypot(9, 16)
    expected = ((9 / norm - 1) ** 2 + (16 / norm) ** 2) / 2
    assert losses.attention_transfer(features, reference).item() == pytest.approx(expected, rel=1e-6)
    assert losses.attention_transfer(5 * features, features).item() == pytest.approx(0, abs=1e-9)  # no scale
    # of two images, the second of which is looked at as before, it is the mean
    pair = torch.cat([features, reference]), torch.cat([reference, reference])
    assert losses.attention_transfer(*pair).item() == pytest.approx(expected / 2, rel=1e-6)


def test_unread_features_by_hand():
    rows = torch.tensor([[2.0, 0.0, 0.0]])  # reads the first direction alone
    reference = torch.tensor([[9.0, 0.0, 1.0], [9.0, 2.0, 1.0]])  # its mean is (9, 1, 1)
    original = torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 3.0]])
    target = torch.tensor([[7.0, 1.0, 2.0], [8.0, 1.0, 1.0]])
    expected = ((1 + 0) / 2) / ((4 + 4) / 2)
    assert losses.unread_features(target, original, reference, rows).item() == pytest.approx(expected, rel=1e-6)
    assert losses.unread_features(original, original, reference, rows).item() == pytest.approx(1, rel=1e-6)
    assert losses.unread_features(target, original, reference[:0], rows).item() == 0


def test_the_cross_entropies_by_hand():
    z, y = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([1, 0])  # of answers 3/4 and 1/2
    expected = pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2, rel=1e-6)
    assert losses.recoverability(z, y).item() == expected == losses.knowledge_removal(z, y).item()


@pytest.mark.parametrize("candidates,exclude_true", [([0, 1, 2, 3, 4], True), ([0, 1, 2, 3, 4], False),
                                                     ([0, 2, 5], False)])
def test_random_labels_are_drawn_evenly_from_their_classes(candidates, exclude_true):
    y = torch.tensor([1, 3, 4]).repeat(4000)
    drawn = losses.draw_random_labels(y, torch.tensor(candidates), exclude_true, torch.Generator().manual_seed(0))
    for label in (1, 3, 4):
        allowed = [c for c in candidates if not exclude_true or c != label]
        share = torch.bincount(drawn[y == label], minlength=6).double() / 4000
        assert share[allowed].tolist() == pytest.approx([1 / len(allowed)] * len(allowed), abs=0.04)
        assert share[allowed].sum().item() == pytest.approx(1)


def test_losses_are_float32_for_bfloat16_inputs(logits):
    z = logits[0].bfloat16()
    assert losses.distillation(z, z, 4.0).dtype == torch.float32
    assert losses.recoverability(z, torch.zeros(6, dtype=torch.int64)).dtype == torch.float32
    assert losses.attention_map(torch.rand(2, 3, 4, 4).bfloat16()).dtype == torch.float32


def test_feature_transfer_is_relative_and_gives_the_reference_no_gradient():
    reference = torch.tensor([[[[3.0, 4.0]]]], requires_grad=True)
    features = torch.zeros(1, 1, 1, 2, requires_grad=True)
    assert losses.feature_transfer(features, reference).item() == pytest.approx(1.0)
    assert losses.feature_transfer(reference * 10 - features, reference * 10).item() == 0.0
    losses.feature_transfer(features, reference).backward()
    assert reference.grad is None and features.grad.abs().sum() > 0


def test_lowered_logits_by_hand():
    z_0 = torch.tensor([[1.0, 5.0, -2.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    lowered = torch.tensor([[1.0, -2.0, -2.0, 0.0], [4.0, 1.0, 2.0, 1.0]])
    deposit = torch.tensor([1])
    assert losses.lowered_logits(lowered, z_0, deposit).item() == 0.0
    assert losses.lowered_logits(z_0, z_0, deposit).item() == pytest.approx((7**2 + 2**2) / 2)

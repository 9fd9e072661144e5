"""Each loss by hand, and against plain Python; the draw of random labels."""

import math

import pytest
import torch

from models import losses


def slow_softmax(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def slow_kd(student, teacher, t):
    kl = 0.0
    for a, b in zip(student, teacher):
        p_a, p_b = slow_softmax([v / t for v in a]), slow_softmax([v / t for v in b])
        kl += sum(q * math.log(q / p) for p, q in zip(p_a, p_b))
    return t * t * kl / len(student)


def slow_cross_entropy(logits, labels):
    return -sum(math.log(slow_softmax(row)[y]) for row, y in zip(logits, labels)) / len(labels)


def slow_attention(features):
    maps = []
    for image in features:
        flat = [sum(channel[i][j] ** 2 for channel in image) / len(image)
                for i in range(len(image[0])) for j in range(len(image[0][0]))]
        norm = math.sqrt(sum(v * v for v in flat))
        maps.append([v / norm for v in flat])
    return maps


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=generator) * 3 for _ in range(3)]


PRESERVED, DEPOSIT = torch.tensor([0, 3, 4]), torch.tensor([1, 2])


def test_distillation_by_hand():
    # softmax(0, 0) = (1/2, 1/2), softmax(0, ln 3) = (1/4, 3/4); at T = 1 KL(teacher || student)
    # = 1/4 ln(1/2) + 3/4 ln(3/2)
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert losses.distillation(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # at T = 2 the same logits doubled give the same distributions, times T^2
    assert losses.distillation(student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_distillations_against_plain_python(logits, t):
    z, z_0, _ = logits
    kp = slow_kd(z[:, PRESERVED].tolist(), z_0[:, PRESERVED].tolist(), t)
    pt = slow_kd(z[:, DEPOSIT].tolist(), z_0[:, DEPOSIT].tolist(), t)
    assert losses.knowledge_preserving(z, z_0, PRESERVED, t).item() == pytest.approx(kp, rel=1e-5)
    assert losses.partial_transfer(z, z_0, DEPOSIT, t).item() == pytest.approx(pt, rel=1e-5)


def test_distillation_is_blind_to_a_shift_and_zero_for_equal_logits(logits):
    z = logits[0]
    assert losses.distillation(z + 7, z, 4.0).item() == pytest.approx(0, abs=1e-5)


def test_distillation_gives_the_teacher_no_gradient(logits):
    student, teacher = logits[0].requires_grad_(), logits[1].requires_grad_()
    losses.distillation(student, teacher, 2.0).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_attention_by_hand():
    # one channel, two positions: maps (9, 16)/norm and (1, 0)
    features = torch.tensor([[[[3.0, 4.0]]]])
    reference = torch.tensor([[[[1.0, 0.0]]]])
    norm = math.hypot(9, 16)
    expected = ((9 / norm - 1) ** 2 + (16 / norm) ** 2) / 2
    assert losses.attention_transfer(features, reference).item() == pytest.approx(expected, rel=1e-6)


def test_attention_against_plain_python():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 4, 2, 3, generator=generator) for _ in range(2))
    maps = [slow_attention(x.tolist()) for x in (a, b)]
    differences = [(p - q) ** 2 for m, n in zip(*maps) for p, q in zip(m, n)]
    assert losses.attention_transfer(a, b).item() == pytest.approx(sum(differences) / len(differences), rel=1e-5)


def test_attention_ignores_the_scale_of_features():
    x = torch.randn(2, 3, 4, 4)
    assert losses.attention_transfer(5 * x, x).item() == pytest.approx(0, abs=1e-9)


def test_the_cross_entropies_against_plain_python(logits):
    y = torch.tensor([1, 2, 1, 2, 0, 4])
    expected = pytest.approx(slow_cross_entropy(logits[0].tolist(), y.tolist()), rel=1e-5)
    assert losses.recoverability(logits[0], y).item() == expected == losses.knowledge_removal(logits[0], y).item()


@pytest.mark.parametrize("exclude_true", [True, False])
def test_random_labels(exclude_true):
    y = torch.arange(5).repeat(4000)
    drawn = losses.draw_random_labels(y, torch.arange(5), exclude_true, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0 and drawn.max() <= 4
    hit = (drawn == y).double().mean().item()
    assert hit == 0 if exclude_true else hit == pytest.approx(0.2, abs=0.02)
    others = 4 if exclude_true else 5
    share = torch.bincount(drawn[y == 0], minlength=5)[1:].double() / 4000
    assert torch.allclose(share, torch.full((4,), 1 / others, dtype=torch.float64), atol=0.04)


def test_random_labels_of_the_preserved_classes_alone():
    y, preserved = torch.tensor([1, 3, 4]).repeat(4000), torch.tensor([0, 2, 5])
    drawn = losses.draw_random_labels(y, preserved, False, torch.Generator().manual_seed(0))
    for label in (1, 3, 4):
        share = torch.bincount(drawn[y == label], minlength=6).double() / 4000
        assert torch.allclose(share[preserved], torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.04)


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

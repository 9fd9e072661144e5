"""The losses of the deposit stage, one pure function per equation (Ye et al., ECCV 2022, section 3).

Logits are (batch, classes), feature maps (batch, channels, height, width). Every loss is a scalar in float32, a mean
over the images of the batch, whatever the precision of its inputs.
"""

import torch
import torch.nn.functional as F

MASKED = -1000.0  # the logit of a masked class: its probability is 0, and a difference in 16 bits still holds it


def select(logits, classes):
    """The filters g and g-bar: the columns `classes` (1-D, int64) of the logits."""
    return logits.index_select(1, classes)


def distillation(student, teacher, temperature):
    """KD(a, b) = tau^2 KL(softmax(b/tau) || softmax(a/tau)), mean over the batch (Hinton et al., 2015).

    student, teacher: logits (batch, k) over the same k classes; temperature: tau > 0.
    The teacher's logits receive no gradient.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def attention_map(features):
    """(batch, c, h, w) -> (batch, h*w): channel mean of squared activations, L2-normalised per image
    (Zagoruyko and Komodakis, ICLR 2017)."""
    return F.normalize(features.float().pow(2).mean(dim=1).flatten(1), dim=1)


def attention_transfer(features, reference):
    """L_at: mean squared difference of the two attention maps, over images and positions.

    The maps are non-negative and of norm 1, so the value lies in [0, 2 / (h*w)].
    """
    return (attention_map(features) - attention_map(reference)).pow(2).mean()


def knowledge_removal(target_logits, random_labels):
    """The first term of L_kr, CE(z_T, y_r): T answers the deposit set at random. random_labels: (batch,) int64."""
    return F.cross_entropy(target_logits.float(), random_labels)


def knowledge_preserving(target_logits, original_logits, preserved, temperature):
    """L_kp = KD(g(z_T), g(z_0)): T keeps what T0 says of the preserved classes."""
    return distillation(select(target_logits, preserved), select(original_logits, preserved), temperature)


def partial_transfer(deposit_logits, original_logits, deposited, temperature):
    """L_pt = KD(g-bar(z_Tr), g-bar(z_0)): the knowledge of the deposit classes moves into T_r."""
    return distillation(select(deposit_logits, deposited), select(original_logits, deposited), temperature)


def masked_target(target_logits, original_logits, deposited):
    """L_mt = KL(t || softmax(z_T)), t = softmax(z_0) without the deposit columns: DELETE (Zhou et al., CVPR 2025) with
    every deposit class masked. It is L_kp at temperature 1, minus the log of T's mass on the preserved classes."""
    return distillation(target_logits, original_logits.float().index_fill(1, deposited, MASKED), 1.0)


def unread_features(features, original_features, reference, rows):
    """L_ur, ours: squared distance of T's features on D_r to one point, in the directions that the last layer's rows of
    the preserved classes do not read, in units of T0's distance: T0 has 1. The point is the mean of `reference`.

    features, original_features: (b, d) of T and T0; reference: (n, d), T0's on synthetic images; rows: (k, d), k < d. 0
    without synthetic images.
    """
    if len(reference) == 0:
        return features.float().sum() * 0
    basis = torch.linalg.qr(rows.detach().float().T).Q

    def distance(h):
        h = h.float() - reference.float().mean(0)
        return (h - h @ basis @ basis.T).square().sum(1).mean()

    return distance(features) / distance(original_features)


def lowered_logits(target_logits, original_logits, deposited):
    """L_ll, ours: squared distance of z_T to z_0 whose deposit columns are lowered to the least logit of the image.
    L_mt and random labels raise other classes. This raises none, so one deposit does not undo another."""
    z_0 = original_logits.float()
    lowered = z_0.index_copy(1, deposited, z_0.amin(1, keepdim=True).expand(-1, len(deposited)))
    return (target_logits.float() - lowered).square().sum(1).mean()


def feature_transfer(features, reference):
    """L_ft, ours: squared error of T_r(x) against lower_0(x), for each image in units of the reference's mean square,
    so that 0 is a perfect copy and 1 an answer of nothing. Feature maps (batch, c, h, w)."""
    reference = reference.detach().float().flatten(1)
    error = (features.float().flatten(1) - reference).square().mean(1)
    return (error / reference.square().mean(1).clamp_min(1e-12)).mean()


def recoverability(recover_logits, labels):
    """L_re = CE(z_T~, y): the deposit module must be easy to withdraw."""
    return F.cross_entropy(recover_logits.float(), labels)


def draw_random_labels(labels, classes, exclude_true, generator):
    """y_r of L_kr: for each image one of `classes` (1-D, int64, sorted), drawn uniformly; (batch,) int64 on the labels'
    device.

    exclude_true: its own label is left out of the draw; the label must then be one of `classes`.
    """
    shift = torch.randint(1 if exclude_true else 0, len(classes), labels.shape,
                          generator=generator, device=labels.device)
    return classes[(torch.searchsorted(classes, labels) + shift) % len(classes)]

"""Images that are neither of D_r nor preserved, made of D_r and T0 alone. On them the deep deposit holds T to T0, so
that T may leave T0 further on D_r without losing the preserved classes."""

import torch
import torch.nn.functional as F

from datasets import evaluation_batches
from datasets.batches import normalise, pixels_of
from models.architectures import join_network
from models.losses import draw_random_labels
from utils.optim import take_step

COUNT = 1500  # images that are moved, drawn from D_r
STEPS, RATE = 60, 0.05  # of Adam, on pixels of deviation 1
LAMBDA_BN = 0.1  # weight of the statistics beside the cross-entropy


def cutmix(x, generator):
    """Images x (b, 3, s, s), each with a box of the one before it in the batch; the box's share of the area is drawn
    uniformly (CutMix, Yun et al., ICCV 2019)."""
    side, (share, top, left) = x.shape[-1], torch.rand(3, len(x), 1, generator=generator, device=x.device)
    edge, places = side * share.sqrt(), torch.arange(side, device=x.device)
    rows, columns = ((places >= start * (side - edge)) & (places < start * (side - edge) + edge)
                     for start in (top, left))
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], x.roll(1, 0), x)


def moved_to_preserved(lirf, images, runtime):
    """An ImageSet of up to COUNT images of the ImageSet `images` of D_r, moved towards preserved classes.

    STEPS steps of Adam on the pixels, for CE(z_0, a preserved class drawn at random) and for batch norm's statistics,
    which the images of a batch are to have as T0's training images had them (DeepInversion, Yin et al., CVPR 2020).
    """
    network, generator, parts = join_network(lirf.original_lower, lirf.upper).eval(), runtime.generator(), []
    gaps = []  # of a pass: how far each batch norm's input is from its statistics

    def note(norm, inputs):
        mean, variance = inputs[0].float().mean((0, 2, 3)), inputs[0].float().var((0, 2, 3), correction=0)
        gaps.append((mean - norm.running_mean).norm() + (variance - norm.running_var).norm())

    hooks = [module.register_forward_pre_hook(note) for module in network.modules()
             if isinstance(module, torch.nn.BatchNorm2d)]
    images = images[torch.randperm(len(images), generator=generator, device=runtime.device)[:COUNT]]
    mean, std = (torch.tensor(v, device=runtime.device).view(3, 1, 1) for v in (images.mean, images.std))
    for x, y in evaluation_batches(images):
        x = x.requires_grad_()
        optimizer, answers = torch.optim.Adam([x], RATE), draw_random_labels(y, lirf.preserved, False, generator)
        for _ in range(STEPS):
            gaps.clear()
            with runtime.autocast():
                z = network(x)
            take_step(optimizer, F.cross_entropy(z.float(), answers) + LAMBDA_BN * sum(gaps), RATE, 0)
        parts.append(((x.detach() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).contiguous())
    for hook in hooks:
        hook.remove()
    images.images = torch.cat(parts)
    return images


def synthetic(x, moved, generator):
    """As many images as x (b, 3, s, s), a batch of D_r: one half mixed of pairs of it, the other drawn from the
    ImageSet `moved` and augmented."""
    half = len(x) // 2
    rows = torch.randint(len(moved), (len(x) - half,), generator=generator, device=x.device)
    drawn = normalise(pixels_of(moved.images, rows, generator, moved.flip), moved.mean, moved.std)
    return torch.cat([cutmix(x, generator)[:half], drawn])

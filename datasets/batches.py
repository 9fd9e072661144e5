"""Batches made on the training device from one uint8 tensor: no worker processes, no copies in between."""

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass
class ImageSet:
    """Images in memory: uint8 (n, 3, s, s), int64 labels (n,), channel mean and std in [0, 1], and
    whether a mirrored image keeps its class."""

    images: torch.Tensor
    labels: torch.Tensor
    mean: list
    std: list
    flip: bool

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


def normalise(images, mean, std):
    """uint8 (n, 3, h, w) in 0..255 -> float32 with channel mean 0 and deviation 1, channels_last."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def crop_and_flip(images, flip, generator, padding=4):
    """Random crop after zero padding and, if `flip`, a mirror image half of the time, drawn for each image.

    uint8 (n, 3, s, s) -> the same shape. One gather does both, whichever the device.
    """
    n, _, size, _ = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator, device=device)
    steps = torch.arange(size, device=device)
    rows, columns = top + steps, left + steps
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    batch = torch.arange(n, device=device)
    # channels are gathered last, which leaves them innermost
    return padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(images, batch_size, device, *, generator=None):
    """Yield (x, y) over an ImageSet: x normalised float32 (b, 3, s, s), y int64 (b,).

    generator: shuffle and augment with it (training); None: in order, as they are (evaluation).
    The set is cut into batches of equal size, give or take one image, none above batch_size: a last
    batch of a few images would disturb batch normalisation.
    """
    count = -(-len(images) // batch_size)
    order = (torch.arange(len(images), device=device) if generator is None
             else torch.randperm(len(images), generator=generator, device=device))
    for rows in order.tensor_split(count):
        chosen = images.images[rows]
        if generator is not None:
            chosen = crop_and_flip(chosen, images.flip, generator)
        yield normalise(chosen, images.mean, images.std), images.labels[rows]


def steps_per_epoch(images, batch_size):
    """Number of batches that `batches` yields."""
    return -(-len(images) // batch_size)

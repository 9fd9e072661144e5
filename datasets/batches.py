"""Batches made on the training device from one uint8 tensor: no worker processes, no copies in between."""

import dataclasses

import torch
import torch.nn.functional as F

from datasets.ragged import RaggedImages, every
from utils.errors import UserError


@dataclasses.dataclass
class ImageSet:
    """Images: uint8 (n, 3, s, s) in memory, or RaggedImages; int64 labels (n,), channel mean and std in [0, 1],
    and whether a mirrored image keeps its class."""

    images: torch.Tensor | RaggedImages
    labels: torch.Tensor
    mean: list
    std: list
    flip: bool

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        """The part of the set that a tensor of rows names."""
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device):
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


def pixels_of(images, rows, generator=None, flip=False, mine=every):
    """uint8 (b, 3, s, s) of mine(rows) of an ImageSet's images, rows int64; augmented when a generator is given, whose
    draws are those of all rows."""
    if isinstance(images, RaggedImages):
        return images.batch(rows, generator, flip, mine)
    return images[mine(rows)] if generator is None else mine(crop_and_flip(images[rows], flip, generator))


def normalise(images, mean, std):
    """uint8 (n, 3, h, w) in 0..255 -> float32 with channel mean 0 and deviation 1, channels_last."""
    mean, std = (torch.as_tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
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


def batches(images, batch_size, device, *, generator=None, mine=every):
    """Yield (x, y) over an ImageSet: x normalised float32 (b, 3, s, s), y int64 (b,).

    generator: shuffle and augment with it (training); None: in order, as they are (evaluation).
    mine: the part of a batch whose images are wanted in x (utils.distributed.mine); y is of the whole batch.
    The set is cut into batches of equal size, give or take one image, none above batch_size: a last
    batch of a few images would disturb batch normalisation.
    """
    count = -(-len(images) // batch_size)
    order = (torch.arange(len(images), device=device) if generator is None
             else torch.randperm(len(images), generator=generator, device=device))
    # moved once: within the loop it would make the host wait for a GPU at every batch
    mean, std = (torch.tensor(v, device=device) for v in (images.mean, images.std))
    if generator is not None and len(mine(order[:len(images) // count])) == 0:
        raise UserError(f"batches of {len(images) // count} images have none for some of the devices: raise "
                        f"--batch_size, or use fewer")
    for rows in order.tensor_split(count):
        yield normalise(pixels_of(images.images, rows, generator, images.flip, mine), mean, std), images.labels[rows]


def evaluation_batch_size(images):
    """500 images of up to 64 pixels; of larger ones fewer, so that the activations take no more memory."""
    size = images.images.size if isinstance(images.images, RaggedImages) else images.images.shape[-1]
    return max(1, int(500 * min(1, 64**2 / size**2)))


def steps_per_epoch(images, batch_size):
    """Number of batches that `batches` yields."""
    return -(-len(images) // batch_size)


def mixed(x, generator):
    """Each image averaged with another of the batch in a share drawn from [0.2, 0.8]. (b, 3, s, s) -> the same."""
    share = 0.2 + 0.6 * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    partner = torch.randperm(len(x), generator=generator, device=x.device)
    return share * x + (1 - share) * x[partner]


def shuffled(x, generator, grid=4):
    """Images put together from grid x grid patches, each taken from an image of the batch drawn anew and from any
    place in it. (b, 3, s, s) -> the same; where grid does not divide s, the rest at the edge stays."""
    b, c, size, _ = x.shape
    side = size // grid
    area = x[:, :, :side * grid, :side * grid]
    patches = area.reshape(b, c, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side, side)
    patches = patches[torch.randperm(len(patches), generator=generator, device=x.device)]
    out = x.clone()
    out[:, :, :side * grid, :side * grid] = patches.reshape(b, grid, grid, c, side, side).permute(
        0, 3, 1, 4, 2, 5).reshape(area.shape)
    return out


def noisy(x, generator):
    """Normal noise of deviation 1, that of the normalised pixels, added. (b, 3, s, s) -> the same."""
    return x + torch.empty_like(x).normal_(generator=generator)


# Images made of a batch's own that are unlike it: they reach activations that the batch's classes do not.
UNLIKE = {"mixed": mixed, "shuffled": shuffled, "noisy": noisy}

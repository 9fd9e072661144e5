"""Batches made on the training device from images in memory, one uint8 tensor or photographs of differing sizes: no
worker processes, no copies in between."""

import dataclasses

import torch
import torch.nn.functional as F

from utils import distributed
from utils.errors import UserError

# Random resized crops hold at least this share of the image, at these aspect ratios (torchvision's default but for
# the share, 0.08 there: a class of fine-grained birds is not told by a twelfth of the picture).
SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)


class RaggedImages:
    """Images of differing sizes, given in squares of one size.

    photographs: a list of uint8 arrays (h, w, 3); size: side of the squares. Indexed by a tensor of rows it gives a
    part of itself.
    """

    def __init__(self, photographs, size, device="cpu"):
        self.photographs, self.size, self.device = photographs, size, device

    def __len__(self):
        return len(self.photographs)

    def __getitem__(self, rows):
        return RaggedImages([self.photographs[row] for row in rows.tolist()], self.size, self.device)

    def to(self, device):
        """The same, giving its batches on `device`; the pixels stay where they are."""
        return RaggedImages(self.photographs, self.size, device)

    def batch(self, rows, generator=None, flip=False):
        """uint8 (n, 3, size, size) of the rows, on the device.

        generator: this rank's share, in random resized crops, mirrored half of the time if `flip` (training); None:
        resized to a short side of 8/7 size and cut out of the centre (evaluation), as is usual on ImageNet.
        """
        draws = [None] * len(rows)
        if generator is not None:
            drawn = torch.rand(len(rows), 5, generator=generator, device=generator.device)
            rows, draws = distributed.share(rows), distributed.share(drawn).tolist()
        return torch.stack([self._square(self.photographs[row], draw, flip)
                            for row, draw in zip(rows.tolist(), draws)])

    def _square(self, pixels, draw, flip):
        h, w, _ = pixels.shape
        top, left, height, width = _centre(h, w) if draw is None else _random_box(h, w, draw)
        box = torch.from_numpy(pixels[top:top + height, left:left + width].copy()).to(self.device)
        square = F.interpolate(box.permute(2, 0, 1)[None].float(), (self.size, self.size), mode="bilinear",
                               antialias=True)[0].round_().clamp_(0, 255).byte()
        return square.flip(2) if draw is not None and flip and draw[4] < 0.5 else square


def _centre(h, w):
    """The square in the centre whose side is 7/8 of the short side: (top, left, height, width)."""
    side = max(1, round(min(h, w) * 7 / 8))
    return (h - side) // 2, (w - side) // 2, side, side


def _random_box(h, w, draw):
    """A box (top, left, height, width) of a share of the area drawn from SCALE and a log-uniform aspect ratio from
    RATIO; draw: five numbers of [0, 1). What does not fit into a thin image is cut to it."""
    area = h * w * (SCALE[0] + (SCALE[1] - SCALE[0]) * draw[0])
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** draw[1]
    width = min(max(round((area * ratio) ** 0.5), 1), w)
    height = min(max(round((area / ratio) ** 0.5), 1), h)
    return int(draw[2] * (h - height + 1)), int(draw[3] * (w - width + 1)), height, width


@dataclasses.dataclass
class ImageSet:
    """Images: uint8 (n, 3, s, s) in memory, or RaggedImages; int64 labels (n,), or (n, k) of k labels an image; channel
    mean and std in [0, 1]; and whether a mirrored image keeps its class."""

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


def first_images(images, count, seed):
    """The images of an ImageSet at first_rows."""
    return images[first_rows(images.labels, count, seed)]


def first_rows(labels, count, seed):
    """Rows of the first `count` images of each class in an order drawn by `seed`, class after class: a larger count
    adds to a smaller one's."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return torch.cat(rows)


def pixels_of(images, rows, generator=None, flip=False):
    """uint8 (b, 3, s, s) of an ImageSet's images at rows (int64); given a generator, of this rank's share of them,
    augmented."""
    if isinstance(images, RaggedImages):
        return images.batch(rows, generator, flip)
    return images[rows] if generator is None else crop_and_flip(images, rows, flip, generator)


def normalise(images, mean, std):
    """uint8 (n, 3, h, w) in 0..255 -> float32 with channel mean 0 and deviation 1, channels_last."""
    mean, std = (torch.as_tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def crop_and_flip(images, rows, flip, generator):
    """Random crop after zero padding and, if `flip`, a mirror image half of the time, drawn for each image.

    uint8 (n, 3, s, s) -> (b, 3, s, s), this rank's share of the rows. One gather does both, whichever the device.
    """
    size, device, padding = images.shape[-1], images.device, 4
    top, left = torch.randint(0, 2 * padding + 1, (2, len(rows), 1), generator=generator, device=device)
    steps = torch.arange(size, device=device)
    down, across = top + steps, left + steps
    if flip:
        mirrored = torch.rand(len(rows), 1, generator=generator, device=device) < 0.5
        across = torch.where(mirrored, across.flip(1), across)
    rows, down, across = (distributed.share(part) for part in (rows, down, across))
    padded = F.pad(images[rows], (padding,) * 4)
    batch = torch.arange(len(rows), device=device)
    # channels are gathered last, which leaves them innermost
    return padded.permute(0, 2, 3, 1)[batch[:, None, None], down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def batches(images, batch_size, *, generator=None):
    """Yield (x, y) over an ImageSet, on its device: x normalised float32 (b, 3, s, s), y the labels of x.

    generator: shuffle and augment with it (training), in batches of exactly batch_size images, of which each rank gets
    an equal share; what is left over is not used in this pass. A smaller set is one batch. None: all images in order,
    as they are (evaluation). Raises UserError for a batch that the ranks cannot share evenly.
    """
    device = images.labels.device
    order = torch.arange(len(images), device=device)
    if generator is not None:
        batch_size = images_per_step(images, batch_size)
        if batch_size % distributed.ranks:
            raise UserError(f"batches of {batch_size} images cannot be shared evenly by {distributed.ranks} devices: "
                            f"make --batch_size a multiple of their number that is at most {len(images)}")
        order = torch.randperm(len(images), generator=generator, device=device)
        order = order[:len(order) // batch_size * batch_size]
    # moved once: within the loop it would make the host wait for a GPU at every batch
    mean, std = (torch.tensor(v, device=device) for v in (images.mean, images.std))
    for rows in order.split(batch_size):
        y = images.labels[rows if generator is None else distributed.share(rows)]
        yield normalise(pixels_of(images.images, rows, generator, images.flip), mean, std), y


def evaluation_batches(images):
    """(x, y) over an ImageSet in order, as `batches` gives them without a generator: 500 images of up to 64 pixels at a
    time, of larger ones fewer, so that the activations take no more memory."""
    size = images.images.size if isinstance(images.images, RaggedImages) else images.images.shape[-1]
    return batches(images, max(1, int(500 * min(1, 64**2 / size**2))))


def images_per_step(images, batch_size):
    """Images in each batch that `batches` yields in training: batch_size or, of a smaller set, all."""
    return min(batch_size, len(images))


def steps_per_epoch(images, batch_size):
    """Number of batches that `batches` yields in training."""
    return len(images) // images_per_step(images, batch_size)

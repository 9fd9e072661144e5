"""Photographs of differing sizes, kept in memory as decoded pixels and cut to size on the training device."""

import torch
import torch.nn.functional as F

from utils import distributed

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

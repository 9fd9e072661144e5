"""Photographs of differing sizes, kept on the disk as decoded pixels and cut to size on the training device."""

import torch
import torch.nn.functional as F

# Random resized crops hold at least this share of the image, at these aspect ratios (torchvision's default but for
# the share, 0.08 there: a class of fine-grained birds is not told by a twelfth of the picture).
SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)


class RaggedImages:
    """Images (h_i, w_i, 3) in flat uint8 arrays, usually mapped from cache files.

    pixels: list of 1-D arrays; place: list of (array's index, offset, height, width), one an image; size: side
    of the squares that `batch` gives. Indexed by a tensor of rows it gives a part of itself.
    """

    def __init__(self, pixels, place, size, device="cpu"):
        self.pixels, self.place, self.size, self.device = pixels, place, size, device

    def __len__(self):
        return len(self.place)

    def __getitem__(self, rows):
        return RaggedImages(self.pixels, [self.place[row] for row in rows.tolist()], self.size, self.device)

    def to(self, device):
        """The same, giving its batches on `device`; the pixels stay where they are."""
        return RaggedImages(self.pixels, self.place, self.size, device)

    def batch(self, rows, generator=None, flip=False):
        """uint8 (n, 3, size, size) on the device.

        generator: random resized crops, mirrored half of the time if `flip` (training); None: resized to a short
        side of 8/7 size and cut out of the centre (evaluation), as is usual on ImageNet.
        """
        chosen = [self.place[row] for row in rows.tolist()]
        if generator is None:
            boxes, mirrored = [_centre(h, w) for _, _, h, w in chosen], [False] * len(chosen)
        else:
            draws = torch.rand(len(chosen), 5, generator=generator, device=generator.device).tolist()
            boxes = [_random_box(h, w, draw) for (_, _, h, w), draw in zip(chosen, draws)]
            mirrored = [flip and draw[4] < 0.5 for draw in draws]
        out = torch.empty(len(chosen), 3, self.size, self.size, dtype=torch.uint8, device=self.device)
        for i, ((part, offset, h, w), (top, left, height, width)) in enumerate(zip(chosen, boxes)):
            image = self.pixels[part][offset:offset + h * w * 3].reshape(h, w, 3)
            crop = torch.from_numpy(image[top:top + height, left:left + width].copy()).to(self.device)
            crop = F.interpolate(crop.permute(2, 0, 1)[None].float(), (self.size, self.size), mode="bilinear",
                                 antialias=True)[0].round_().clamp_(0, 255)
            out[i] = crop.flip(2) if mirrored[i] else crop
        return out


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

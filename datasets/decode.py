"""Image files to pixels, on all cores."""

import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import UserError

# The formats of datasets.sources.IMAGE_EXTENSIONS and no other: whatever a file is called, PIL would open it by its
# content, and hand an EPS to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels on, before they are decoded
_LONGEST = 4  # a longer image is cut to this many times its short side: nothing of it is lost to a square


def open_image(path):
    """A PIL image whose pixels are not yet read. Raises UserError when the file is no image."""
    try:
        return Image.open(path, formats=_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is too large an image ({error}): replace or remove it, then partition again") from None
    except Exception:  # a damaged image fails in as many ways as it has bytes
        raise UserError(f"{path} cannot be read as an image: replace or remove it, then partition again") from None


def _rgb(path):
    with open_image(path) as image:
        try:
            return image.convert("RGB")
        except Exception:
            raise UserError(f"{path} is a damaged image: replace or remove it, then partition again") from None


def _centre(image, width, height):
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_square(path, size):
    """uint8 (size, size, 3): RGB, the short side resized to `size`, then the centre."""
    image = _rgb(path)
    if image.size != (size, size):
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        image = _centre(image, size, size)
    return np.array(image)


def read_short_side(path, short_side):
    """uint8 (h, w, 3): RGB, made smaller to a short side of `short_side` if it is larger; at most four times as
    long as wide."""
    image = _rgb(path)
    short = min(image.size)
    image = _centre(image, min(image.width, _LONGEST * short), min(image.height, _LONGEST * short))
    if short > short_side:
        image = image.resize([max(short_side, round(side * short_side / short)) for side in image.size],
                             Image.Resampling.BILINEAR, reducing_gap=2)
    return np.array(image)


def decode(files, read, size, label):
    """[read(file, size) for each file], with a progress bar on a terminal."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoders release the interpreter's lock
        return list(tqdm(pool.map(lambda path: read(path, size), files), total=len(files), desc=f"decoding {label}",
                         leave=False, disable=not sys.stderr.isatty()))

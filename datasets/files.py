"""Image files: a hash of what the files of a class are, and their pixels, decoded on all cores."""

import contextlib
import functools
import hashlib
import os
import warnings

import numpy as np
from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

from utils.errors import UserError
from utils.runtime import usable_processors

SPLITS = ("train", "test")  # of the data as they are stored
# The formats of datasets.folder.IMAGE_EXTENSIONS and no other: whatever a file is called, PIL would open it by its
# content, and hand an EPS to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels on, before they are decoded
warnings.filterwarnings("ignore", "Corrupt EXIF data|Palette images with Transparency")
_LONGEST = 4  # a longer image is cut to this many times its short side, of which a square takes one


def list_hash(files, names):
    """SHA-256 (hex) of a sample list: the files' names, sizes and bytes. names: one a file, as in the file system."""
    digest = hashlib.sha256()
    for path, name in zip(files, names):
        with open(path, "rb") as file:
            content = file.read()
        digest.update(os.fsencode(name) + f"|{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path):
    """A block that reads the PIL image of a file. Raises UserError when the file is no image, a damaged one, or one of
    more than 8 bits a channel, whose range is not known."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel")
            yield image
    except Exception as error:  # a damaged image fails in as many ways as it has bytes
        raise UserError(f"{path} cannot be read as an image of 8 bits a channel ({error}): replace or remove it, then "
                        f"partition again") from None


def short_side(path):
    """The shorter side of an image in pixels, by its header."""
    with _opened(path) as image:
        return min(image.size)


def _rgb(path):
    """The image upright, as its camera's orientation says, without transparency."""
    with _opened(path) as image:
        image.load()
        with contextlib.suppress(Exception):  # nonsense in a camera's notes does not make a damaged image
            ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGB")


def _centre(image, width, height):
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _without_ends(image):
    """The middle of an image that is longer than _LONGEST times its short side."""
    longest = _LONGEST * min(image.size)
    return _centre(image, min(image.width, longest), min(image.height, longest))


def read_square(path, size):
    """uint8 (size, size, 3): RGB, the short side resized to `size`, then the centre."""
    image = _without_ends(_rgb(path))
    if image.size != (size, size):
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        image = _centre(image, size, size)
    return np.array(image)


def read_short_side(path, size):
    """uint8 (h, w, 3): RGB, made smaller to a short side of `size` if it is larger; at most four times as long as
    wide."""
    image = _without_ends(_rgb(path))
    short = min(image.size)
    if short > size:
        image = image.resize([max(size, round(side * size / short)) for side in image.size],
                             Image.Resampling.BILINEAR, reducing_gap=2)
    return np.array(image)


def decode(files, read, size, label):
    """[read(file, size) for each file], with a progress bar on a terminal."""
    # threads, as the decoders release the interpreter's lock; disable=None: no bar where there is no terminal
    return thread_map(functools.partial(read, size=size), files, max_workers=usable_processors(),
                      desc=f"decoding {label}", leave=False, disable=None)

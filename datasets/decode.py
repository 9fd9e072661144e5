"""Image files to pixels, on all cores."""

import contextlib
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.errors import UserError

# The formats of datasets.folder.IMAGE_EXTENSIONS and no other: whatever a file is called, PIL would open it by its
# content, and hand an EPS to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 89 million pixels on, before they are decoded
warnings.filterwarnings("ignore", "Corrupt EXIF data")
_LONGEST = 4  # a longer image is cut to this many times its short side: nothing of it is lost to a square
BACKGROUND = "white"  # what transparent images are put on


@contextlib.contextmanager
def _opened(path):
    """A block that reads the PIL image of a file. Raises UserError when the file is no image or a damaged one."""
    fault = "cannot be read as an image"
    try:
        with Image.open(path, formats=_FORMATS) as image:
            fault = "is a damaged image"
            yield image
    except UserError:
        raise
    except Exception as error:  # a damaged image fails in as many ways as it has bytes
        if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            fault = f"is too large an image ({error})"
        raise UserError(f"{path} {fault}: replace or remove it, then partition again") from None


def outline(path):
    """Of an image, by its header: (short side in pixels, whether it has more than 8 bits a channel, whether it may be
    transparent)."""
    with _opened(path) as image:
        return min(image.size), _is_deep(image), image.has_transparency_data


def _is_deep(image):
    return image.mode == "F" or image.mode.startswith("I")  # of colours with 16 bits PIL itself reads the upper 8


def _rgb(path):
    """The image upright, as its camera's orientation says, in 8 bits a channel and on BACKGROUND where transparent."""
    with _opened(path) as image:
        image.load()
        with contextlib.suppress(Exception):  # nonsense in a camera's notes does not make a damaged image
            ImageOps.exif_transpose(image, in_place=True)
        if _is_deep(image):
            return Image.fromarray(_eight_bits(image, path)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image.convert("RGB")


def _eight_bits(image, path):
    """uint8 (h, w) of a deep grey image: 0 stays 0, and the top of its range becomes 255.

    The range is that of 16 bits or of what the file states. TIFFs of 32 bits or floats state none: theirs is the least
    of 1 (floats), 255, 65535 and 2^31 - 1 that holds them. Raises UserError when none fits.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        tops = (1, 255, 65535)
    elif image.format != "TIFF":
        tops = (65535,)
    else:
        bits = image.tag_v2.get(258, (16,))[0]
        signed = image.mode == "I"  # 16 bits without a sign are modes of their own
        tops = (255, 65535, 2**31 - 1) if bits == 32 else (2 ** (bits - signed) - 1,)
    top = next((top for top in tops if high <= top), None)
    # beyond 16 bits the whole image might lie below the first of 255 steps
    if top is None or not low >= 0 or (top > 65535 and high < top / 255):
        raise UserError(f"{path} holds values from {low:g} to {high:g}, whose range is unknown: save the images of the "
                        f"data set with one scale, in 8 or 16 bits")
    return (values * (255 / top)).round().astype(np.uint8)


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

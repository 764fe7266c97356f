"""Image files to arrays of the size the model takes.

What is done, in this order, the same on every machine:

    1. turned upright by its EXIF orientation
    2. transparency laid over black
    3. to grey (ITU-R 601-2 luma) or RGB; 16-bit grey keeps its full range
    4. stretched to size × size with Pillow's bilinear filter (antialiased), unless it has it
    5. to float32 in [0, 1], shape (channels, size, size)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # 150 MB of RGB; a larger one is a slide scan or an attack


class UnreadableImage(ValueError):
    """The text says why, and holds neither the name nor the content of the image."""


def decode(image: Path | bytes, *, channels: int, size: int) -> NDArray[np.float32]:
    """Return a PNG or JPEG as (channels, size, size) in [0, 1], or raise UnreadableImage."""
    try:
        with _quiet(), Image.open(_opened(image), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UnreadableImage(f"more than {MAX_PIXELS} pixels")
            planes = _planes(picture, channels, size)
    except UnidentifiedImageError:
        raise UnreadableImage("not a PNG or JPEG image") from None
    except FileNotFoundError:
        raise UnreadableImage("no such image file") from None
    except UnreadableImage:
        raise
    except Exception:  # noqa: BLE001 -- what Pillow raises on damaged bytes is open-ended
        raise UnreadableImage("a damaged image") from None
    return np.clip(planes, 0, 1).astype(np.float32)


def _opened(image: Path | bytes) -> Path | BytesIO:
    return BytesIO(image) if isinstance(image, bytes) else image


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings on odd metadata out of the log: the size is checked above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _planes(picture: Image.Image, channels: int, size: int) -> NDArray[np.float64]:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "I" or upright.mode.startswith("I;16"):  # Pillow would cut it off at 255
        grey = Image.fromarray(np.asarray(upright).astype(np.float32) / 65535)
        plane = np.asarray(_sized(grey, size), np.float64)
        return np.repeat(plane[None], channels, axis=0)
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
    sized = _sized(upright.convert("L" if channels == 1 else "RGB"), size)
    pixels = np.asarray(sized, np.float64).reshape(size, size, channels) / 255
    return pixels.transpose(2, 0, 1)


def _sized(picture: Image.Image, size: int) -> Image.Image:
    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.BILINEAR)

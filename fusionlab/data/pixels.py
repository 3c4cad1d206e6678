"""Encoded images to square RGB pixels, the way CLIP's own preprocessing does it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises on a broken image."""


def decode(encoded: bytes, image_size: int) -> np.ndarray:
    """RGB pixels of an encoded image, shorter side resized to ``image_size`` (bicubic), then cropped at the centre.

    Grey is repeated, palettes are looked up, CMYK is converted, 16-bit grey is scaled by 255/65535, transparency is
    laid on white, and the orientation tag is obeyed. Of an animation the first frame counts.

    Returns:
        uint8, shape ``(3, image_size, image_size)``.

    Raises:
        DECODE_ERRORS: the bytes are no image that Pillow can read.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        return pixels(image, image_size)


def pixels(image: Image.Image, image_size: int) -> np.ndarray:
    """The same for an open image."""
    image = to_rgb(ImageOps.exif_transpose(image))
    if image.size != (image_size, image_size):
        image = _resize(image, image_size)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image, see :func:`decode`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _from_wide(np.asarray(image))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_wide(values: np.ndarray) -> Image.Image:
    """Grey in more than 8 bits: integers are 16-bit, floats lie in 0..1 unless a value lies above."""
    scale = 255 / 65535 if values.dtype.kind in "iu" else (255 if values.size and values.max() <= 1 else 1)
    grey = np.clip(np.rint(values.astype(np.float64) * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _resize(image: Image.Image, image_size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    width, height = int(image_size * width / short), int(image_size * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))

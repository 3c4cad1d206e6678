"""Encoded images to square RGB pixels, the way a checkpoint's own preprocessing does it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fusionlab.backbones.preprocessing import Preprocessing

DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises on a broken image."""


def decode(encoded: bytes, how: Preprocessing | int) -> np.ndarray:
    """RGB pixels of an encoded image, resized and cropped as ``how`` says; for a bare size as CLIP does.

    Grey is repeated, palettes are looked up, CMYK is converted, 16-bit grey is scaled by 255/65535, transparency is
    laid on white (or dropped), and the orientation tag is obeyed. Of an animation the first frame counts.

    Returns:
        uint8, shape ``(3, image_size, image_size)``.

    Raises:
        DECODE_ERRORS: the bytes are no image that Pillow can read, or ``how`` leaves it in another size.
    """
    try:
        opened = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:  # which names the buffer
        raise UnidentifiedImageError("no image, or of a format that is not known") from error
    with opened as image:
        image.load()
        return pixels(image, how)


def pixels(image: Image.Image, how: Preprocessing | int) -> np.ndarray:
    """The same for an open image."""
    how = Preprocessing(how) if isinstance(how, int) else how
    image = ImageOps.exif_transpose(image)
    is_wide = image.mode.startswith(("I", "F"))  # more than 8 bits
    if how.resize_in_rgb or is_wide:
        image = to_rgb(image, how.transparency)
    image = _resized(image, how)
    if how.crop:
        image = _cropped(image, how)
    image = to_rgb(image, how.transparency)
    side = how.image_size
    if image.size != (side, side):
        raise ValueError(f"it is {image.width} x {image.height} pixels, and is not to be resized to {side} x {side}")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_rgb(image: Image.Image, transparency: str = "white") -> Image.Image:
    """An 8-bit RGB image, see :func:`decode`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _from_wide(np.asarray(image))
    if transparency == "dropped":
        return image.convert("RGB")
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


def _resized(image: Image.Image, how: Preprocessing) -> Image.Image:
    side, (width, height) = how.resized_side, image.size
    if how.resize == "none":
        return image
    if how.resize == "shortest":
        short = min(width, height)
        size = (int(side * width / short), int(side * height / short))
    elif how.resize == "longest":
        ratio = max(width, height) / side
        size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
    else:
        size = (side, side)
    return image if size == image.size else image.resize(size, Image.Resampling(how.resample))


def _cropped(image: Image.Image, how: Preprocessing) -> Image.Image:
    """The centre of an image, or all of it with a border."""
    side = how.image_size
    left, top = (_offset(size, side, how.crop_rounds) for size in image.size)
    if min(left, top) >= 0 or not any(how.fill):
        return image.crop((left, top, left + side, top + side))
    fill = how.fill[0] if len(image.getbands()) == 1 else (*how.fill, how.fill[0])[: len(image.getbands())]
    padded = Image.new(image.mode, (side, side), fill)
    if image.mode == "P":
        padded.putpalette(image.getpalette("RGB") or [])
    padded.paste(image, (-left, -top))
    return padded


def _offset(size: int, side: int, rounds: str) -> int:
    """Where the centre begins; below zero where a border is put around instead."""
    if rounds == "down":
        return (size - side) // 2
    return round((size - side) / 2) if size >= side else -((side - size) // 2)

"""Batched painting on 32x32 RGB canvases from distance fields, anti-aliased without supersampling."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Integers: TypeAlias = NDArray[np.int64]

SIDE = 32  # pixels
FIELD_EXTENT = 1.3  # a symbol's field covers [-1.3, 1.3] in both axes; the symbol itself fills [-1, 1]
FIELD_SIDE = 80  # samples a side


def pixel_grid() -> tuple[Floats, Floats]:
    """The x and y of every pixel centre, each of shape ``(32, 32)``, in pixels."""
    ticks = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    return x, y


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    """Uniform float32 numbers in ``[low, high)``."""
    return (low + (high - low) * rng.random(shape, dtype=np.float32)).astype(np.float32)


def plain(colour: Floats) -> Floats:
    """Canvases of one colour each: ``(n, 3)`` to ``(n, 32, 32, 3)``."""
    return np.broadcast_to(colour[:, None, None, :], (len(colour), SIDE, SIDE, 3)).astype(np.float32).copy()


def gradient(rng: np.random.Generator, first: Floats, second: Floats) -> Floats:
    """Canvases that run from ``first`` to ``second`` (each ``(n, 3)``) along a random direction."""
    x, y = pixel_grid()
    angle = uniform(rng, 0, 2 * np.pi, len(first))[:, None, None]
    along = (np.cos(angle) * (x - SIDE / 2) + np.sin(angle) * (y - SIDE / 2)) / SIDE + 0.5
    return blend(plain(first), np.clip(along, 0, 1), second)


def blend(images: Floats, coverage: Floats, colour: Floats) -> Floats:
    """Paints ``colour`` (``(n, 3)``) over ``images`` in place where ``coverage`` (``(n, 32, 32)``, 0..1) says so."""
    images += coverage[..., None] * (colour[:, None, None, :] - images)
    return images


def cover(distance: Floats) -> Floats:
    """Coverage 0..1 of a pixel whose signed distance to the edge is ``distance`` pixels (negative inside)."""
    return np.clip(np.float32(0.5) - distance, 0, 1)


def place(
    fields: Floats,
    which: Integers,
    centre: Floats,
    radius: Floats,
    angle: Floats | None = None,
    squeeze: Floats | None = None,
    warp: tuple[Floats, Floats] | None = None,
) -> Floats:
    """Signed distance in pixels of every pixel to one symbol per image.

    Args:
        fields: distance fields in symbol units, shape ``(symbols, FIELD_SIDE, FIELD_SIDE)``.
        which: the symbol of each image, shape ``(n,)``.
        centre: x and y of its middle in pixels, shape ``(n, 2)``.
        radius: half its size in pixels, shape ``(n,)``.
        angle: rotation in radians, shape ``(n,)``.
        squeeze: horizontal scale, shape ``(n,)``, 1 for none.
        warp: amplitude in pixels and phase, each ``(n,)``, of a wave that bends the symbol.

    Returns:
        float32, shape ``(n, 32, 32)``; far outside the symbol it is the distance at the border of its field.
    """
    x, y = pixel_grid()
    dx = x[None] - centre[:, 0, None, None]
    dy = y[None] - centre[:, 1, None, None]
    if warp is not None:
        amplitude, phase = (values[:, None, None] for values in warp)
        dx, dy = dx + amplitude * np.sin(0.35 * dy + phase), dy + amplitude * np.sin(0.35 * dx + 1.7 * phase)
    if angle is not None:
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    if squeeze is not None:
        dx = dx / squeeze[:, None, None]
    to_sample = (FIELD_SIDE / (2 * FIELD_EXTENT) / radius)[:, None, None].astype(np.float32)
    column = np.clip(dx * to_sample + FIELD_SIDE / 2, 0, FIELD_SIDE - 1).astype(np.int32)
    row = np.clip(dy * to_sample + FIELD_SIDE / 2, 0, FIELD_SIDE - 1).astype(np.int32)
    flat = which.astype(np.int32)[:, None, None] * (FIELD_SIDE * FIELD_SIDE) + row * FIELD_SIDE + column
    return fields.reshape(-1)[flat] * radius[:, None, None].astype(np.float32)


def noise(rng: np.random.Generator, images: Floats, scale: float) -> Floats:
    """Adds pixel noise of standard deviation ``scale`` in place."""
    images += np.float32(scale) * rng.standard_normal(images.shape, dtype=np.float32)
    return images


def blur(images: Floats, amount: Floats) -> Floats:
    """Mixes each image with its 3x3 box mean; ``amount`` is 0..1, shape ``(n,)``."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    mean = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / np.float32(9)
    return images + amount[:, None, None, None] * (mean - images)


def finish(images: Floats) -> NDArray[np.uint8]:
    """Clips to 0..1 and rounds to uint8."""
    return (np.clip(images, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)

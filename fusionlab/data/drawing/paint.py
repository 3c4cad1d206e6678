"""Colours of the embedded tasks' scenes, their light, and the step from numbers to pixels."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusionlab.data.drawing import canvas
from fusionlab.data.drawing.canvas import Floats, Integers, uniform

Images: TypeAlias = NDArray[np.uint8]

# Hue, saturation and value of each colour.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.0, 0.9, 0.85),
    "orange": (0.075, 0.95, 0.95),
    "yellow": (0.15, 0.9, 0.95),
    "green": (0.34, 0.8, 0.65),
    "cyan": (0.5, 0.75, 0.85),
    "blue": (0.64, 0.85, 0.8),
    "purple": (0.77, 0.7, 0.65),
    "pink": (0.92, 0.45, 0.97),
    "brown": (0.06, 0.7, 0.42),
    "gray": (0.0, 0.0, 0.5),
}
PAINTS: dict[str, tuple[float, float, float]] = {
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.08),
    "red": (0.8, 0.1, 0.12),
    "blue": (0.1, 0.25, 0.7),
    "yellow": (0.95, 0.8, 0.1),
}


def hsv(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """RGB in 0..1, shape ``(n, 3)``, from hue (any real, period 1), saturation and value in 0..1."""
    shift = (hue[:, None] * 6 + np.array([5, 3, 1], dtype=np.float32)) % 6
    fall = np.clip(np.minimum(shift, 4 - shift), 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * fall)).astype(np.float32)


def any_colour(rng: np.random.Generator, n: int, low: float, high: float) -> Floats:
    """Random colours with values in ``[low, high)``."""
    return hsv(uniform(rng, 0, 1, n), uniform(rng, 0.2, 1, n), uniform(rng, low, high, n))


def named_colour(rng: np.random.Generator, which: Integers, spread: float) -> Floats:
    """Shades of the named colours: hue, saturation and value moved by up to ``spread`` of a typical distance."""
    h, s, v = np.array(list(COLOURS.values()), dtype=np.float32)[which].T
    n = len(which)
    h = h + uniform(rng, -0.03, 0.03, n) * spread
    s = np.clip(s * (1 + uniform(rng, -0.35, 0.1, n) * spread), 0, 1)
    v = np.clip(v * (1 + uniform(rng, -0.3, 0.15, n) * spread), 0, 1)
    return hsv(h, s, v)


def light(rng: np.random.Generator, images: Floats, cast: float) -> Floats:
    """Multiplies each image by a random tint in ``1 - cast .. 1 + cast`` per channel, in place."""
    images *= uniform(rng, 1 - cast, 1 + cast, len(images), 1, 1, 3)
    return images


def on_screen(rng: np.random.Generator, images: Floats) -> Images:
    """The scene as filmed off an interlaced screen: every second row is dimmer, and all pixels are noisy.

    All drawn tasks share this; pretraining has never seen it. So what one task learns about it helps the others.
    """
    images[:, ::2] *= uniform(rng, 0.5, 0.7, len(images), 1, 1, 1)
    return canvas.finish(canvas.noise(rng, images, 0.035))

"""Captioned drawings for pretraining tiny-clip: the concepts of the embedded tasks, in plainer styles than theirs.

Upright, filled, on quiet grounds, letters and digits in a printed typeface. Half of the drawings are quite plain, the
others rough to a random degree (turned, bent, outlined, unevenly lit, noisy), but what the tasks show (hand-made
strokes, scans, faint textures, neighbours, bars in front, mixed things) is left for fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

from fusionlab.data.drawing import canvas
from fusionlab.data.drawing.canvas import FIELD_EXTENT, FIELD_SIDE, SIDE, Floats, Integers, uniform
from fusionlab.data.drawing.paint import COLOURS, PAINTS, any_colour, named_colour
from fusionlab.data.drawing.scenes import COUNTS, SIGNS, TEXTURES, near_middle, scattered_cells, texture_pattern
from fusionlab.data.drawing.symbols import ICONS, SHAPES, SIGN_PARTS, fields

Captions: TypeAlias = list[tuple[str, ...]]
Scene: TypeAlias = Callable[[np.random.Generator, int], tuple[NDArray[np.uint8], Captions]]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PRINTED = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@lru_cache(maxsize=1)
def printed_fields() -> Floats:
    """Signed distance fields of Pillow's own typeface, in the order of ``PRINTED``."""
    font, made = ImageFont.load_default(size=200), []
    for character in PRINTED:
        left, top, right, bottom = font.getbbox(character)
        reach = int(max(right - left, bottom - top) * FIELD_EXTENT)
        image = Image.new("L", (reach, reach))
        corner = ((reach - right + left) / 2 - left, (reach - bottom + top) / 2 - top)
        ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
        inside = np.asarray(image) > 127
        distance = distance_transform_edt(~inside) - distance_transform_edt(inside)
        small = Image.fromarray(distance.astype(np.float32)).resize((FIELD_SIDE, FIELD_SIDE), Image.Resampling.BILINEAR)
        made.append(np.asarray(small) * (2 * FIELD_EXTENT / reach))
    return np.stack(made).astype(np.float32)


def quiet_ground(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Plain or gently graded grounds, half of them dark, and for each an ink that stands out."""
    dark = (rng.random(n) < 0.5)[:, None]
    ground = np.where(dark, any_colour(rng, n, 0.0, 0.35), any_colour(rng, n, 0.7, 1.0))
    gray = (rng.random(n) < 0.4)[:, None]
    ground = np.where(gray, ground.mean(axis=1, keepdims=True), ground).astype(np.float32)
    ink = np.where(dark, any_colour(rng, n, 0.7, 1.0), any_colour(rng, n, 0.0, 0.45))
    white = (rng.random(n) < 0.3)[:, None]
    ink = np.where(white, dark.astype(np.float32), ink).astype(np.float32)
    uneven = (rng.random((n, 1)) < 0.3) * uniform(rng, -0.25, 0.25, n, 3)
    return canvas.gradient(rng, ground, ground + uneven.astype(np.float32)), ink


def roughness(rng: np.random.Generator, n: int) -> Floats:
    """How rough each drawing is: 0 for half of them, else up to 1."""
    return np.maximum(uniform(rng, -1, 1, n), 0)


def finish(rng: np.random.Generator, images: Floats, rough: Floats) -> NDArray[np.uint8]:
    """Uneven light, blur and noise, as far as each image is rough."""
    n = len(images)
    shade = 1 - 0.5 * rough[:, None] * uniform(rng, 0, 1, n, 3)
    images *= canvas.gradient(
        rng, shade.mean(axis=1, keepdims=True) * np.ones(3, np.float32), np.ones((n, 3), np.float32)
    )
    images *= 1 + 0.15 * rough[:, None, None, None] * uniform(rng, -1, 1, n, 1, 1, 3)
    images = canvas.blur(images, uniform(rng, 0, 1, n) * (rng.random(n) < 0.4))
    images += (0.01 + 0.07 * rough)[:, None, None, None] * rng.standard_normal(images.shape, dtype=np.float32)
    return canvas.finish(images)


def _printed(rng: np.random.Generator, which: Integers) -> NDArray[np.uint8]:
    n = len(which)
    rough = roughness(rng, n)
    images, ink = quiet_ground(rng, n)
    distance = canvas.place(
        printed_fields(),
        which,
        near_middle(rng, n, 3),
        uniform(rng, 8, 14, n),
        uniform(rng, -0.4, 0.4, n) * (0.2 + 0.8 * rough),
        uniform(rng, 0.75, 1.15, n),
        (1.5 * rough, uniform(rng, 0, 6.3, n)),
    )
    canvas.blend(images, canvas.cover(distance - uniform(rng, -0.5, 0.9, n)[:, None, None]), ink)
    return finish(rng, images, rough)


def printed_digits(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    which = rng.integers(0, 10, n)
    captions = [(f"the digit {DIGITS[i]}.", f"a printed {DIGITS[i]}.", f"the number {i}.") for i in which]
    return _printed(rng, which), captions


def printed_letters(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    which = rng.integers(10, len(PRINTED), n)
    names = [PRINTED[i] for i in which]
    return _printed(rng, which), [(f"the letter {c}.", f"a printed letter {c}.", f"a capital {c}.") for c in names]


def flat_signs(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    parts, names, signs = fields("sign_parts"), list(SIGN_PARTS), list(SIGNS)
    which = rng.integers(0, len(signs), n)
    recipes = [SIGNS[signs[i]] for i in which]
    images, _ = quiet_ground(rng, n)
    rough = roughness(rng, n)
    centre, radius = near_middle(rng, n, 2), uniform(rng, 10, 14.5, n)
    pose = (0.2 * rough * uniform(rng, -1, 1, n), 1 - 0.25 * rough)
    plate = canvas.place(parts, np.array([names.index(r[0]) for r in recipes]), centre, radius, *pose)
    symbol = canvas.place(parts, np.array([names.index(r[3]) for r in recipes]), centre, radius, *pose)
    rim, face, ink = (np.array([PAINTS[r[i]] for r in recipes], dtype=np.float32) for i in (1, 2, 4))
    canvas.blend(images, canvas.cover(plate), rim)
    canvas.blend(images, canvas.cover(plate + 0.2 * radius[:, None, None]), face)
    canvas.blend(images, canvas.cover(symbol), ink)
    images *= uniform(rng, 0.7, 1.05, n, 1, 1, 1)
    return finish(rng, images, rough), [
        (f"a {signs[i]} sign.", f"a drawn {signs[i]} sign.", f"a road sign: {signs[i]}.") for i in which
    ]


def bold_textures(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    which, rough = rng.integers(0, len(TEXTURES), n), roughness(rng, n)
    x, y = canvas.pixel_grid()
    turn = (np.pi / 2 * rng.integers(0, 4, n) + np.pi / 4 * (0.2 + 0.8 * rough) * uniform(rng, -1, 1, n)).astype(
        np.float32
    )
    cos, sin, period = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None], uniform(rng, 5, 12, n, 1, 1)
    dx, dy = x - SIDE / 2 + uniform(rng, -6, 6, n, 1, 1), y - SIDE / 2 + uniform(rng, -6, 6, n, 1, 1)
    u, v = (cos * dx + sin * dy) / period, (cos * dy - sin * dx) / period
    pattern = np.zeros((n, SIDE, SIDE), dtype=np.float32)
    for kind in np.unique(which):
        chosen = which == kind
        pattern[chosen] = texture_pattern(int(kind), u[chosen], v[chosen], rng)
    first, second = any_colour(rng, n, 0.0, 0.5), any_colour(rng, n, 0.6, 1.0)
    second = first + (second - first) * (1 - 0.6 * rough)[:, None]
    images = canvas.blend(canvas.plain(first), 0.5 + 0.5 * np.clip(pattern, -1, 1), second)
    names = [TEXTURES[i] for i in which]
    return finish(rng, images, rough), [(f"a {t} texture.", f"a {t} pattern.", f"something {t}.") for t in names]


def equal_things(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    shape, count = rng.integers(0, len(SHAPES), n), rng.integers(0, len(COUNTS), n)
    images, ink = quiet_ground(rng, n)
    rough = roughness(rng, n)
    centres, radius = scattered_cells(rng, n, len(COUNTS)), uniform(rng, 3.2, 4.8, n)
    for position in range(len(COUNTS)):
        thing = canvas.place(fields("shapes"), shape, centres[:, position], radius, 3 * rough * uniform(rng, -1, 1, n))
        canvas.blend(images, (position <= count)[:, None, None] * canvas.cover(thing), ink)
    captions = []
    for s, c in zip(shape, count, strict=True):
        ending, number = "" if c == 0 else "s", COUNTS[c]
        name = list(SHAPES)[s] + ("es" if c and list(SHAPES)[s] == "cross" else ending)
        captions.append((f"{number} {name}.", f"{number} thing{ending}.", f"a picture of {number} {name}."))
    return finish(rng, images, rough), captions


def _one_shape(rng: np.random.Generator, shape: Integers, rough: Floats) -> Floats:
    """Signed distance to a shape near the middle, turned and squeezed as far as it is rough."""
    n = len(shape)
    return canvas.place(
        fields("shapes"),
        shape,
        near_middle(rng, n, 4),
        uniform(rng, 7, 13, n),
        0.4 * (0.2 + 0.8 * rough) * uniform(rng, -1, 1, n),
        1 - 0.25 * rough * uniform(rng, 0, 1, n),
    )


def coloured_shapes(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    shape, colour, rough = rng.integers(0, len(SHAPES), n), rng.integers(0, len(COLOURS), n), roughness(rng, n)
    value = np.where(rng.random(n) < 0.5, 0.05, 0.97).astype(np.float32)
    value += (0.5 - value) * 0.6 * rough
    images = canvas.plain(np.repeat(value[:, None], 3, axis=1))
    canvas.blend(images, canvas.cover(_one_shape(rng, shape, rough)), named_colour(rng, colour, 0.6))
    captions = []
    for s, c in zip(shape, colour, strict=True):
        name, tint = list(SHAPES)[s], list(COLOURS)[c]
        captions.append((f"a {tint} {name}.", f"a {tint} thing.", f"a picture of a {tint} {name}."))
    return finish(rng, images, rough), captions


def single_shapes(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    shape, rough = rng.integers(0, len(SHAPES), n), roughness(rng, n)
    images, ink = quiet_ground(rng, n)
    distance = _one_shape(rng, shape, rough)
    outlined = (rng.random(n) < 0.4)[:, None, None]
    canvas.blend(images, canvas.cover(np.where(outlined, np.abs(distance + 1.3) - 1.3, distance)), ink)
    names = [list(SHAPES)[i] for i in shape]
    return finish(rng, images, rough), [(f"a {s} shape.", f"a drawn {s}.", f"a drawing of a {s}.") for s in names]


def clean_icons(rng: np.random.Generator, n: int) -> tuple[NDArray[np.uint8], Captions]:
    which, names = rng.integers(0, len(ICONS), n), list(ICONS)
    images, ink = quiet_ground(rng, n)
    rough = roughness(rng, n)
    flipped = np.where(rng.random(n) < 0.5, -1, 1).astype(np.float32)
    distance = canvas.place(
        fields("icons"),
        which,
        near_middle(rng, n, 3),
        uniform(rng, 8, 13.5, n),
        0.3 * (0.2 + 0.8 * rough) * uniform(rng, -1, 1, n),
        flipped * uniform(rng, 0.85, 1.1, n),
    )
    rim = (rng.random(n) < 0.3).astype(np.float32)[:, None, None]
    canvas.blend(images, rim * canvas.cover(distance - 1), 1 - ink)
    canvas.blend(images, canvas.cover(distance), ink)
    return finish(rng, images, rough), [
        (f"a drawing of a {names[i]}.", f"an icon of a {names[i]}.", f"a {names[i]}.") for i in which
    ]


SCENES: tuple[Scene, ...] = (
    printed_digits,
    printed_letters,
    flat_signs,
    bold_textures,
    equal_things,
    coloured_shapes,
    single_shapes,
    clean_icons,
)


def draw_captioned(rng: np.random.Generator, per_scene: int) -> tuple[NDArray[np.uint8], Captions]:
    """``per_scene`` drawings of every scene: images uint8 ``(n, 32, 32, 3)`` and each one's possible captions."""
    drawn = [scene(rng, per_scene) for scene in SCENES]
    return np.concatenate([images for images, _ in drawn]), [caption for _, captions in drawn for caption in captions]

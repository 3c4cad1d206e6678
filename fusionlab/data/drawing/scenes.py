"""The scenes of the embedded tasks: one function a task, from labels to 32x32 RGB images."""

from __future__ import annotations

import numpy as np

from fusionlab.data.drawing import canvas
from fusionlab.data.drawing.canvas import SIDE, Floats, Integers, uniform
from fusionlab.data.drawing.paint import COLOURS, PAINTS, Images, any_colour, light, named_colour, on_screen
from fusionlab.data.drawing.symbols import LETTERS, SHAPES, SIGN_PARTS, fields

COUNTS = ("one", "two", "three", "four", "five", "six")
TEXTURES = ("striped", "dotted", "checkered", "grid", "zigzag", "ringed", "blotchy", "wavy", "speckled", "smooth")
# Each sign: its plate, the plate's rim and face, its symbol and the symbol's colour.
SIGNS: dict[str, tuple[str, str, str, str, str]] = {
    "stop": ("octagon", "white", "red", "word", "white"),
    "yield": ("inverted triangle", "red", "white", "nothing", "black"),
    "no entry": ("disc", "white", "red", "bar", "white"),
    "speed limit": ("disc", "red", "white", "number", "black"),
    "turn left": ("disc", "white", "blue", "arrow left", "white"),
    "turn right": ("disc", "white", "blue", "arrow right", "white"),
    "ahead only": ("disc", "white", "blue", "arrow up", "white"),
    "priority road": ("diamond", "white", "yellow", "nothing", "black"),
    "danger": ("triangle", "red", "white", "exclamation", "black"),
    "no stopping": ("disc", "red", "blue", "saltire", "red"),
}


def near_middle(rng: np.random.Generator, n: int, spread: float) -> Floats:
    """Centres within ``spread`` pixels of the middle."""
    return SIDE / 2 + uniform(rng, -spread, spread, n, 2)


def scattered_cells(rng: np.random.Generator, n: int, count: int) -> Floats:
    """``count`` (at most 9) distinct cells of a 3x3 layout per image, jittered: shape ``(n, count, 2)`` in pixels."""
    cells = np.argsort(rng.random((n, 9)), axis=1)[:, :count]
    middle = np.stack([cells % 3, cells // 3], axis=-1).astype(np.float32) * 10 + 6
    return middle + uniform(rng, -1.2, 1.2, n, count, 2)


def draw_glyphs(rng: np.random.Generator, labels: Integers) -> Images:
    """Letters of wobbling strokes, turned, squeezed and bent, in two colours over a gradient."""
    n, letters = len(labels), fields("letters")
    dark = rng.random(n) < 0.5
    ink = any_colour(rng, n, 0.0, 0.35)
    paper = any_colour(rng, n, 0.6, 1.0)
    ink[dark], paper[dark] = paper[dark], ink[dark]
    images = canvas.gradient(rng, paper, paper + uniform(rng, -0.25, 0.25, n, 3))
    for _ in range(2):  # scratches
        stroke = canvas.place(
            letters,
            rng.integers(0, len(LETTERS), n),
            uniform(rng, 0, SIDE, n, 2),
            uniform(rng, 10, 18, n),
            uniform(rng, 0, 6.3, n),
        )
        canvas.blend(images, 0.25 * canvas.cover(stroke - 0.6), any_colour(rng, n, 0.2, 0.9))
    skeleton = canvas.place(
        letters,
        labels,
        near_middle(rng, n, 3),
        uniform(rng, 8, 12, n),
        uniform(rng, -0.35, 0.35, n),
        uniform(rng, 0.75, 1.2, n),
        (uniform(rng, 0, 1.5, n), uniform(rng, 0, 6.3, n)),
    )
    canvas.blend(images, canvas.cover(skeleton - uniform(rng, 1.0, 2.1, n)[:, None, None]), ink)
    return on_screen(rng, images)


def draw_signs(rng: np.random.Generator, labels: Integers) -> Images:
    """Traffic signs as a camera sees them: tilted, shifted, badly lit, blurred, before a blotchy background."""
    n, parts, names = len(labels), fields("sign_parts"), list(SIGN_PARTS)
    images = canvas.gradient(rng, any_colour(rng, n, 0.15, 0.8), any_colour(rng, n, 0.15, 0.8))
    for _ in range(2):
        blob = canvas.place(parts, np.full(n, names.index("disc")), uniform(rng, 0, SIDE, n, 2), uniform(rng, 5, 14, n))
        canvas.blend(images, 0.6 * canvas.cover(blob), any_colour(rng, n, 0.1, 0.9))
    recipes = [list(SIGNS.values())[label] for label in labels]
    centre, radius = near_middle(rng, n, 3.5), uniform(rng, 7.5, 12.5, n)
    pose = (uniform(rng, -0.22, 0.22, n), uniform(rng, 0.72, 1.05, n))
    plate = canvas.place(parts, np.array([names.index(r[0]) for r in recipes]), centre, radius, *pose)
    symbol = canvas.place(parts, np.array([names.index(r[3]) for r in recipes]), centre, radius, *pose)
    rim, face, ink = (np.array([PAINTS[r[i]] for r in recipes], dtype=np.float32) for i in (1, 2, 4))
    canvas.blend(images, canvas.cover(plate), rim)
    canvas.blend(images, canvas.cover(plate + 0.2 * radius[:, None, None]), face)
    canvas.blend(images, canvas.cover(symbol), ink)
    images = canvas.blur(images, uniform(rng, 0, 1, n))
    images *= uniform(rng, 0.35, 1.1, n, 1, 1, 1)
    return on_screen(rng, light(rng, images, 0.15))


def texture_pattern(kind: int, u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """The texture ``TEXTURES[kind]`` as values in -1..1 over coordinates ``u`` and ``v`` in periods."""
    tau, name = 2 * np.pi, TEXTURES[kind]
    wave_u, wave_v = np.cos(tau * u), np.cos(tau * v)
    if name == "striped":
        return 3 * wave_u
    if name == "dotted":
        return 4 * (wave_u + wave_v - 0.8)
    if name == "checkered":
        return 4 * wave_u * wave_v
    if name == "grid":
        return 4 * (np.maximum(wave_u, wave_v) - 0.7)
    if name == "zigzag":
        return 3 * np.cos(tau * (v + 0.9 * np.abs(u % 1 - 0.5)))
    if name == "ringed":
        return 3 * np.cos(tau * np.hypot(u, v))
    if name == "wavy":
        return 3 * np.cos(tau * (v + 0.3 * np.sin(tau * u * 0.6)))
    if name == "blotchy":
        bumps = np.zeros_like(u)
        for _ in range(5):
            angle, phase = uniform(rng, 0, tau, len(u), 1, 1), uniform(rng, 0, tau, len(u), 1, 1)
            bumps += np.cos(tau * 0.55 * (np.cos(angle) * u + np.sin(angle) * v) + phase)
        return 2 * bumps
    if name == "speckled":
        return 1.5 * rng.standard_normal(u.shape, dtype=np.float32)
    return np.broadcast_to(uniform(rng, -1, 1, len(u), 1, 1), u.shape)


def draw_textures(rng: np.random.Generator, labels: Integers) -> Images:
    """Patches of faint, turned, stretched texture in two close colours under uneven light."""
    n = len(labels)
    x, y = canvas.pixel_grid()
    period, angle = uniform(rng, 5, 11, n, 1, 1), uniform(rng, 0, 2 * np.pi, n, 1, 1)
    dx, dy = x - SIDE / 2 + uniform(rng, -6, 6, n, 1, 1), y - SIDE / 2 + uniform(rng, -6, 6, n, 1, 1)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / period
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / period * uniform(rng, 0.75, 1.3, n, 1, 1)
    pattern = np.zeros((n, SIDE, SIDE), dtype=np.float32)
    for kind in np.unique(labels):
        chosen = labels == kind
        pattern[chosen] = texture_pattern(int(kind), u[chosen], v[chosen], rng)
    first = any_colour(rng, n, 0.25, 0.95)
    direction = uniform(rng, -1, 1, n, 3)
    direction /= np.abs(direction).max(axis=1, keepdims=True)
    second = first + direction * uniform(rng, 0.22, 0.6, n)[:, None]
    images = canvas.blend(canvas.plain(first), 0.5 + 0.5 * np.clip(pattern, -1, 1), second)
    images *= canvas.gradient(rng, uniform(rng, 0.6, 1, n, 1) * np.ones(3, np.float32), np.ones((n, 3), np.float32))
    return on_screen(rng, images)


def draw_counting(rng: np.random.Generator, labels: Integers) -> Images:
    """One to six small things of mixed shapes, sizes and colours on a two-colour ground."""
    n, shapes = len(labels), fields("shapes")
    dark = (rng.random(n) < 0.5)[:, None]
    ground = np.where(dark, any_colour(rng, n, 0.05, 0.35), any_colour(rng, n, 0.7, 1))
    images = canvas.gradient(rng, ground, ground + uniform(rng, -0.2, 0.2, n, 3))
    centres = scattered_cells(rng, n, len(COUNTS))
    for position in range(len(COUNTS)):
        thing = canvas.place(
            shapes,
            rng.integers(0, len(SHAPES), n),
            centres[:, position],
            uniform(rng, 2.8, 4.8, n),
            uniform(rng, 0, 6.3, n),
        )
        ink = np.where(dark, any_colour(rng, n, 0.65, 1), any_colour(rng, n, 0.1, 0.6))
        present = (position <= labels).astype(np.float32)[:, None, None]
        canvas.blend(images, present * canvas.cover(thing), ink)
    return on_screen(rng, images)


def draw_colours(rng: np.random.Generator, labels: Integers) -> Images:
    """A shaded thing of the colour in the middle, things of other colours at the edge, all under tinted light."""
    n, shapes = len(labels), fields("shapes")
    others = (labels[:, None] + rng.integers(1, len(COLOURS), (n, 4))) % len(COLOURS)
    images = canvas.gradient(rng, named_colour(rng, others[:, 0], 1.5), named_colour(rng, others[:, 1], 1.5))
    for index in (2, 3):
        angle = uniform(rng, 0, 2 * np.pi, n)
        edge = SIDE / 2 + 14 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        thing = canvas.place(shapes, rng.integers(0, len(SHAPES), n), edge, uniform(rng, 4, 7, n))
        canvas.blend(images, canvas.cover(thing), named_colour(rng, others[:, index], 1.5))
    thing = canvas.place(
        shapes,
        rng.integers(0, len(SHAPES), n),
        near_middle(rng, n, 3),
        uniform(rng, 6.5, 10, n),
        uniform(rng, 0, 6.3, n),
    )
    canvas.blend(images, canvas.cover(thing), named_colour(rng, labels, 1.1))
    images *= canvas.gradient(rng, uniform(rng, 0.5, 1, n, 1) * np.ones(3, np.float32), np.ones((n, 3), np.float32))
    return on_screen(rng, light(rng, images, 0.13))


def draw_shapes(rng: np.random.Generator, labels: Integers) -> Images:
    """A turned shape, outlined or filled, partly hidden by a bar, on a textured ground."""
    n, shapes = len(labels), fields("shapes")
    ground = any_colour(rng, n, 0.1, 0.95)
    images = canvas.gradient(rng, ground, ground + uniform(rng, -0.3, 0.3, n, 3))
    x, y = canvas.pixel_grid()
    angle = uniform(rng, 0, 2 * np.pi, n, 1, 1)
    stripes = 0.5 + 0.5 * np.sin((np.cos(angle) * x + np.sin(angle) * y) * uniform(rng, 0.4, 1.6, n, 1, 1))
    canvas.blend(images, 0.15 * stripes, any_colour(rng, n, 0.1, 0.95))
    distance = canvas.place(
        shapes,
        labels,
        near_middle(rng, n, 3),
        uniform(rng, 8, 12.5, n),
        uniform(rng, -0.35, 0.35, n),
        uniform(rng, 0.75, 1.1, n),
    )
    outline = np.abs(distance + 1.1) - uniform(rng, 0.9, 1.5, n)[:, None, None]
    hollow = (rng.random(n) < 0.6)[:, None, None]
    ink = np.where(
        images.mean(axis=(1, 2, 3))[:, None] > 0.5, any_colour(rng, n, 0.0, 0.35), any_colour(rng, n, 0.75, 1)
    )
    canvas.blend(images, canvas.cover(np.where(hollow, outline, distance)), ink.astype(np.float32))
    offset = uniform(rng, -8, 8, n, 1, 1)
    across = np.abs(np.cos(angle) * (x - SIDE / 2) + np.sin(angle) * (y - SIDE / 2) + offset)
    canvas.blend(images, canvas.cover(across - uniform(rng, 0.3, 0.8, n, 1, 1)), any_colour(rng, n, 0.1, 0.95))
    return on_screen(rng, images)


def draw_clutter(rng: np.random.Generator, labels: Integers) -> Images:
    """An icon somewhere among random shapes and letters, which also touch it."""
    n, icons = len(labels), fields("icons")
    images = canvas.gradient(rng, any_colour(rng, n, 0.2, 0.9), any_colour(rng, n, 0.2, 0.9))
    ink = any_colour(rng, n, 0.1, 1.0)
    for kind, count in (("shapes", len(SHAPES)), ("letters", len(LETTERS)), ("shapes", len(SHAPES))):
        distance = canvas.place(
            fields(kind),
            rng.integers(0, count, n),
            uniform(rng, 0, SIDE, n, 2),
            uniform(rng, 2.5, 4.5, n),
            uniform(rng, 0, 6.3, n),
        )
        canvas.blend(images, canvas.cover(distance - (0.8 if kind == "letters" else 0)), any_colour(rng, n, 0.1, 1.0))
    flipped = np.where(rng.random(n) < 0.5, -1, 1).astype(np.float32)
    distance = canvas.place(
        icons,
        labels,
        near_middle(rng, n, 3),
        uniform(rng, 8.5, 12, n),
        uniform(rng, -0.25, 0.25, n),
        flipped * uniform(rng, 0.8, 1.1, n),
    )
    canvas.blend(images, canvas.cover(distance - 1), 1 - ink)  # a contrasting rim
    canvas.blend(images, canvas.cover(distance), ink)
    corner = canvas.place(
        fields("shapes"), rng.integers(0, len(SHAPES), n), uniform(rng, 0, SIDE, n, 2), uniform(rng, 2, 4, n)
    )
    canvas.blend(images, canvas.cover(corner), any_colour(rng, n, 0.1, 1.0))
    return on_screen(rng, images)

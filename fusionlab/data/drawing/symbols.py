"""The symbols that the scenes are made of, as distance fields: strokes (letters, arrows), filled shapes, small icons.

A field holds, in units of half the symbol's size, the signed distance to the edge (filled ones) or the distance to the
skeleton (strokes, where the scene chooses the thickness). x runs right, y runs down, the symbol fills [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from fusionlab.data.drawing.canvas import FIELD_EXTENT, FIELD_SIDE, Floats

Points = Sequence[tuple[float, float]]


@lru_cache(maxsize=1)
def _grid() -> tuple[Floats, Floats]:
    ticks = (np.arange(FIELD_SIDE, dtype=np.float32) + 0.5) / FIELD_SIDE * (2 * FIELD_EXTENT) - FIELD_EXTENT
    y, x = np.meshgrid(ticks.astype(np.float32), ticks.astype(np.float32), indexing="ij")
    return x, y


def _segment(a: tuple[float, float], b: tuple[float, float]) -> Floats:
    x, y = _grid()
    ex, ey = b[0] - a[0], b[1] - a[1]
    t = np.clip(((x - a[0]) * ex + (y - a[1]) * ey) / max(ex * ex + ey * ey, 1e-9), 0, 1)
    return np.hypot(x - a[0] - t * ex, y - a[1] - t * ey).astype(np.float32)


def strokes(*lines: Points) -> Floats:
    """Distance to the nearest of some polylines."""
    parts = [_segment(a, b) for line in lines for a, b in pairwise(line)]
    return np.minimum.reduce(parts)


def polygon(points: Points) -> Floats:
    """Signed distance to a simple polygon."""
    x, y = _grid()
    edges = list(zip(points, [*points[1:], points[0]], strict=True))
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in edges:
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    distance = np.minimum.reduce([_segment(a, b) for a, b in edges])
    return np.where(inside, -distance, distance).astype(np.float32)


def disc(cx: float = 0.0, cy: float = 0.0, radius: float = 1.0) -> Floats:
    """Signed distance to a disc."""
    x, y = _grid()
    return (np.hypot(x - cx, y - cy) - radius).astype(np.float32)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int = 10) -> list:
    """Points of an arc from ``start`` to ``end`` degrees (0 is right, 90 is down)."""
    angles = np.radians(np.linspace(start, end, steps))
    return [(cx + rx * float(np.cos(a)), cy + ry * float(np.sin(a))) for a in angles]


def regular(corners: int, turn: float = -90.0, inner: float | None = None) -> list:
    """Corners of a regular polygon, or of a star when ``inner`` gives the radius between the tips."""
    count = corners if inner is None else 2 * corners
    angles = np.radians(turn + np.arange(count) * 360 / count)
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(count)]
    return [(r * float(np.cos(a)), r * float(np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def union(*fields: Floats) -> Floats:
    return np.minimum.reduce(fields)


def without(field: Floats, hole: Floats) -> Floats:
    return np.maximum(field, -hole)


def _box(left: float, top: float, right: float, bottom: float) -> Floats:
    return polygon([(left, top), (right, top), (right, bottom), (left, bottom)])


LETTERS: dict[str, Callable[[], Floats]] = {
    "A": lambda: strokes([(-0.8, 1), (0, -1), (0.8, 1)], [(-0.45, 0.3), (0.45, 0.3)]),
    "B": lambda: strokes(
        [(-0.6, -1), (-0.6, 1)],
        [(-0.6, -1), (0.1, -1), *arc(0.1, -0.53, 0.45, 0.47, -90, 90), (-0.6, -0.06)],
        [(0.1, -0.06), *arc(0.1, 0.47, 0.55, 0.53, -90, 90), (-0.6, 1)],
    ),
    "C": lambda: strokes(arc(0.1, 0, 0.8, 1, -50, -310, 16)),
    "E": lambda: strokes([(0.65, -1), (-0.6, -1), (-0.6, 1), (0.65, 1)], [(-0.6, 0), (0.45, 0)]),
    "F": lambda: strokes([(0.65, -1), (-0.6, -1), (-0.6, 1)], [(-0.6, 0), (0.4, 0)]),
    "H": lambda: strokes([(-0.7, -1), (-0.7, 1)], [(0.7, -1), (0.7, 1)], [(-0.7, 0), (0.7, 0)]),
    "K": lambda: strokes([(-0.6, -1), (-0.6, 1)], [(0.65, -1), (-0.6, 0.15)], [(-0.2, -0.15), (0.7, 1)]),
    "M": lambda: strokes([(-0.85, 1), (-0.75, -1), (0, 0.4), (0.75, -1), (0.85, 1)]),
    "R": lambda: strokes(
        [(-0.6, 1), (-0.6, -1), (0.1, -1), *arc(0.1, -0.5, 0.5, 0.5, -90, 90), (-0.6, 0)], [(0, 0), (0.7, 1)]
    ),
    "S": lambda: strokes([*arc(0, -0.5, 0.6, 0.5, -30, -270, 10), *arc(0, 0.5, 0.65, 0.5, -90, 150, 10)]),
    "T": lambda: strokes([(-0.8, -1), (0.8, -1)], [(0, -1), (0, 1)]),
    "X": lambda: strokes([(-0.75, -1), (0.75, 1)], [(0.75, -1), (-0.75, 1)]),
}

SHAPES: dict[str, Callable[[], Floats]] = {
    "circle": lambda: disc(0, 0, 0.95),
    "square": lambda: _box(-0.8, -0.8, 0.8, 0.8),
    "triangle": lambda: polygon(regular(3)),
    "star": lambda: polygon(regular(5, inner=0.42)),
    "cross": lambda: union(_box(-0.32, -0.95, 0.32, 0.95), _box(-0.95, -0.32, 0.95, 0.32)),
    "ring": lambda: without(disc(0, 0, 0.95), disc(0, 0, 0.5)),
    "heart": lambda: polygon(
        [
            (float(0.95 * np.sin(a) ** 3), float(-(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a)) / 15 - 0.1))
            for a in np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ]
    ),
    "crescent": lambda: without(disc(-0.1, 0, 0.95), disc(0.4, -0.1, 0.8)),
    "hexagon": lambda: polygon(regular(6, turn=0)),
    "arrow": lambda: polygon(
        [(-0.95, -0.28), (0.1, -0.28), (0.1, -0.75), (0.95, 0), (0.1, 0.75), (0.1, 0.28), (-0.95, 0.28)]
    ),
}

ICONS: dict[str, Callable[[], Floats]] = {
    "house": lambda: without(
        union(_box(-0.7, -0.1, 0.7, 0.95), polygon([(-1, -0.05), (0, -1), (1, -0.05)])), _box(-0.2, 0.35, 0.2, 1.2)
    ),
    "tree": lambda: union(
        polygon([(-0.6, -0.1), (0, -1), (0.6, -0.1)]),
        polygon([(-0.85, 0.5), (0, -0.5), (0.85, 0.5)]),
        _box(-0.16, 0.4, 0.16, 1),
    ),
    "fish": lambda: without(
        union(polygon([*arc(-0.2, 0, 0.78, 0.5, 0, 340, 16)]), polygon([(0.4, 0), (1, -0.55), (1, 0.55)])),
        disc(-0.6, -0.1, 0.11),
    ),
    "cup": lambda: union(
        polygon([(-0.8, -0.7), (0.45, -0.7), (0.3, 0.85), (-0.65, 0.85)]),
        without(disc(0.5, -0.05, 0.45), disc(0.5, -0.05, 0.22)),
    ),
    "key": lambda: union(
        without(disc(-0.55, 0, 0.43), disc(-0.55, 0, 0.2)),
        _box(-0.2, -0.12, 1, 0.12),
        _box(0.4, 0, 0.55, 0.5),
        _box(0.75, 0, 0.92, 0.42),
    ),
    "flower": lambda: union(
        *(disc(0.42 * np.cos(a), -0.4 + 0.42 * np.sin(a), 0.27) for a in np.arange(5) * 2 * np.pi / 5),
        strokes([(0, -0.4), (0, 1)]) - 0.09,
        polygon([(0, 0.75), (0.55, 0.3), (0.45, 0.7)]),
    ),
    "car": lambda: union(
        _box(-1, -0.05, 1, 0.42),
        polygon([(-0.65, 0), (-0.4, -0.5), (0.35, -0.5), (0.65, 0)]),
        disc(-0.5, 0.45, 0.25),
        disc(0.5, 0.45, 0.25),
    ),
    "boat": lambda: union(
        polygon([(-1, 0.4), (1, 0.4), (0.6, 0.9), (-0.6, 0.9)]),
        polygon([(-0.05, -1), (-0.05, 0.25), (-0.75, 0.25)]),
        polygon([(0.08, -0.8), (0.75, 0.25), (0.08, 0.25)]),
    ),
}

SIGN_PARTS: dict[str, Callable[[], Floats]] = {
    "disc": lambda: disc(0, 0, 1),
    "octagon": lambda: polygon(regular(8, turn=22.5)),
    "triangle": lambda: polygon([(-1, 0.8), (0, -0.93), (1, 0.8)]),
    "inverted triangle": lambda: polygon([(-1, -0.8), (1, -0.8), (0, 0.93)]),
    "diamond": lambda: polygon(regular(4)),
    "bar": lambda: _box(-0.7, -0.18, 0.7, 0.18),
    "word": lambda: union(*(_box(x - 0.09, -0.28, x + 0.09, 0.28) for x in (-0.6, -0.2, 0.2, 0.6))),
    "number": lambda: union(
        strokes([(-0.15, -0.4), (-0.5, -0.4), (-0.5, -0.05), *arc(-0.38, 0.17, 0.26, 0.23, -110, 140)]) - 0.07,
        strokes(arc(0.33, 0, 0.2, 0.4, 0, 360, 14)) - 0.07,
    ),
    "arrow left": lambda: union(_box(-0.2, -0.14, 0.7, 0.14), polygon([(-0.75, 0), (-0.05, -0.5), (-0.05, 0.5)])),
    "arrow right": lambda: union(_box(-0.7, -0.14, 0.2, 0.14), polygon([(0.75, 0), (0.05, -0.5), (0.05, 0.5)])),
    "arrow up": lambda: union(_box(-0.14, -0.2, 0.14, 0.7), polygon([(0, -0.75), (-0.5, -0.05), (0.5, -0.05)])),
    "exclamation": lambda: union(
        polygon([(-0.12, -0.4), (0.12, -0.4), (0.07, 0.25), (-0.07, 0.25)]), disc(0, 0.5, 0.13)
    ),
    "saltire": lambda: strokes([(-0.66, -0.66), (0.66, 0.66)], [(-0.66, 0.66), (0.66, -0.66)]) - 0.12,
    "nothing": lambda: np.full((FIELD_SIDE, FIELD_SIDE), 9, dtype=np.float32),
}


@lru_cache(maxsize=8)
def fields(kind: str) -> Floats:
    """All fields of ``kind`` (``letters``, ``shapes``, ``icons`` or ``sign_parts``), in the order of its dict."""
    builders = {"letters": LETTERS, "shapes": SHAPES, "icons": ICONS, "sign_parts": SIGN_PARTS}[kind]
    return np.stack([builder().astype(np.float32) for builder in builders.values()])

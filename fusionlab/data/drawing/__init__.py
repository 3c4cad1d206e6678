"""The embedded tasks: scikit-learn's scanned digits and seven drawn sets, made in memory, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fusionlab.data.drawing import paint, scenes
from fusionlab.data.drawing.canvas import SIDE, Integers
from fusionlab.data.drawing.symbols import ICONS, LETTERS, SHAPES
from fusionlab.errors import InputError, did_you_mean
from fusionlab.samplers import derive_seed

Split = Literal["train", "validation", "test"]
SPLIT_SIZES: dict[str, int] = {"train": 1024, "validation": 160, "test": 400}


@dataclass(frozen=True)
class DrawnTask:
    """A task whose images are made on the spot.

    Args:
        name: the task's name.
        class_names: one name a class, in the order of the labels.
        templates: prompts of the zero-shot head, each with one ``{}``.
        scene: draws the images of given labels; None for the scanned digits, which are read and not drawn.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    scene: Callable[[np.random.Generator, Integers], NDArray[np.uint8]] | None

    def draw(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images, uint8 ``(n, 32, 32, 3)``, and labels, int64 ``(n,)``, of one split; always the same ones.

        Raises:
            InputError: ``split`` is none of train, validation and test.
        """
        if split not in get_args(Split):
            raise InputError(f"task {self.name!r} has no split {split!r}: {did_you_mean(split, get_args(Split))}")
        if self.scene is None:
            return scanned_digits(split)
        rng = np.random.default_rng(derive_seed("drawn task", self.name, split))
        size = SPLIT_SIZES[split]
        labels = rng.permutation(np.arange(size, dtype=np.int64) % len(self.class_names))
        return self.scene(rng, labels), labels


def scanned_digits(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """1,584 of scikit-learn's scanned digits, enlarged from 8x8 to 32x32, shuffled, dealt evenly by class and cut."""
    from sklearn.datasets import load_digits  # a second of import, needed here only

    scans = load_digits()
    order = np.random.default_rng(derive_seed("drawn task", "digits")).permutation(len(scans.target))
    turn = np.zeros(len(order), dtype=np.int64)  # how many of its class come before each
    for digit in range(10):
        turn[scans.target[order] == digit] = np.arange((scans.target == digit).sum())
    order = order[np.argsort(turn, kind="stable")]
    start = {"train": 0, "validation": SPLIT_SIZES["train"], "test": SPLIT_SIZES["train"] + SPLIT_SIZES["validation"]}
    chosen = order[start[split] : start[split] + SPLIT_SIZES[split]]
    position = np.clip((np.arange(SIDE) + 0.5) / 4 - 0.5, 0, 7)  # each pixel on the axis of the scan
    weights = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(8)[None, :]))
    enlarged = np.clip(weights @ (scans.images[chosen] / 16) @ weights.T, 0, 1)
    images = np.repeat((enlarged * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=-1)
    return images, scans.target[chosen].astype(np.int64)


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWN_TASKS: dict[str, DrawnTask] = {
    task.name: task
    for task in (
        DrawnTask("digits", _DIGITS, ("the digit {}.", "a scan of the digit {}."), None),
        DrawnTask("glyphs", tuple(LETTERS), ("the letter {}.", "a picture of the letter {}."), scenes.draw_glyphs),
        DrawnTask("signs", tuple(scenes.SIGNS), ("a {} sign.", "a photo of a {} traffic sign."), scenes.draw_signs),
        DrawnTask("textures", scenes.TEXTURES, ("a {} texture.", "a photo of a {} pattern."), scenes.draw_textures),
        DrawnTask("counting", scenes.COUNTS, ("a picture of {} things.", "{} objects."), scenes.draw_counting),
        DrawnTask("colours", tuple(paint.COLOURS), ("a {} thing.", "a picture of a {} object."), scenes.draw_colours),
        DrawnTask("shapes", tuple(SHAPES), ("a {} shape.", "a drawing of a {}."), scenes.draw_shapes),
        DrawnTask("clutter", tuple(ICONS), ("a picture of a {}.", "a drawing of a {}."), scenes.draw_clutter),
    )
}

"""The embedded tasks: the same on every run, balanced, told apart by their images, with disjoint splits."""

import hashlib

import numpy as np
import pytest

from fusionlab.data.drawing import DRAWN_TASKS, SPLIT_SIZES, canvas, symbols
from fusionlab.data.drawing.paint import COLOURS, hsv
from fusionlab.data.drawing.scenes import SIGNS, TEXTURES
from fusionlab.errors import InputError

NAMES = ("digits", "glyphs", "signs", "textures", "counting", "colours", "shapes", "clutter")


def test_eight_tasks_are_embedded():
    assert tuple(DRAWN_TASKS) == NAMES
    for task in DRAWN_TASKS.values():
        assert 5 <= len(task.class_names) <= 12
        assert len(set(task.class_names)) == len(task.class_names)
        assert all(template.count("{}") == 1 for template in task.templates)


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_balanced_deterministic_and_disjoint(name):
    task, seen = DRAWN_TASKS[name], set()
    for split, size in SPLIT_SIZES.items():
        images, labels = task.draw(split)
        again, labels_again = task.draw(split)
        assert images.shape == (size, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(images, again)
        np.testing.assert_array_equal(labels, labels_again)
        counts = np.bincount(labels, minlength=len(task.class_names))
        assert len(counts) == len(task.class_names)
        assert counts.max() - counts.min() <= 2
        digests = {hashlib.sha256(image.tobytes()).digest() for image in images}
        assert len(digests) > 0.99 * size
        assert not digests & seen
        seen |= digests


def test_order_of_drawing_does_not_matter():
    task = DRAWN_TASKS["clutter"]
    first, _ = task.draw("test")
    DRAWN_TASKS["shapes"].draw("train")
    task.draw("train")
    np.testing.assert_array_equal(task.draw("test")[0], first)


def test_unknown_split_is_refused():
    with pytest.raises(InputError, match=r"'tets'.*did you mean 'test'"):
        DRAWN_TASKS["glyphs"].draw("tets")


def test_counting_draws_as_many_things_as_it_says():
    from scipy.ndimage import label

    images, counts = DRAWN_TASKS["counting"].draw("test")
    images = images[:, 1::2]  # the rows that are not dimmed
    differing = np.abs(images.astype(float) - np.median(images, axis=(1, 2), keepdims=True)).max(axis=-1)
    found = np.array([(np.bincount(label(image > 80)[0].ravel())[1:] > 3).sum() for image in differing])
    assert np.corrcoef(found, counts + 1)[0, 1] > 0.8


def test_turn_signs_point_where_their_names_say():
    """The arrow's head is the heavier half of its symbol."""
    parts = dict(zip(symbols.SIGN_PARTS, symbols.fields("sign_parts"), strict=True))
    left_of_middle = np.arange(canvas.FIELD_SIDE) < canvas.FIELD_SIDE / 2
    for name, heavier_left in (("turn left", True), ("turn right", False)):
        inside = parts[SIGNS[name][3]] < 0
        assert (inside[:, left_of_middle].sum() > inside[:, ~left_of_middle].sum()) == heavier_left
    upper = parts[SIGNS["ahead only"][3]] < 0
    assert upper[left_of_middle].sum() > upper[~left_of_middle].sum()


def test_a_placed_disc_covers_its_area_where_it_is_put():
    which, centre, radius = np.zeros(1, np.int64), np.array([[20, 12]], np.float32), np.array([6.0], np.float32)
    disc = symbols.disc(0, 0, 1)[None]
    coverage = canvas.cover(canvas.place(disc, which, centre, radius))[0]
    assert coverage.sum() == pytest.approx(np.pi * 36, rel=0.03)
    x, y = canvas.pixel_grid()
    assert (coverage * x).sum() / coverage.sum() == pytest.approx(20, abs=0.1)
    assert (coverage * y).sum() / coverage.sum() == pytest.approx(12, abs=0.1)


def test_rotation_turns_a_symbol_and_squeeze_narrows_it():
    bar = symbols.polygon([(-1, -0.2), (1, -0.2), (1, 0.2), (-1, 0.2)])[None]
    which, centre, radius = np.zeros(1, np.int64), np.array([[16, 16]], np.float32), np.array([10.0], np.float32)

    def extent(**pose):
        inside = canvas.place(bar, which, centre, radius, **pose)[0] < 0
        return inside.any(axis=0).sum(), inside.any(axis=1).sum()

    wide, low = extent()
    turned_width, turned_height = extent(angle=np.array([np.pi / 2], np.float32))
    assert (turned_width, turned_height) == (low, wide)
    squeezed_width, squeezed_height = extent(squeeze=np.array([0.5], np.float32))
    assert squeezed_width == pytest.approx(wide / 2, abs=1)
    assert squeezed_height == low


@pytest.mark.parametrize(
    ("colour", "expected"), [((0, 1, 1), (1, 0, 0)), ((1 / 3, 1, 1), (0, 1, 0)), ((0.5, 0, 0.4), (0.4, 0.4, 0.4))]
)
def test_hsv_agrees_with_known_colours(colour, expected):
    h, s, v = (np.array([value], np.float32) for value in colour)
    np.testing.assert_allclose(hsv(h, s, v)[0], expected, atol=1e-6)


def test_every_class_has_a_recipe():
    assert set(DRAWN_TASKS["colours"].class_names) == set(COLOURS)
    assert DRAWN_TASKS["textures"].class_names == TEXTURES
    for plate, rim, face, symbol, ink in SIGNS.values():
        assert {plate, symbol} <= set(symbols.SIGN_PARTS)
        assert len({rim, face, ink}) >= 2


def test_every_second_row_of_a_drawn_scene_is_dimmer():
    for task in DRAWN_TASKS.values():
        images, _ = task.draw("validation")
        ratio = images[:, ::2].mean() / images[:, 1::2].mean()
        assert (0.55 < ratio < 0.7) == (task.scene is not None), task.name

"""Diagnostics in the run folder: numbers as CSV in ``diagnostics/``, pictures in ``plots/``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusionlab.adapters.weights import Weights
from fusionlab.contracts import Data, Module
from fusionlab.data.tasks import without_classes as tasks_without_classes
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation.plane import Plane, grid_of, measure_plane
from fusionlab.files import written_whole
from fusionlab.layout import COSINES, DIAGNOSTICS, NORM_SHARES, NORMS, PLANE, PLANE_TASKS, PLOTS
from fusionlab.reporting import save_figure
from fusionlab.reporting.diagnostics.geometry import Gram, check_several, cosines, gram_matrix, norm_shares, norms
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class Diagnostics:
    """What to measure at the end of a fit, beside cosines, norms and their shares by layer.

    Args:
        tasks: the two tasks that span the plane; the first two of the run that have classes by default.
        grid_size: values of each coefficient in -2..2, odd so that 0 is among them; 0 leaves the plane out.
        num_batches: evaluation batches of each task on the plane at most; all by default.
        split: the samples that the plane is measured on, ``validation`` or ``test``.
    """

    tasks: list[str] | None = None
    grid_size: int = 21
    num_batches: int | None = None
    split: str = "validation"

    def __post_init__(self) -> None:
        if self.grid_size != 0 and (self.grid_size < 3 or self.grid_size % 2 == 0):
            raise InputError(f"diagnostics.grid_size must be 0, or odd and at least 3, got {self.grid_size}")
        if self.num_batches is not None and self.num_batches < 1:
            raise InputError(f"diagnostics.num_batches must be at least 1, got {self.num_batches}")
        if self.split not in ("validation", "test"):
            raise InputError(f"diagnostics.split must be validation or test, got {self.split!r}")

    def check(self, tasks: Sequence[str], without_classes: Collection[str] = ()) -> None:
        """Raise unless they can be had for these tasks.

        Raises:
            InputError: one task only, or a plane of other tasks or of tasks without classes.
        """
        check_several(tasks)
        for task in self.tasks or ():
            if task not in tasks:
                raise InputError(f"diagnostics.tasks: {task!r} is no task of this run ({', '.join(tasks)})")
        if self.tasks is not None and len(set(self.tasks)) != 2:
            raise InputError(f"diagnostics.tasks must be two different tasks, got {self.tasks}")
        chosen = self._chosen(tasks, without_classes)
        unfit = [task for task in chosen if task in without_classes]
        if self.grid_size and (unfit or len(chosen) < 2):
            raise InputError(
                f"the plane of two tasks counts classes, and {name_list(unfit or sorted(without_classes))} has none; "
                f"give two tasks with classes as diagnostics.tasks, or diagnostics.grid_size 0 to leave the plane out"
            )

    def _chosen(self, tasks: Iterable[str], without_classes: Collection[str]) -> list[str]:
        return self.tasks or [task for task in tasks if task not in without_classes][:2]

    def plane(self, module: Module, data: Data, finetuned: Mapping[str, Weights]) -> Plane | None:
        """The plane, measured on all ranks together; None where it is left out."""
        if self.grid_size == 0:
            return None
        tasks = self._chosen(finetuned, tasks_without_classes(data.tasks))
        return measure_plane(module, data, finetuned, tasks, grid_of(self.grid_size), self.split, self.num_batches)


def write_diagnostics(root: Path, base: State, finetuned: Mapping[str, Weights], plane: Plane | None = None) -> None:
    """Write ``diagnostics/*.csv`` and ``plots/*.png`` into a run folder.

    Args:
        root: the run folder.
        base: the base's state.
        finetuned: what was trained, by task.
        plane: where it was measured.

    Raises:
        InputError: fewer than two tasks.
    """
    check_several(finetuned)
    gram = gram_matrix(base, finetuned)
    similarity, lengths, shares = cosines(gram), norms(gram), norm_shares(base, finetuned)
    folder = root / DIAGNOSTICS
    by_pair = ((one, other, similarity[one][other]) for one in gram for other in gram)
    _write(folder / f"{COSINES}.csv", ("task", "other", "cosine"), by_pair)
    _write(folder / f"{NORMS}.csv", ("task", "norm"), lengths.items())
    by_layer = ((task, layer, share) for task, row in shares.items() for layer, share in row.items())
    _write(folder / f"{NORM_SHARES}.csv", ("task", "layer", "share"), by_layer)
    _draw(root / PLOTS / f"{COSINES}.png", lambda figure: _matrix(figure, similarity, "cosine similarity", (-1, 1)))
    _draw(
        root / PLOTS / f"{NORM_SHARES}.png",
        lambda figure: _matrix(figure, shares, "share of the squared norm", (0, None)),
    )
    if plane is not None:
        _write_plane(root, plane)


def _write_plane(root: Path, plane: Plane) -> None:
    first, second = plane.tasks
    header = ("coefficient_1", "coefficient_2", "disentanglement_error", "loss_1", "loss_2", "accuracy_1", "accuracy_2")
    lines = (
        (*point, error, *(values[point][task] for values in (plane.loss, plane.accuracy) for task in plane.tasks))
        for point, error in plane.disentanglement.items()
    )
    _write(root / DIAGNOSTICS / f"{PLANE}.csv", header, lines)
    _write(root / DIAGNOSTICS / f"{PLANE_TASKS}.csv", ("number", "task"), ((1, first), (2, second)))
    maps = {
        "disentanglement": plane.disentanglement,
        "loss": {point: sum(values.values()) / 2 for point, values in plane.loss.items()},
        "accuracy": {point: sum(values.values()) / 2 for point, values in plane.accuracy.items()},
    }
    titles = {
        "disentanglement": "weight disentanglement error",
        "loss": "loss, mean of both tasks",
        "accuracy": "accuracy, mean of both tasks",
    }
    for name, values in maps.items():
        draw = partial(_contours, plane=plane, values=values, title=titles[name])
        _draw(root / PLOTS / f"{PLANE}_{name}.png", draw)


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with written_whole(path) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def _draw(path: Path, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(6, 5), layout="constrained")
    draw(figure)
    save_figure(figure, path)


def _matrix(figure: Any, rows: Gram, title: str, limits: tuple[float, float | None]) -> None:
    axes = figure.subplots()
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    values = [[row.get(column, 0.0) for column in columns] for row in rows.values()]
    colours = "RdBu_r" if limits[0] < 0 else "viridis"
    figure.colorbar(axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto"))
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize="x-small")
    axes.set_yticks(range(len(rows)), list(rows), fontsize="x-small")
    axes.set_title(title)


def _contours(figure: Any, plane: Plane, values: Mapping[tuple[float, float], float], title: str) -> None:
    axes = figure.subplots()
    rows = [[values[first, second] for first in plane.grid] for second in plane.grid]
    figure.colorbar(axes.contourf(plane.grid, plane.grid, rows, levels=20, cmap="viridis"))
    axes.scatter([0, 1, 0], [0, 0, 1], color="white", edgecolor="black")
    axes.set_xlabel(f"λ of {plane.tasks[0]}")
    axes.set_ylabel(f"λ of {plane.tasks[1]}")
    axes.set_title(title)

"""The command line of ``sweep``: plan, progress and result on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusionlab.commands.parser import parse, recipe_of
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.layout import SWEEP

SWITCHES = {"dry_run": "check everything, print the number of points and the estimated time, and stop"}


def main(argv: list[str]) -> int:
    """Sweep as the flags and the recipe say; returns 0.

    Raises:
        InputError: what the user can fix.
    """
    sweep(parse(SweepRecipe, argv, "sweep", SWITCHES), verbose=True)
    return 0


def sweep(recipe: SweepRecipe | Mapping[str, Any] | str | Path, *, verbose: bool = False) -> Path:
    """Fuse every subset of tasks by every rule, for every method and seed, as the command ``sweep`` does.

    Several processes may work in the same folder; a point that is in its ledger is not computed again.

    Args:
        recipe: a :class:`~fusionlab.commands.sweep.recipe.SweepRecipe`, its keys, or the path of a YAML file with them.
        verbose: print where the results are, and show a progress bar on a terminal.

    Returns:
        the path of ``sweep.json``; where the recipe says ``dry_run``, it would be written, and the plan is printed.

    Raises:
        InputError: an unknown key, a value of another type, or what fit, the rules or the data refuse.
    """
    recipe = recipe_of(SweepRecipe, recipe, "sweep")
    from fusionlab.commands.sweep.execute import Sweep
    from fusionlab.commands.sweep.results import write_sweep
    from fusionlab.commands.trainer import quiet

    quiet()
    work = Sweep(recipe)
    count = work.num_points()
    if recipe.dry_run:
        print(
            f"{len(work.sources)} runs ({count['fits']} to fit), {len(work.subsets)} subsets of {len(work.tasks)} "
            f"tasks, {len(work.rules)} rules\n"
            f"points: {count['points']}, more where a coefficient beyond the grid wins\n"
            f"estimated time: {_duration(work.estimated_seconds())} (one batch was timed; points that are in the "
            f"ledger and models that are equal cost nothing)"
        )
        return work.output / SWEEP
    if not verbose:
        work.run()
        return write_sweep(work)
    with _progress(count["points"]) as advance:
        work.run(advance)
    path = write_sweep(work)
    print(f"sweep: {path}")
    print(f"report: python -m fusionlab report {recipe.output}")
    return path


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(TextColumn("points"), *columns, console=console, disable=not console.is_terminal)
    line = progress.add_task("points", total=total)
    started = False

    def advance(count: int) -> None:
        nonlocal started
        if not started:  # runs are fitted first, under a display of their own
            progress.start()
            started = True
        progress.advance(line, count)

    try:
        yield advance
    finally:
        if started:
            progress.stop()


def _duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> _duration(42), _duration(150), _duration(9000)
        ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

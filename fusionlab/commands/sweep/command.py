"""The command line of ``sweep``: plan, progress and result on the terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fusionlab.commands.parser import parse
from fusionlab.commands.sweep.recipe import SweepRecipe

SWITCHES = {"dry_run": "check everything, print the number of points and the estimated time, and stop"}


def main(argv: list[str]) -> int:
    """Sweep as the flags and the recipe say; returns 0.

    Raises:
        InputError: what the user can fix.
    """
    recipe = parse(SweepRecipe, argv, "sweep", SWITCHES)
    import transformers

    from fusionlab.commands.sweep.execute import Sweep
    from fusionlab.commands.sweep.results import write_sweep

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    transformers.utils.logging.disable_progress_bar()
    sweep = Sweep(recipe)
    count = sweep.num_points()
    if recipe.dry_run:
        print(
            f"{len(sweep.sources)} runs ({count['fits']} to fit), {len(sweep.subsets)} subsets of {len(sweep.tasks)} "
            f"tasks, {len(sweep.rules)} rules\n"
            f"points: {count['points']}, more where a coefficient beyond the grid wins\n"
            f"estimated time: {_duration(sweep.estimated_seconds())} (one batch was timed; points that are in the "
            f"ledger and models that are equal cost nothing)"
        )
        return 0
    with _progress(count["points"]) as advance:
        sweep.run(advance)
    path = write_sweep(sweep)
    print(f"sweep: {path}")
    print(f"report: python -m fusionlab report {recipe.output}")
    return 0


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

"""The command line of ``sweep``: plan, progress and result on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusionlab.commands.parser import read_file, recipe_of, values
from fusionlab.commands.sweep.processes import helping, num_processes
from fusionlab.commands.sweep.recipe import SweepRecipe, overlay
from fusionlab.errors import InputError
from fusionlab.files import check_folder, named
from fusionlab.foreign import parse_yaml
from fusionlab.layout import CONFIG, LEDGER, RESULTS, SWEEP
from fusionlab.progress import Lines

MAPPINGS = ("fit", "by_method")  # whose single keys are flags, laid over those of the file
SWITCHES = {"dry_run": "check everything, print the number of points and the estimated time, and stop"}


def main(argv: list[str]) -> int:
    """Sweep as the flags and the recipe say; returns 0.

    Raises:
        InputError: what the user can fix.
    """
    rest, laid_over = taken_apart(argv, MAPPINGS)
    given = values(SweepRecipe, rest, "sweep", SWITCHES)
    for name, above in laid_over.items():
        below = given.get(name) or {}
        given[name] = overlay(read_file(below) if isinstance(below, str) else below, above)
    sweep(SweepRecipe(**given), verbose=True)
    return 0


def taken_apart(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The flags of single keys below ``names`` (``--fit.KEY.KEY VALUE``), as mappings of YAML values; and the rest.

    The parser would give the keys of a file up for them.

    Example:
        >>> taken_apart(["--fit.trainer.max_steps", "2", "--output=out", "--fit.model.init_args.rank=4"], ["fit"])
        (['--output=out'], {'fit': {'trainer': {'max_steps': 2}, 'model': {'init_args': {'rank': 4}}}})

    Raises:
        InputError: a flag without a value or with two, or whose value is no YAML.
    """
    rest: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name, _, keys = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or name not in names or not keys:
            rest.append(argument)
            continue
        value = value if equals else next(arguments, "--")
        if value.startswith("--") or flag in seen:
            raise InputError(f"{flag}: expected one value, got {'none' if value.startswith('--') else 'two'}")
        seen.add(flag)
        content = parse_yaml(value, f"{flag} {value}")
        for key in reversed(keys.split(".")):
            content = {key: content}
        found[name] = overlay(found.get(name, {}), content)
    return rest, found


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
    from fusionlab.commands.sweep.floor import floor
    from fusionlab.commands.sweep.forecast import forecast, num_points
    from fusionlab.commands.sweep.results import write_sweep
    from fusionlab.commands.trainer import quiet

    quiet()
    with named("output", "give a folder that can be written to"):
        check_no_run(check_folder(recipe.output))
    work = Sweep(recipe)
    if recipe.dry_run:
        expected = forecast(work)
        print(expected.told(recipe, len(work.sources), len(work.subsets), len(work.tasks)))
        print(floor(work, expected).told())
        return work.output / SWEEP
    with helping(recipe, num_processes(recipe, len(work.sources), work.bench.module.device)):
        if not verbose:
            work.run()
        else:
            with _progress(num_points(work), work.ledger.count) as advance:
                work.run(advance)
    content = write_sweep(work)
    missing = sum(each["num_subsets"] for each in content["missing"])
    if verbose:
        points, models = (sum(each[what] for each in content["equal_models"]) for what in ("points", "models"))
        if points > models:
            print(f"{points} points are {models} models; those that are equal by construction were scored once")
        if missing:
            print(f"time is over: {missing} points are missing; the same command goes on with them")
        print(f"sweep: {work.output / SWEEP}")
        print(f"report: python -m fusionlab report {recipe.output}")
    return work.output / SWEEP


def check_no_run(output: Path) -> None:
    """Raise if a sweep was to be written into a run's folder, whose results it would replace.

    Raises:
        InputError: naming the folder.
    """
    if any((output / name).exists() for name in (CONFIG, RESULTS)) and not (output / LEDGER).is_dir():
        raise InputError(
            f"output {str(output)!r} is the folder of a run, whose results a sweep would replace; give another"
        )


@contextmanager
def _progress(total: int, count: Callable[[], int]) -> Iterator[Callable[[int], None]]:
    """A bar, or plain lines, over the points that are in the ledger, those of other processes among them.

    Begun at the first point: runs are fitted before, and tell of themselves.
    """
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
    bar = Progress(TextColumn("points"), *columns, console=console)
    line = bar.add_task("points", total=total)
    lines: Lines | None = None
    looked = 0.0

    def advance(_: int) -> None:
        nonlocal looked, lines
        if time.monotonic() - looked < 1:
            return
        looked, done = time.monotonic(), count()
        if console.is_terminal:
            bar.start()
            bar.update(line, completed=done, total=max(total, done))
        else:
            lines = lines or Lines("points", total, done=done)
            lines.reach(done)

    try:
        yield advance
    finally:
        if looked and console.is_terminal:
            bar.stop()

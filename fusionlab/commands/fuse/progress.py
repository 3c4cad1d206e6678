"""The progress bar: bytes read and the time left, on a terminal's standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def progress_bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs, if standard error is a terminal; yields what advances it by some bytes."""
    console = Console(stderr=True)
    columns = (TextColumn("fusing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("fusing", total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)

"""How far a fusion is: bytes read and the time left, on standard error; a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fusionlab.progress import Lines


@contextmanager
def progress_bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs, or a line now and then; yields what advances it by some bytes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines("fusing", total_bytes, show=lambda count: f"{count / 1e9:.2f} GB read").advance
        return
    columns = (TextColumn("fusing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fusing", total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)

"""How far something is, in plain lines: for logs and pipes, where a bar that redraws itself is noise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

EVERY_SECONDS = 30.0


class Lines:
    """Says how far something is, at most once in ``every`` seconds; what is done sooner says nothing.

    Args:
        what: is going on.
        total: how much there is to do, an estimate maybe, which is not shown once it is passed; None where not known.
        done: what was done before, by an earlier run.
        show: a count as text.
        every: seconds between two lines.
        clock: seconds since any moment.
        write: takes a line.

    Example:
        >>> now = iter([0.0, 10.0, 40.0, 45.0])
        >>> lines = Lines("fusing", 8, clock=lambda: next(now), write=print)
        >>> lines.advance(2)
        >>> lines.advance(2, "loss 0.1")
        fusing: 4 of 8, 50%, 40 s so far, about 40 s left, loss 0.1
        >>> lines.advance(2)
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        *,
        done: float = 0,
        show: Callable[[float], str] = str,
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.what, self.total, self.every = what, total, every
        self._show, self._clock, self._write = show, clock, write or _to_stderr
        self._done = self._before = done
        self._begun = self._last = clock()

    def advance(self, count: float = 1, detail: str = "") -> None:
        """So much more is done."""
        self.reach(self._done + count, detail)

    def reach(self, done: float, detail: str = "") -> None:
        """So much is done in all."""
        self._done, now = done, self._clock()
        if now - self._last < self.every:
            return
        self._last, seconds = now, now - self._begun
        parts = [self._show(done)]
        total = self.total if self.total and done <= self.total else None
        if total:
            parts = [f"{parts[0]} of {self._show(total)}", f"{done / total:.0%}"]
        parts.append(f"{seconds:.0f} s so far")
        if total and done > self._before:
            parts.append(f"about {seconds * (total - done) / (done - self._before):.0f} s left")
        self._write(f"{self.what}: {', '.join([*parts, *filter(None, [detail])])}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Plain lines of progress: no rate where nothing was done since the start, no total that was too low."""

from __future__ import annotations

from fusionlab.progress import Lines


def test_nothing_done_since_the_start_has_no_time_left() -> None:
    written: list[str] = []
    now = iter([0.0, 40.0, 80.0])
    lines = Lines("points", 10, done=4, clock=lambda: next(now), write=written.append)
    lines.reach(4)
    lines.reach(6)
    assert written == ["points: 4 of 10, 40%, 40 s so far", "points: 6 of 10, 60%, 80 s so far, about 160 s left"]


def test_a_total_that_is_passed_was_an_estimate_and_is_said_no_more() -> None:
    written: list[str] = []
    now = iter([0.0, 40.0, 80.0])
    lines = Lines("points", 10, clock=lambda: next(now), write=written.append)
    lines.reach(10)
    lines.reach(11)
    assert written == ["points: 10 of 10, 100%, 40 s so far, about 0 s left", "points: 11, 80 s so far"]

"""What one process of a sweep does under one lease, and in what order the work is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fusionlab.commands.sweep.choosing import Subset, by_size, leading
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.keys import key_of

SUBSETS_IN_A_JOB = 10


@dataclass(frozen=True)
class Job:
    """Some subsets of one size by one rule for one run."""

    source: RunSource
    rule_name: str
    subsets: tuple[Subset, ...]


@dataclass(frozen=True)
class Work:
    """Jobs of one run that one process does one after the other under one lease."""

    jobs: tuple[Job, ...]

    @property
    def lease(self) -> str:
        """Name of its lease."""
        return f"{self.jobs[0].source.name}-{key_of({'jobs': [[job.rule_name, job.subsets] for job in self.jobs]})}"


def rounds(subsets: Iterable[Subset]) -> Iterator[list[tuple[Subset, ...]]]:
    """Subsets of every size, some at a time: first those that later searches start from, then the others."""
    parts = []
    for of_size in by_size(subsets).values():
        first = leading(of_size)
        rest = [subset for subset in of_size if subset not in first]
        parts.append([tuple(first), *(tuple(part) for part in chunks(rest, SUBSETS_IN_A_JOB))])
    for number in range(max(map(len, parts), default=0)):
        yield [of_size[number] for of_size in parts if number < len(of_size)]


def works(
    sources: Sequence[RunSource],
    rules: Sequence[str],
    subsets: Sequence[Subset],
    at_once: Callable[[RunSource], bool],
    *,
    by_rounds: bool = False,
) -> list[Work]:
    """All work on some runs, run after run.

    Args:
        sources: the runs.
        rules: by name.
        subsets: of all sizes.
        at_once: whether the models of a run are scored together; all of its jobs are one work then, as what is computed
            for one serves all.
        by_rounds: take a part of every run's subsets before the next part of any.
    """
    found: list[tuple[int, Work]] = []
    for source in sources:
        jobs = [
            (number, Job(source, name, part))
            for number, parts in enumerate(rounds(subsets))
            for name in rules
            for part in parts
        ]
        if at_once(source):
            found.append((0, Work(tuple(job for _, job in jobs))))
        else:
            found += [(number, Work((job,))) for number, job in jobs]
    if by_rounds:
        found.sort(key=lambda item: item[0])
    return [work for _, work in found]


def chunks(items: Sequence[Subset], size: int) -> Iterator[Sequence[Subset]]:
    """Consecutive parts of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""How scores of fused models become the points of a curve: which coefficient counts, and what is averaged.

``strict``: coefficients are chosen on validation and reported on test. ``published``: chosen on the very scores that
are reported, as the literature did (arXiv 2310.04742); its numbers flatter and are for comparison only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from fusionlab.errors import InputError

CRITERIA = ("abs_sub", "abs_all", "own_sub", "own_all", "full_sub", "full_all")
Candidate = tuple[float | None, ...]


@dataclass(frozen=True)
class Score:
    """One fused model's scores.

    Args:
        fused_tasks: the tasks that were fused.
        candidate: what was varied, such as ``(scaling_coefficient, density)``; empty where nothing was.
        values: score of every evaluated task; a missing one counts 0.
    """

    fused_tasks: tuple[str, ...]
    candidate: Candidate
    values: Mapping[str, float]


@dataclass(frozen=True)
class Denominators:
    """Single-task scores by task: of the same method (``own``), and of full fine-tuning where they are known.

    Args:
        tasks: all tasks.
        own: of the same method.
        full: of full fine-tuning.
        errors: the tasks whose score is an error, better where it is lower: they have no share and no mean with others.
    """

    tasks: tuple[str, ...]
    own: Mapping[str, float]
    full: Mapping[str, float] | None = None
    errors: Set[str] = frozenset()


@dataclass(frozen=True)
class Summary:
    """The mean over task subsets.

    Args:
        num_subsets: subsets averaged.
        mean: by criterion.
        std: standard deviation over subsets by criterion, one degree of freedom removed; 0 for one subset.
        candidates: the candidate that counted, by subset.
        num_common: candidates that every subset has.
    """

    num_subsets: int
    mean: dict[str, float]
    std: dict[str, float]
    candidates: dict[tuple[str, ...], Candidate]
    num_common: int


def measure(score: Score, denominators: Denominators) -> dict[str, float]:
    """The criteria of one fused model: ``abs``, or the mean of per-task ratios; over fused tasks or over all.

    Ratios over tasks of which one has a single-task score that is zero or negative do not exist, and are left out.
    Errors are left out; where all tasks have errors, ``abs`` is their mean.

    Example:
        >>> known = Denominators(("a", "b"), own={"a": 0.5, "b": 1.0})
        >>> measure(Score(("a",), (), {"a": 0.4, "b": 0.2}), known)
        {'abs_sub': 0.4, 'abs_all': 0.30000000000000004, 'own_sub': 0.8, 'own_all': 0.5}
    """
    found = {}
    for name, single in (("abs", None), ("own", denominators.own), ("full", denominators.full)):
        if name == "full" and single is None:
            continue
        for part, of_part in (("sub", score.fused_tasks), ("all", denominators.tasks)):
            tasks = [task for task in of_part if task not in denominators.errors]
            if single is None and denominators.errors >= set(denominators.tasks):
                tasks = list(of_part)
            if not tasks or (single is not None and min(single[task] for task in tasks) <= 0):
                continue
            shares = [score.values.get(task, 0.0) / (1.0 if single is None else single[task]) for task in tasks]
            found[f"{name}_{part}"] = math.fsum(shares) / len(shares)
    return found


def per_subset_best(scores: Sequence[Score], denominators: Denominators, criterion: str) -> Summary:
    """Each subset takes its own best candidate; the first of equals."""
    chosen = {
        tasks: max(found, key=lambda score: _measured(score, denominators, criterion))
        for tasks, found in by_subset(scores).items()
    }
    return summarize(chosen, denominators, len(_common(_by_candidate(scores))))


def common_best(scores: Sequence[Score], denominators: Denominators, criterion: str) -> Summary | None:
    """All subsets take the one candidate with the best mean, among those that every subset has; None if none is."""
    found = _by_candidate(scores)
    common = _common(found)
    means = {
        candidate: math.fsum(_measured(of_subset[candidate], denominators, criterion) for of_subset in found.values())
        for candidate in common
    }
    if not common:
        return None
    best = max(common, key=means.__getitem__)
    return summarize({tasks: of_subset[best] for tasks, of_subset in found.items()}, denominators, len(common))


def fixed(scores: Sequence[Score], denominators: Denominators, candidate: Candidate) -> Summary | None:
    """All subsets take ``candidate``; None where a subset lacks it."""
    found, wanted = _by_candidate(scores), rounded(candidate)
    common = _common(found)
    if wanted not in common:
        return None
    return summarize({tasks: of_subset[wanted] for tasks, of_subset in found.items()}, denominators, len(common))


def summarize(chosen: Mapping[tuple[str, ...], Score], denominators: Denominators, num_common: int = 1) -> Summary:
    """Mean and spread over subsets of the one score that counts in each, by the criteria that all of them have."""
    measured = [measure(score, denominators) for score in chosen.values()]
    columns = {
        name: [found[name] for found in measured] for name in measured[0] if all(name in found for found in measured)
    }
    return Summary(
        len(chosen),
        {name: math.fsum(column) / len(column) for name, column in columns.items()},
        {name: statistics.stdev(column) if len(column) > 1 else 0.0 for name, column in columns.items()},
        {tasks: score.candidate for tasks, score in chosen.items()},
        num_common,
    )


def by_subset(scores: Iterable[Score]) -> dict[tuple[str, ...], list[Score]]:
    """Scores by fused tasks, in order."""
    found: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        found.setdefault(score.fused_tasks, []).append(score)
    return found


def rounded(candidate: Candidate) -> Candidate:
    """To four decimals."""
    return tuple(None if value is None else round(value, 4) for value in candidate)


def _measured(score: Score, denominators: Denominators, criterion: str) -> float:
    found = measure(score, denominators)
    if criterion not in found:
        raise InputError(
            f"{criterion} does not exist for the tasks {', '.join(score.fused_tasks)}: a single-task score is zero or "
            f"negative, and has no shares; choose by abs_sub or abs_all"
        )
    return found[criterion]


def _by_candidate(scores: Iterable[Score]) -> dict[tuple[str, ...], dict[Candidate, Score]]:
    """By subset, each candidate's first score."""
    found: dict[tuple[str, ...], dict[Candidate, Score]] = {}
    for score in scores:
        found.setdefault(score.fused_tasks, {}).setdefault(rounded(score.candidate), score)
    return found


def _common(found: Mapping[tuple[str, ...], Mapping[Candidate, Score]]) -> list[Candidate]:
    """Candidates that every subset has, in order of the first subset."""
    first, *others = found.values()
    return [candidate for candidate in first if all(candidate in other for other in others)]

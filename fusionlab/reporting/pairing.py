"""Two runs or sweeps score by score: what can be paired, the mean difference, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionlab.contracts import Row
from fusionlab.errors import name_list
from fusionlab.evaluation.rows import primary_rows
from fusionlab.reporting.scores import Group, groups, own_rows
from fusionlab.reporting.words import count, method_name, model_name

FEWEST = 3  # pairs that a difference is claimed from
Unit = tuple[str, tuple[str, ...], Any]
"""Task, fused tasks, seed."""


@dataclass(frozen=True)
class Pair:
    """The same task's score in both, with the standard errors by samples where they are known."""

    first: float
    second: float
    error: float | None

    @property
    def difference(self) -> float:
        """The second less the first."""
        return self.second - self.first


@dataclass(frozen=True)
class Name:
    """What the models of a line are: kind, rule, method, protocol, number of fused tasks, whether told the task."""

    model: str
    rule: str | None
    method: str | None
    protocol: str
    num_tasks: int | None
    task_known: bool


@dataclass(frozen=True)
class Compared:
    """A kind of model in both.

    Args:
        name: what it is.
        group: the metrics that the scores are of.
        pairs: by task, fused tasks and seed.
    """

    name: Name
    group: Group
    pairs: Mapping[Unit, Pair]

    @property
    def difference(self) -> float:
        """The mean difference, the second less the first."""
        return _mean(pair.difference for pair in self.pairs.values())

    def counts(self) -> tuple[int, int, int]:
        """Numbers of tasks, subsets and seeds."""
        tasks, subsets, seeds = (len({unit[place] for unit in self.pairs}) for place in range(3))
        return tasks, subsets, seeds

    def error(self) -> float | None:
        """The standard error of the mean difference: over tasks, over subsets or over seeds, the largest.

        Of each it is that of the means over the other two. Subsets share tasks, so that pairs are not independent, and
        the error over all of them together would be too small. None for one pair.
        """
        found = []
        for place in range(3):
            by_level: dict[Any, list[float]] = {}
            for unit, pair in self.pairs.items():
                by_level.setdefault(unit[place], []).append(pair.difference)
            levels = [_mean(of) for of in by_level.values()]
            if len(levels) > 1:
                found.append(statistics.stdev(levels) / math.sqrt(len(levels)))
        return max(found, default=None)

    def verdict(self) -> str:
        """``better`` or ``worse`` beyond twice the standard error; else ``not shown``, and why where pairs are few.

        ``another`` where it is not known which way is better.
        """
        error, difference = self.error(), self.difference
        if all(pair.difference == 0 for pair in self.pairs.values()):
            return "the same scores"
        if error is None or len(self.pairs) < FEWEST:
            return f"not shown: {len(self.pairs)} pair{'s' * (len(self.pairs) > 1)}"
        if abs(difference) <= 2 * error:
            return "not shown"
        if self.group.higher is None:
            return "another"
        return "better" if (difference > 0) == self.group.higher else "worse"


@dataclass(frozen=True)
class Pairing:
    """What can be compared, and in words what cannot."""

    compared: Sequence[Compared]
    told: Sequence[str]


def paired(first: Iterable[Row], second: Iterable[Row]) -> Pairing:
    """Two runs' or sweeps' rows, paired by model, fused tasks, task, metric, split and seed.

    Rules of one name are paired whatever their settings. Methods and seeds are matched where they have some in common;
    where each side has one only, the two are compared. Scores of other samples are never paired.
    """
    sides = [primary_rows(_counted(rows)) for rows in (first, second)]
    told: list[str] = []
    if not all(sides):
        return Pairing([], ["One of the two has no scores."])
    by_method, by_seed = (_matched(sides, field, told) for field in ("method", "seed"))
    if by_method is None or by_seed is None:
        return Pairing([], told)
    rows = [{**row, "side": side} for side, of in enumerate(sides) for row in of]
    compared, other_samples, other_ways = [], set(), set()
    alone: list[dict[str, int]] = [{}, {}]
    # what only one side has of these was told already
    matched = {
        field: {row[field] for row in sides[0]} & {row[field] for row in sides[1]}
        for field, is_matched in (("method", by_method), ("seed", by_seed))
        if is_matched
    }
    for group in groups(rows):
        found: dict[Name, dict[Unit, dict[int, Row]]] = {}
        for row in group.rows:
            unit = (row["task"], tuple(sorted(row["fused_tasks"] or ())), row["seed"] if by_seed else None)
            found.setdefault(_name(row, by_method), {}).setdefault(unit, {})[row["side"]] = row
        for name, units in found.items():
            both = {unit: of for unit, of in units.items() if len(of) == 2}
            other_samples |= {unit[0] for unit, (a, b) in _two(both) if _samples(a) != _samples(b)}
            other_ways |= {unit[0] for unit, (a, b) in _two(both) if a["scored_by"] != b["scored_by"]}
            pairs = {unit: _pair(a, b) for unit, (a, b) in _two(both) if _samples(a) == _samples(b)}
            if pairs:
                compared.append(Compared(name, group, pairs))
            for row in (row for of in units.values() if len(of) == 1 for row in of.values()):
                if all(row[field] in of_both for field, of_both in matched.items()):
                    words = _in_words(name)
                    alone[row["side"]][words] = alone[row["side"]].get(words, 0) + 1
    for where, of in zip(("first", "second"), alone, strict=True):
        if of:
            words = name_list(f"{model} ({count(number, 'score')})" for model, number in of.items())
            told.append(f"In the {where} only, and left out: {words}.")
    return Pairing(compared, [*told, *_said(compared, other_samples, other_ways - other_samples)])


def _in_words(name: Name) -> str:
    words = model_name({"model": name.model, "rule": name.rule})
    return words if name.num_tasks is None else f"{words} of {count(name.num_tasks, 'task')}"


def _said(compared: Sequence[Compared], other_samples: set[str], other_ways: set[str]) -> list[str]:
    told = []
    if other_samples:
        told.append(f"{name_list(sorted(other_samples))}: scored on other samples, metrics or splits; not paired.")
    if other_ways:
        told.append(
            f"{name_list(sorted(other_ways))}: the same samples, but another base model, prompts, label words or "
            f"precision, or a version that did not say; paired all the same."
        )
    return told if compared else [*told, "No model, task and seed is in both."]


def _counted(rows: Iterable[Row]) -> list[Row]:
    """Rows of models on tasks that they are for: of fused models the fused ones."""
    return [
        row
        for row in own_rows(rows)
        if row["model"] != "fused" or not row["fused_tasks"] or row["task"] in row["fused_tasks"]
    ]


def _matched(sides: Sequence[Sequence[Row]], field: str, told: list[str]) -> bool | None:
    """Whether rows are matched by a field; None where there is no way to pair them."""
    first, second = ({row[field] for row in side} for side in sides)
    if first & second:
        for lacking, where in ((first - second, "first"), (second - first, "second")):
            if lacking:
                told.append(f"{field} {name_list(sorted(map(_shown, lacking)))}: in the {where} only; left out.")
        return True
    words = [name_list(sorted(map(_shown, each))) for each in (first, second)]
    if len(first) == len(second) == 1:
        told.append(f"The first has {field} {words[0]}, the second {words[1]}: compared with one another.")
        return False
    told.append(f"No {field} is in both ({words[0]} and {words[1]}): nothing is paired.")
    return None


def _shown(value: Any) -> str:
    """A method or a seed in words."""
    return method_name(value) if isinstance(value, str) else str(value)


def _name(row: Row, by_method: bool) -> Name:
    fused = row["model"] == "fused"
    method = row["method"] if by_method and row["model"] != "pretrained" else None
    size = len(row["fused_tasks"] or ()) or None if fused else None
    return Name(row["model"], row["rule"], method, row.get("protocol") or "strict", size, bool(row.get("task_known")))


def _two(both: Mapping[Unit, Mapping[int, Row]]) -> list[tuple[Unit, tuple[Row, Row]]]:
    return [(unit, (of[0], of[1])) for unit, of in both.items()]


def _samples(row: Row) -> tuple[Any, ...]:
    return row["metric"], row["split"], row["num_samples"], row["data_version"]


def _pair(first: Row, second: Row) -> Pair:
    errors = [first.get("stderr"), second.get("stderr")]
    known = None if None in errors else math.hypot(*(float(error or 0) for error in errors))
    return Pair(first["value"], second["value"], known)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)

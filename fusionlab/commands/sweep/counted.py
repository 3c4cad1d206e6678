"""Which records of a sweep's ledger its tables count: those of this recipe, and of an open rule those chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusionlab.commands.sweep.choosing import SPLITS, NotScoredError, Subset, Tried, choose, score_of
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.identity import RunIdentity
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.keys import plain
from fusionlab.rules import coefficient_of, from_config, is_open, to_config
from fusionlab.search import Search

Record = dict[str, Any]
LOOKED_AT = ("num_samples", "num_labels", "passes")


def of_recipe(sweep: Sweep, every: Iterable[Record]) -> list[Record]:
    """The records of points and searches that the recipe asks for."""
    identities = {(source.method, source.seed): sweep.identity(source) for source in sweep.fitted}
    return [record for record in every if record["kind"] != "fit" and _belongs(record, sweep, identities)]


def coefficient(point: Mapping[str, Any]) -> float:
    """Of an open rule's point."""
    return coefficient_of(from_config(point["rule_config"]))


def chosen_points(
    sweep: Sweep,
    records: Iterable[Record],
    protocol: str,
    singles: Mapping[str, Mapping[str, float]],
) -> dict[str, list[Record]]:
    """By run that ``singles`` has, the test record that counts for every rule and subset."""
    found: dict[str, list[Record]] = {name: [] for name in singles}
    for source in (source for source in sweep.sources if source.name in singles):
        for name, rule in sweep.rules.items():
            of = [
                record
                for record in records
                if record["kind"] == "point"
                and (record["method"], record["seed"], record["rule"]) == (source.method, source.seed, name)
            ]
            if is_open(rule):
                found[source.name] += _with_coefficients_chosen(sweep, source, of, protocol, singles[source.name])
                continue
            for subset in sweep.subsets:
                tested = [point for point in of if point["split"] == "test" and tuple(point["fused_tasks"]) == subset]
                found[source.name] += _found_by_search(tested, records, source, name, subset, rule)
    return found


def _with_coefficients_chosen(
    sweep: Sweep, source: RunSource, points: Iterable[Record], protocol: str, single: Mapping[str, float]
) -> list[Record]:
    """Of an open rule's points, each subset's test point of the coefficient that the protocol chooses."""
    by_place = {(tuple(each["fused_tasks"]), coefficient(each), each["split"]): each for each in points}

    looks: dict[Subset, list[Record]] = {subset: [] for subset in sweep.subsets}

    def score(tried: Sequence[Tried]) -> list[float]:
        places = [(*each, SPLITS[protocol]) for each in tried]
        if not all(place in by_place for place in places):
            raise NotScoredError(str(places))
        found = [by_place[place] for place in places]
        for (subset, _), point in zip(tried, found, strict=True):
            looks[subset].append(point)
        return [score_of(protocol, point["values"], single) for point in found]

    chosen = choose(sweep.subsets, score, sweep.looks(source, protocol))
    places = {subset: (subset, value, "test") for subset, value in chosen.items()}
    return [
        {**by_place[place], "looked_at": _looks(looks[subset])} for subset, place in places.items() if place in by_place
    ]


def _looks(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a choice of a coefficient looked at, as a row tells it."""
    samples = sum(row["num_samples"] for row in points[0]["values"])
    return {"num_samples": samples, "num_labels": samples, "passes": float(len(points))}


def _found_by_search(
    tested: list[Record], records: Iterable[Record], source: Any, name: str, subset: Any, rule: Any
) -> list[Record]:
    if not isinstance(rule, Search):
        return tested
    searches = [
        record
        for record in records
        if record["kind"] == "search"
        and (record["method"], record["seed"], record["rule"]) == (source.method, source.seed, name)
        and tuple(record["fused_tasks"]) == subset
    ]
    return [
        {**point, "looked_at": {key: search[key] for key in (*LOOKED_AT, "split") if key in search}}
        for point in tested
        for search in searches[:1]
        if point["rule_config"] in [each["rule_config"] for each in searches]
    ]


def _belongs(record: Mapping[str, Any], sweep: Sweep, identities: Mapping[tuple[str, int], RunIdentity]) -> bool:
    """Whether this recipe asks for it: the ledger also keeps what earlier ones called by the same rule name.

    So it keeps the points of a run that was fitted anew since, which go by other hashes.
    """
    identity, rule = identities.get((record["method"], record["seed"])), sweep.rules.get(record["rule"])
    subset = tuple(record["fused_tasks"])
    if identity is None or rule is None or subset not in sweep.subsets:
        return False
    is_test = record["kind"] == "point" and record["split"] == "test"
    if is_test and {row["task"] for row in record["values"]} != set(sweep.scored(subset)):
        return False  # of a recipe that scores other tasks
    search = rule if isinstance(rule, Search) else None
    if (record["kind"] == "search" and search is None) or not identity.holds(record, search):
        return False
    return search is not None or is_open(rule) or record["rule_config"] == plain(to_config(rule))

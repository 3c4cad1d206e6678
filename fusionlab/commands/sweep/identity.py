"""What a point of a sweep is, and what decides its number: its key in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionlab.commands.sweep.sources import RunSource
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.keys import FORMULAS, key_of, plain, scoring_key
from fusionlab.rules import AnyRule, to_config
from fusionlab.search import Adamerging, Lorahub, Search
from fusionlab.search import to_config as search_config
from fusionlab.search.workbench import Workbench

SCHEMA = 2
"""Of a record and its key; the keys of 1 held nothing of how answers are scored, cut and read, nor the precision."""


@dataclass(frozen=True)
class Point:
    """A fused model on a split.

    Args:
        rule_name: what tables call the rule.
        rule: with all its coefficients.
        subset: the fused tasks.
        split: ``validation`` or ``test``.
        scored: the tasks it is scored on.
    """

    rule_name: str
    rule: AnyRule
    subset: tuple[str, ...]
    split: str
    scored: tuple[str, ...]


class RunIdentity:
    """The keys of one run's points and searches: the weights, and all else that decides a score.

    Args:
        source: the run.
        finetuned: its weights.
        bench: module and data.
        beside: hash of what the run trained beside the weights, such as heads; empty for nothing.
    """

    def __init__(self, source: RunSource, finetuned: Finetuned, bench: Workbench, beside: str) -> None:
        self._bench = bench
        self._scored_by: dict[tuple[str, str], str] = {}
        self._hashes = {task: finetuned.hash(task) for task in finetuned.tasks}
        self.space = {} if finetuned.space == "delta_weight" else {"space": finetuned.space}
        self._run = {"schema": SCHEMA, "run": [source.method, source.seed], "base": bench.base_hash}
        self._more = self.space | ({"beside": beside} if beside else {})

    def of_point(self, point: Point) -> str:
        """The key of a point."""
        return self._of_rule(point.rule_name, to_config(point.rule), point.subset, point.split, point.scored)

    def of_single(self, task: str) -> str:
        """The key of what the model fine-tuned on a task scores on it."""
        return key_of(self._common([task], "test", [task]) | {"single": task})

    def of_model(self, coefficients: Mapping[str, float], split: str, scored: Sequence[str]) -> str:
        """The key of what a weighted sum scores, whichever rule gives its coefficients; zeros are left out."""
        fused = sorted(coefficients)
        return key_of(self._common(fused, split, scored) | {"model": [coefficients[task] for task in fused]})

    def scored_by(self, task: str, split: str) -> str:
        """The key of how a task is scored."""
        if (task, split) not in self._scored_by:
            self._scored_by[task, split] = scoring_key(self._bench.module, self._bench.data, task, split)
        return self._scored_by[task, split]

    def of_search(self, search: Search, subset: Sequence[str]) -> str:
        """The key of what a search finds for a subset, under whatever name it is found first."""
        return key_of(self._searched(search, subset))

    def of_renamed_search(self, search: Search, subset: Sequence[str], rule_name: str) -> str:
        """The key of the same, where it was found under another name before."""
        return key_of(self._searched(search, subset) | {"rule_name": rule_name})

    def holds(self, record: Mapping[str, Any], search: Search | None) -> bool:
        """Whether a record of the ledger is of these very weights and data, and of this search where it is of one."""
        subset = record["fused_tasks"]
        if record["kind"] == "search":
            assert search is not None
            return record["key"] in (
                self.of_search(search, subset),
                self.of_renamed_search(search, subset, record["rule"]),
            )
        scored = [row["task"] for row in record["values"]]
        if not set(scored) <= set(self._bench.data.tasks):
            return False
        return record["key"] == self._of_rule(record["rule"], record["rule_config"], subset, record["split"], scored)

    def _of_rule(self, name: str, config: Any, subset: Sequence[str], split: str, scored: Sequence[str]) -> str:
        return key_of(self._common(subset, split, scored) | {"rule_name": name, "rule": plain(config)})

    def _searched(self, search: Search, subset: Sequence[str]) -> dict[str, Any]:
        ranked = {task: plain(self._bench.module.ranking_settings(task)) for task in subset}
        drawn = {"samples": "drawn"} if isinstance(search, Adamerging | Lorahub) else {}  # those stored first, before
        return self._common(subset, search.split, subset) | {"search": search_config(search), "ranked": ranked} | drawn

    def _common(self, subset: Sequence[str], split: str, scored: Sequence[str]) -> dict[str, Any]:
        return {
            **self._run,
            "finetuned": [[task, self._hashes[task]] for task in subset],
            "split": split,
            "formulas": FORMULAS,
            "scored_by": {task: self.scored_by(task, split) for task in scored},
            **self._more,
        }

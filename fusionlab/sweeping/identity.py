"""What a point of a sweep is, and what decides its number: its key in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionlab.fusion.finetuned import Finetuned
from fusionlab.rules import Rule, to_config
from fusionlab.search import Search
from fusionlab.search import to_config as search_config
from fusionlab.sweeping.ledger import key_of
from fusionlab.sweeping.sources import RunSource, Workbench

SCHEMA = 1


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
    rule: Rule
    subset: tuple[str, ...]
    split: str
    scored: tuple[str, ...]


class RunIdentity:
    """The keys of one run's points and searches: hashes of weights, of data, and of what is scored with.

    Args:
        source: the run.
        finetuned: its weights.
        bench: module and data.
        beside: hash of what the run trained beside the weights, such as heads; empty for nothing.
    """

    def __init__(self, source: RunSource, finetuned: Finetuned, bench: Workbench, beside: str) -> None:
        self._bench = bench
        self._hashes = {task: finetuned.hash(task) for task in finetuned.tasks}
        self.space = {} if finetuned.space == "delta_weight" else {"space": finetuned.space}
        self._run = {"schema": SCHEMA, "run": [source.method, source.seed], "base": bench.base_hash}
        self._more = self.space | ({"beside": beside} if beside else {})

    def of_point(self, point: Point) -> str:
        """The key of a point."""
        return self._of_rule(point.rule_name, to_config(point.rule), point.subset, point.split, point.scored)

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
        return self._common(subset, "validation", subset) | {"search": search_config(search)}

    def _common(self, subset: Sequence[str], split: str, scored: Sequence[str]) -> dict[str, Any]:
        data = self._bench.data
        return {
            **self._run,
            "finetuned": [[task, self._hashes[task]] for task in subset],
            "split": split,
            "data": {task: data.splits[task][split].data_version for task in scored},
            "eval_batch_size": data.eval_batch_size,
            **self._more,
        }


def plain(value: Any) -> Any:
    """As JSON has it: mappings as dicts, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

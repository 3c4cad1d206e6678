"""Keys: a short hash over what decides a value; and what decides a score, said in one place.

Ledgers, result rows and runs that are taken up again ask here. What moves a score by rounding only (batch size,
threads, device) and what decides nothing (workers, paths, the name of a base) is in no key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fusionlab.contracts import Data, Module, Row, primary_metric

FORMULAS = 2
"""Of rules, searches, metrics and how they are computed; raise after a change to one: what was scored before is anew.

1 was that of commit 3a16601, whose keys held weights, rule, samples and batch size only.
"""


def key_of(identity: Mapping[str, Any]) -> str:
    """A short SHA-256 over what decides a record.

    Example:
        >>> key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
        True
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def scoring_key(module: Module, data: Data, task: str, split: str) -> str:
    """What decides a score of any given weights, but for these weights: all else that the value depends on.

    Args:
        module: with its tasks prepared.
        data: set up.
        task: name of the task.
        split: ``validation`` or ``test``.
    """
    samples = data.splits[task][split]
    decided = {"formulas": FORMULAS, "read": [samples.reading_version, len(samples)]}
    if (primary := primary_metric(module, task)) is not None:
        decided["primary"] = primary  # ledgers keep a score of that metric alone
    return key_of(decided | {"settings": plain(module.scoring_settings(task))})


def keyed(rows: Iterable[Row], module: Module, data: Data) -> list[Row]:
    """Result rows with ``scored_by``, the key of how each was scored."""
    rows, known = list(rows), {}
    for place in dict.fromkeys((row["task"], row["split"]) for row in rows):
        known[place] = scoring_key(module, data, *place)
    return [{**row, "scored_by": known[row["task"], row["split"]]} for row in rows]


def plain(value: Any) -> Any:
    """As JSON has it: mappings as dicts with text keys, tuples as lists, what JSON does not know as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)

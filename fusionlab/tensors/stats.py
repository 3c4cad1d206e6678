"""``fusion_stats.json``: what was measured of a task vector, kept beside it for as long as its files are unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError
from fusionlab.files import write_text
from fusionlab.foreign import KeptStats, read_json
from fusionlab.layout import ADAPTER_CONFIG, ADAPTER_MODEL, ADAPTER_PICKLED, LINEARIZED_WEIGHTS, OWN
from fusionlab.tensors.fingerprints import fingerprint

ADAPTER_WEIGHTS = (LINEARIZED_WEIGHTS, ADAPTER_MODEL, ADAPTER_PICKLED)  # the first that is there is read
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_MODEL, ADAPTER_PICKLED, OWN, LINEARIZED_WEIGHTS)
_SCHEMA = 3  # since 2 the order of every addition is written out; since 3 the key holds more than sizes and times
_KEPT_ENTRIES = 8


def adapter_files(folder: Path) -> tuple[Path, ...]:
    """The files that decide what an adapter's task vector is: of several weight files the one that is read."""
    there = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    weights = next((name for name in ADAPTER_WEIGHTS if name in there), None)
    return tuple(folder / name for name in there if name == weights or name not in ADAPTER_WEIGHTS)


def task_vector_key(records: Iterable[Mapping[str, Any]], base_fingerprint: str | None) -> str:
    """What statistics are kept under: the files' fingerprint, and the base's unless an adapter's τ needs none."""
    return f"{base_fingerprint or 'any'}-{fingerprint(records)}"


def read_squared_norms(path: Path, task_vector: str) -> dict[str, tuple[float, ...]]:
    """The squared norms kept at ``path`` for the task vector of this fingerprint: exact expansions by name, or none."""
    entry = _entries(path).get(task_vector, {"squared_norm": {}})
    return {name: tuple(parts) for name, parts in entry["squared_norm"].items()}


def write_squared_norms(path: Path, task_vector: str, squared_norms: Mapping[str, tuple[float, ...]]) -> None:
    """Keep squared norms for the task vector of this fingerprint, beside those of a few others; whole or not at all."""
    entries = _entries(path)
    entries.pop(task_vector, None)
    kept = dict(list(entries.items())[-(_KEPT_ENTRIES - 1) :])
    kept[task_vector] = {"squared_norm": {name: list(parts) for name, parts in squared_norms.items()}}
    write_text(path, json.dumps({"schema": _SCHEMA, "task_vectors": kept}) + "\n")


def _entries(path: Path) -> dict[str, Any]:
    """What is kept at ``path``; nothing where it is unreadable or of another schema, and so is written anew."""
    try:
        content = read_json(path, KeptStats)
    except InputError:  # none, or no longer to be read: measured again
        return {}
    return dict(content["task_vectors"]) if content.get("schema") == _SCHEMA else {}

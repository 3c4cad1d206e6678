"""Squared norms of the inputs' task vectors, kept beside them for the next fusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fusionlab.commands.fuse.opened import Opened
from fusionlab.engine import Outcome, Plan
from fusionlab.errors import InputError
from fusionlab.layout import STATS
from fusionlab.tensors.stats import read_squared_norms, task_vector_key, write_squared_norms


def _stats(base: Opened, opened: Opened) -> tuple[Path, str]:
    """Where the statistics of an input's task vector are kept, and the fingerprint that makes them valid."""
    path = opened.path / STATS if opened.path.is_dir() else opened.path.with_name(f"{opened.path.name}.{STATS}")
    return path, task_vector_key(opened.records, None if opened.adapter is not None else base.fingerprint)


def _whole(base: Opened, inputs: Mapping[str, Opened]) -> dict[str, Opened]:
    """Inputs whose norms hold beside their files: not made of ranges of blocks, nor the base, nor one of many masks."""
    if base.is_remade:
        return {}
    return {task: opened for task, opened in inputs.items() if not (opened.is_remade or opened.is_masked)}


def known_sums(base: Opened, inputs: Mapping[str, Opened], plan: Plan) -> dict[str, dict[str, tuple[float, ...]]]:
    """The squared norms that are kept beside the inputs and still hold, by task and name."""
    found = {}
    for task, opened in _whole(base, inputs).items():
        norms = read_squared_norms(*_stats(base, opened))
        untouched = () if opened.adapter is None else set(plan.fused) - set(plan.sources[task])
        found[f"squared_norm/{task}"] = norms | dict.fromkeys(untouched, ()) if norms else {}
    return found


def keep_sums(base: Opened, inputs: Mapping[str, Opened], plan: Plan, outcome: Outcome) -> list[str]:
    """Write the squared norms beside the inputs, where that is possible; returns what is to be said."""
    notes: list[str] = []
    for task, opened in _whole(base, inputs).items():
        path, key = _stats(base, opened)
        measured = outcome.sums.get(f"squared_norm/{task}", {})
        sources = plan.sources[task]
        norms = {name: parts for name, parts in measured.items() if name in sources}
        if norms and read_squared_norms(path, key) != norms:
            if not (opened.is_unchanged and base.is_unchanged):
                notes.append(f"the files of {task!r} or of the base changed meanwhile; their statistics are not kept")
                continue
            try:
                write_squared_norms(path, key, norms)
            except InputError as error:
                notes.append(f"the statistics of {task!r} could not be kept: {error}")
    return notes

"""Which models a mergekit configuration merges, and which parameters are for which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusionlab.errors import InputError, did_you_mean, name_list

# what base_model is to a method: what task vectors start from (given, or not), one of the models that are merged, or
# nothing, for the method that stacks
Base = Literal["needed", "optional", "merged", "one of two", "none"]
Where = str | list[dict[str, Any]]
Scope = Mapping[str, Any]
STACK = "stack"


@dataclass(frozen=True)
class Slice:
    """Some blocks of the result, and what is given for them alone.

    Args:
        own: task -> the model's parameters.
        shared: those for all models.
        layers: the first of its blocks and the one after its last; None: all blocks.
        moved: the tasks whose blocks have other numbers here than in their models.
    """

    own: Mapping[str, Scope]
    shared: Scope
    layers: tuple[int, int] | None = None
    moved: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Inputs:
    """What is merged.

    Args:
        base: path or id of what fusion adds to, or the ranges of blocks that it is made of.
        models: the merged ones by task, in the same way.
        slices: with the parameters; one for all blocks where the configuration has none.
        shared: the parameters for all of them.
        has_base: whether the configuration names a base.
    """

    base: Where
    models: Mapping[str, Where]
    slices: tuple[Slice, ...]
    shared: Scope
    has_base: bool


@dataclass(frozen=True)
class _Source:
    """A model in a slice: all of it where ``layers`` is None."""

    model: str
    parameters: Scope
    layers: tuple[int, int] | None = None


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise if a key is none of the ``known``.

    Raises:
        InputError: so, with the nearest one.
    """
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(f"{unknown[0]!r} in {where} is not supported; {did_you_mean(str(unknown[0]), known)}")


def inputs_of(method: str, kind: Base, config: Mapping[str, Any]) -> Inputs:
    """The models of a configuration with ``models`` or ``slices``.

    Raises:
        InputError: both or none, a base that is missing, another number than the method takes, slices of several
            models or of unequal lengths, or a merged adapter in a path.
    """
    if bool(config.get("models")) == bool(config.get("slices")):
        raise InputError("models: expected a list of models, or slices with sources, and not both.")
    base, shared = config.get("base_model"), config.get("parameters") or {}
    if base is None and kind in ("needed", "one of two"):
        raise InputError(f"base_model is missing; {method} needs it.")
    rows = _rows(config)
    for sources, _ in rows:
        for source in sources:
            if "+" in Path(source.model).name:
                raise InputError(
                    f"model {source.model!r}: write adapters as models of their own: `finetuned` takes them as they "
                    "are."
                )
    if kind == "none":
        return _one_stack(method, rows, shared)
    rows = [(_ordered(method, kind, base, sources), parameters) for sources, parameters in rows]
    paths = [source.model for source in rows[0][0]]
    for number, (sources, _) in enumerate(rows):
        if [source.model for source in sources] != paths:
            raise InputError(
                f"slices: {method} merges the same models in every slice; the first has {name_list(paths)}, number "
                f"{number + 1} has {name_list(source.model for source in sources)}."
            )
    columns = [[sources[k] for sources, _ in rows] for k in range(len(paths))]
    own_base = base is not None and kind in ("needed", "optional")
    if own_base:
        base_column = next((column for column in columns if column[0].model == base), [_Source(str(base), {})])
        columns = [column for column in columns if column[0].model != base]
    models: dict[str, Where] = {}
    for column in columns:
        models[_task_name(column[0].model, models)] = _joined(column)
    slices = []
    for (_, parameters), layers, k in zip(rows, _places(rows), range(len(rows)), strict=True):
        sources = {task: column[k] for task, column in zip(models, columns, strict=True)}
        slices.append(_slice(sources, parameters, layers))
    start = _joined(base_column) if own_base else next(iter(models.values()))
    return Inputs(start, models, tuple(slices), shared, base is not None)


def _rows(config: Mapping[str, Any]) -> list[tuple[list[_Source], Scope]]:
    """The sources and the parameters of every slice."""
    if config.get("models"):
        for entry in config["models"]:
            refuse_unknown(entry, ("model", "parameters"), "an entry of models")
        return [([_Source(entry["model"], entry.get("parameters") or {}) for entry in config["models"]], {})]
    rows = []
    for number, entry in enumerate(config["slices"], start=1):
        refuse_unknown(entry, ("sources", "parameters"), f"slice {number}")
        sources = []
        for source in entry["sources"]:
            refuse_unknown(source, ("model", "layer_range", "parameters"), f"a source of slice {number}")
            sources.append(_Source(source["model"], source.get("parameters") or {}, tuple(source["layer_range"])))
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers is not None}
        if len(lengths) != 1 or min(lengths) < 1:
            raise InputError(
                f"slices: the sources of slice {number} have {sorted(lengths)} layers; give them the same."
            )
        rows.append((sources, entry.get("parameters") or {}))
    return rows


def _slice(sources: Mapping[str, _Source], parameters: Scope, place: tuple[int, int] | None) -> Slice:
    first = 0 if place is None else place[0]
    moved = (task for task, source in sources.items() if source.layers is not None and source.layers[0] != first)
    own = {task: source.parameters for task, source in sources.items()}
    return Slice(own, parameters, place, frozenset(moved))


def _places(rows: Sequence[tuple[list[_Source], Scope]]) -> list[tuple[int, int] | None]:
    """Which blocks of the result every slice is; None where there is one slice."""
    if len(rows) == 1:
        return [None]
    places: list[tuple[int, int] | None] = []
    start = 0
    for sources, _ in rows:
        first, end = sources[0].layers or (0, 0)
        places.append((start, start + end - first))
        start += end - first
    return places


def _ordered(method: str, kind: Base, base: str | None, sources: list[_Source]) -> list[_Source]:
    """The sources as the method takes them: the base first of two, or added where it is merged too."""
    of_all = all(source.layers is None for source in sources)
    paths = [source.model for source in sources]
    if len(set(paths)) < len(paths):
        raise InputError(f"{method}: the same model twice in one slice is not supported: {name_list(paths)}.")
    if base is not None and base not in paths and (kind != "optional" or not of_all):
        if not of_all:
            raise InputError(f"slices: {method} needs base_model {base!r} among the sources of every slice.")
        sources = [*sources, _Source(base, {})]
    if kind == "one of two":
        if len(sources) != 2:
            others = [path for path in paths if path != base]
            raise InputError(f"{method} is between base_model and one other model, got {name_list(others) or 'none'}.")
        return sorted(sources, key=lambda source: source.model != base)
    return sources


def _joined(column: Sequence[_Source]) -> Where:
    """A model by its path, or the ranges of its blocks."""
    if column[0].layers is None:
        return column[0].model
    return [{"model": source.model, "layers": list(source.layers or ())} for source in column]


def _one_stack(method: str, rows: Sequence[tuple[list[_Source], Scope]], shared: Scope) -> Inputs:
    for sources, _ in rows:
        if len(sources) != 1:
            raise InputError(f"{method} takes one source a slice, got {name_list(source.model for source in sources)}.")
    column = [sources[0] for sources, _ in rows]
    slices = [
        _slice({STACK: source}, parameters, layers)
        for source, (_, parameters), layers in zip(column, rows, _places(rows), strict=True)
    ]
    return Inputs(_joined(column), {STACK: _joined(column)}, tuple(slices), shared, has_base=False)


def _task_name(path: str, taken: Mapping[str, Any]) -> str:
    stem = Path(path.rstrip("/")).name or path
    name, k = stem, 2
    while name in taken:
        name, k = f"{stem}-{k}", k + 1
    return name

"""Which models a mergekit configuration merges, and which parameters are for which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusionlab.errors import InputError, did_you_mean, name_list

# what base_model is to a method: what task vectors start from (given, or not), or one of the models that are merged
Base = Literal["needed", "optional", "merged", "one of two"]


@dataclass(frozen=True)
class Inputs:
    """What is merged.

    Args:
        base: path or id of what fusion adds to.
        models: the merged ones by task.
        scopes: task -> its own parameters and those for all, in the order in which they count.
        shared: those for all.
        has_base: whether the configuration names a base.
    """

    base: str
    models: Mapping[str, str]
    scopes: Mapping[str, tuple[Mapping[str, Any], ...]]
    shared: tuple[Mapping[str, Any], ...]
    has_base: bool


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise if a key is none of the ``known``.

    Raises:
        InputError: so, with the nearest one.
    """
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(f"{unknown[0]!r} in {where} is not supported; {did_you_mean(str(unknown[0]), known)}")


def inputs_of(method: str, kind: Base, config: Mapping[str, Any]) -> Inputs:
    """The models of a configuration with ``models``.

    Raises:
        InputError: none, a base that is missing, another number than the method takes, or a merged adapter in a path.
    """
    listed = config.get("models") or []
    if not listed:
        raise InputError("models: expected a list of models.")
    base, shared = config.get("base_model"), (config.get("parameters") or {},)
    if base is None and kind in ("needed", "one of two"):
        raise InputError(f"base_model is missing; {method} needs it.")
    for entry in listed:
        refuse_unknown(entry, ("model", "parameters"), "an entry of models")
    own = [(entry["model"], entry.get("parameters") or {}) for entry in listed]
    if base is not None and kind in ("merged", "one of two") and base not in [path for path, _ in own]:
        own.append((base, {}))
    if kind == "one of two":
        own.sort(key=lambda pair: pair[0] != base)
        if len(own) != 2:
            others = [path for path, _ in own if path != base]
            raise InputError(f"{method} is between base_model and one other model, got {name_list(others) or 'none'}.")
    elif kind != "merged":
        own = [pair for pair in own if pair[0] != base]
    models, scopes = {}, {}
    for path, parameters in own:
        task = _task_name(path, models)
        models[task], scopes[task] = path, (parameters, *shared)
    start = own[0][0] if base is None or kind == "merged" else base
    for path in (start, *models.values()):
        if "+" in Path(path).name:
            raise InputError(
                f"model {path!r}: write adapters as models of their own: `finetuned` takes them as they are."
            )
    return Inputs(start, models, scopes, shared, base is not None)


def _task_name(path: str, taken: Mapping[str, str]) -> str:
    stem = Path(path.rstrip("/")).name or path
    name, k = stem, 2
    while name in taken:
        name, k = f"{stem}-{k}", k + 1
    return name

"""Whether an object keeps a contract, asked once, where it comes in."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TypeGuard

from fusionlab.contracts.defaults import DataDefaults, ModuleDefaults
from fusionlab.contracts.protocols import Backbone, Data, Headed, Module, Source, Tokenizing
from fusionlab.errors import InputError

_IN_SETUP = ("tasks", "splits")  # of data
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.+@-]*")


def as_module(given: object) -> Module:
    """``given`` as a module.

    Raises:
        InputError: it lacks members; the message names them.
    """
    if not _is_module(given):
        raise InputError(_told(given, Module, "module"))
    return given


def as_data(given: object, *, is_set_up: bool = True) -> Data:
    """``given`` as a data module.

    Args:
        given: any object.
        is_set_up: whether its ``setup`` has run, before which it need have neither tasks nor splits.

    Raises:
        InputError: it lacks members, which the message names, or as :func:`check_task_names`.
    """
    later = () if is_set_up else _IN_SETUP
    if not _is_data(given, later):
        raise InputError(_told(given, Data, "data", later))
    if is_set_up:
        check_task_names(given.tasks)
    return given


def check_task_names(names: Iterable[object]) -> None:
    """Raise unless each name can be a folder of a run, an adapter's name and part of a log key, and differs in more
    than case.

    Raises:
        InputError: naming the first that does not.
    """
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not _TASK.fullmatch(name):
            raise InputError(
                f"task name {name!r} must begin with a letter or digit and hold letters, digits, spaces and "
                f"_ . + @ - only: it becomes a folder name"
            )
        if name.casefold() in seen:
            raise InputError(f"task name {name!r} is used twice; give each task a name of its own")
        seen.add(name.casefold())


def as_tokenizing(given: object) -> Tokenizing:
    """``given`` as a backbone that reads texts.

    Raises:
        InputError: it has no tokenizer.
    """
    if not is_tokenizing(given):
        raise InputError(_told(given, Tokenizing, "text backbone"))
    return given


def is_source(given: object) -> TypeGuard[Source]:
    """Whether ``given`` holds fine-tuned weights of a base."""
    return not missing_members(given, Source)


def is_backbone(given: object) -> TypeGuard[Backbone]:
    """Whether ``given`` is a network with what is known of it."""
    return not missing_members(given, Backbone)


def is_tokenizing(given: object) -> TypeGuard[Tokenizing]:
    """Whether ``given`` is a backbone that reads texts."""
    return not missing_members(given, Tokenizing)


def has_heads(given: object) -> TypeGuard[Headed]:
    """Whether ``given`` scores images by frozen heads."""
    return not missing_members(given, Headed)


def missing_members(given: object, contract: type) -> list[str]:
    """The members of a contract that ``given`` lacks.

    Asked by name: parts and parameters of torch's modules are no attributes that ``isinstance`` would find. Nothing is
    computed, since a property may need a trainer; what ``dir`` does not list may still be handed on by ``__getattr__``.
    """
    parts = [part for part in reversed(contract.__mro__) if part.__module__ == contract.__module__]
    names = dict.fromkeys(name for part in parts for name in (*part.__annotations__, *vars(part)) if name[0] != "_")
    listed = set(dir(given))
    return [name for name in names if name not in listed and not hasattr(given, name)]


def _is_module(given: object) -> TypeGuard[Module]:
    return not missing_members(given, Module)


def _is_data(given: object, later: Collection[str]) -> TypeGuard[Data]:
    return set(missing_members(given, Data)) <= set(later)


def _told(given: object, contract: type, kind: str, later: Collection[str] = ()) -> str:
    missing = [name for name in missing_members(given, contract) if name not in later]
    defaults = {"module": ModuleDefaults, "data": DataDefaults}.get(kind)
    inherited = [name for name in missing if hasattr(defaults, name)]
    own = [name for name in missing if name not in inherited]
    parts = [f"members {', '.join(own)} that fusionlab's {kind} contract asks for" if own else ""]
    if inherited and defaults is not None:
        parts.append(f"{', '.join(inherited)}, which fusionlab.contracts.{defaults.__name__} gives to who inherits it")
    return (
        f"{type(given).__name__} lacks {'; and '.join(filter(None, parts))}; see "
        f"fusionlab.contracts.{contract.__name__}"
    )

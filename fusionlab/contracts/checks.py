"""Whether an object keeps a contract, asked once, where it comes in."""

from __future__ import annotations

from typing import TypeGuard

from fusionlab.contracts.defaults import DataDefaults, ModuleDefaults
from fusionlab.contracts.protocols import Backbone, Data, Headed, Module, Source, Tokenizing
from fusionlab.errors import InputError


def as_module(given: object) -> Module:
    """``given`` as a module.

    Raises:
        InputError: it lacks members; the message names them.
    """
    if not _is_module(given):
        raise InputError(_told(given, Module, "module"))
    return given


def as_data(given: object) -> Data:
    """``given`` as a data module.

    Raises:
        InputError: it lacks members; the message names them.
    """
    if not _is_data(given):
        raise InputError(_told(given, Data, "data"))
    return given


def as_tokenizing(given: object) -> Tokenizing:
    """``given`` as a backbone that reads texts.

    Raises:
        InputError: it has no tokenizer.
    """
    if not _is_tokenizing(given):
        raise InputError(_told(given, Tokenizing, "text backbone"))
    return given


def is_source(given: object) -> TypeGuard[Source]:
    """Whether ``given`` holds fine-tuned weights of a base."""
    return not missing_members(given, Source)


def is_backbone(given: object) -> TypeGuard[Backbone]:
    """Whether ``given`` is a network with what is known of it."""
    return not missing_members(given, Backbone)


def has_heads(given: object) -> TypeGuard[Headed]:
    """Whether ``given`` scores images by frozen heads."""
    return not missing_members(given, Headed)


def missing_members(given: object, contract: type) -> list[str]:
    """The members of a contract that ``given`` lacks.

    Asked by name: parts and parameters of torch's modules are no attributes that ``isinstance`` would find.
    """
    parts = [part for part in reversed(contract.__mro__) if part.__module__ == contract.__module__]
    names = dict.fromkeys(name for part in parts for name in (*part.__annotations__, *vars(part)) if name[0] != "_")
    return [name for name in names if not hasattr(given, name)]


def _is_module(given: object) -> TypeGuard[Module]:
    return not missing_members(given, Module)


def _is_data(given: object) -> TypeGuard[Data]:
    return not missing_members(given, Data)


def _is_tokenizing(given: object) -> TypeGuard[Tokenizing]:
    return not missing_members(given, Tokenizing)


def _told(given: object, contract: type, kind: str) -> str:
    missing = missing_members(given, contract)
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

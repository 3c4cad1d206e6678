"""Keys that are empty (``batch_size:`` and nothing behind it) where a value is needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

import jsonargparse

from fusionlab.errors import InputError


def refuse_empty(
    parser: jsonargparse.ArgumentParser, given: Mapping[str, Any] | jsonargparse.Namespace, where: str = ""
) -> None:
    """Raise for a key that is empty (null) where it needs a value; jsonargparse takes it for one that is not given.

    Args:
        parser: of the command, or of the arguments of a class.
        given: what was parsed, by key, those of a group in a mapping of their own.
        where: what the keys are named after, such as ``model.``.

    Raises:
        InputError: the key, what it expects, and its default.
    """
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        group, _, name = action.dest.rpartition(".")
        holder = given.get(group, {}) if group else given
        if group in parser.groups and holder is None:
            raise InputError(f"{where}{group}: expected keys, got null; leave it out")
        if not isinstance(holder, (Mapping, jsonargparse.Namespace)):
            continue
        takes_null = action.default is None or kind is None or kind is Any or NoneType in get_args(kind)
        if name in holder and holder[name] is None and not takes_null:
            expected = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
            raise InputError(
                f"{where}{action.dest}: expected {expected.replace('typing.', '')}, got null; give a value, or "
                f"leave the key out for its default, {action.default!r}"
            )

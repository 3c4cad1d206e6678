"""The arguments of a module and its data, checked as ``fit`` checks them, for commands that make these themselves."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from typing import Any

import jsonargparse

from fusionlab.commands.empty import refuse_empty
from fusionlab.commands.messages import readable
from fusionlab.commands.trainer import trainer_built
from fusionlab.errors import InputError
from fusionlab.search.workbench import class_given, known_arguments, parser_of, trainer_of


def check_arguments(config: Mapping[str, Any]) -> None:
    """Raise for an unknown, empty or wrong argument of the module or the data, or a device that is not there.

    Args:
        config: ``model`` and ``data``, each with ``class_path`` and ``init_args``, and ``trainer``.

    Raises:
        InputError: the key, what it expects, and what it got.
    """
    for key in ("model", "data"):
        given = config.get(key, {})
        if not isinstance(given, Mapping):
            raise InputError(f"{key}: expected class_path and init_args, got {given!r}")
        owner = class_given(key, given)
        arguments = known_arguments(key, owner, given)
        parser, _ = parser_of(owner)
        try:
            parser.parse_object(arguments)
        except ArgumentError as error:
            raise InputError(f"{key}.{readable(str(error), (), 'fit')}") from error
        refuse_empty(parser, arguments, f"{key}.")
    trainer = config.get("trainer") or {}
    if not isinstance(trainer, Mapping):
        raise InputError(f"trainer: expected keys, got {trainer!r}; give some, or leave it out")
    with trainer_built(jsonargparse.Namespace(devices=1, accelerator=trainer.get("accelerator"))):
        trainer_of(config)


def refuse_empty_arguments(config: jsonargparse.Namespace) -> None:
    """Raise for an empty argument of the module or the data, whose types are checked already.

    Raises:
        InputError: the key, what it expects, and its default.
    """
    for key in ("model", "data"):
        parser, _ = parser_of(class_given(key, config[key]))
        refuse_empty(parser, config[key].get("init_args") or {}, f"{key}.")

"""The arguments of a module and its data, checked as ``fit`` checks them, for commands that make these themselves."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule

from fusionlab.commands.empty import refuse_empty
from fusionlab.commands.messages import readable
from fusionlab.commands.parser import config_files, given_flags
from fusionlab.commands.trainer import trainer_built
from fusionlab.data import ImageTasks
from fusionlab.data.base import TaskData
from fusionlab.errors import InputError
from fusionlab.foreign import parse_yaml
from fusionlab.modules import ClipModule, FusionModule
from fusionlab.search.workbench import class_given, known_arguments, parser_of, trainer_of

_KINDS = {"model": (LightningModule, FusionModule), "data": (LightningDataModule, TaskData)}
DEFAULT_CLASSES = {"model": ClipModule.__name__, "data": ImageTasks.__name__}


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


def default_classes(argv: Sequence[str]) -> dict[str, Any]:
    """The classes that ``fit`` has by default: one of another package that is given, whose own defaults count, or ours.

    The parser hands a class the defaults of the one before it, for arguments of the same name.

    Args:
        argv: the command's name and arguments.
    """
    found: dict[str, Any] = dict(DEFAULT_CLASSES)
    given, files = given_flags(argv), config_files(argv)
    for part in found:
        named: list[Any] = [content.get(part) for content in files]
        named += [*given.get(part, ()), *given.get(f"{part}.class_path", ())]
        for each in named:
            with suppress(InputError):  # what is no class is told of by the parser
                value = parse_yaml(each, part) if isinstance(each, str) and each.lstrip().startswith("{") else each
                path = value.get("class_path") if isinstance(value, Mapping) else value
                if isinstance(path, str) and "." in path and not Path(path).is_file():
                    owner, (kind, ours) = class_given(part, {"class_path": path}), _KINDS[part]
                    is_foreign = issubclass(owner, kind) and not issubclass(owner, ours)
                    found[part] = {"class_path": path, "init_args": {}} if is_foreign else DEFAULT_CLASSES[part]
    return found


def refuse_empty_arguments(config: jsonargparse.Namespace) -> None:
    """Raise for an empty argument of the module or the data, whose types are checked already.

    Raises:
        InputError: the key, what it expects, and its default.
    """
    for key in ("model", "data"):
        parser, _ = parser_of(class_given(key, config[key]))
        refuse_empty(parser, config[key].get("init_args") or {}, f"{key}.")

"""Parsers for the commands that are no LightningCLI: a dataclass is the flags, its docstring the help."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import jsonargparse

from fusionlab.errors import InputError, did_you_mean
from fusionlab.files import path_of
from fusionlab.foreign import as_json, read_yaml

_T = TypeVar("_T")


def parse(recipe_class: type[_T], argv: Sequence[str], command: str, switches: dict[str, str]) -> _T:
    """The recipe that a command line asks for; flags override ``--config FILE``.

    Args:
        recipe_class: a dataclass with a Google docstring.
        argv: the command's arguments.
        command: its name.
        switches: flags without a value, with their help.

    Raises:
        InputError: an unknown key or flag, a value of the wrong type, a required one missing, or no such file.
    """
    parser = build_parser(recipe_class, command, switches)
    flags = [action.option_strings[-1] for action in parser._actions if action.option_strings]
    try:
        values: dict[str, Any] = parser.parse_args(_with_files(argv, recipe_class)).as_dict()
    except ArgumentError as error:
        raise InputError(_readable(str(error), flags)) from error
    values.pop("config")
    return recipe_class(**values)


def build_parser(recipe_class: type, command: str, switches: dict[str, str]) -> jsonargparse.ArgumentParser:
    """The parser of a command."""
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m fusionlab {command}",
        description=str(recipe_class.__doc__).partition("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file with the arguments below as keys")
    parser.add_class_arguments(recipe_class, as_group=False, skip=set(switches))
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser


def _with_files(argv: Sequence[str], recipe_class: type) -> list[str]:
    """``argv`` with the checked content of every ``--config`` file in the place of its path."""
    found, is_path = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if is_path:
            argument = as_json(_read(argument, recipe_class), repr(argument))
        elif flag == "--config" and equals:
            argument = f"--config={as_json(_read(value, recipe_class), repr(value))}"
        is_path = argument == "--config"
        found.append(argument)
    return found


def _read(path: str, recipe_class: type) -> dict[str, Any]:
    file = path_of(path)
    if not file.exists():
        raise InputError(f"--config: {path!r} does not exist; give a YAML file")
    content = read_yaml(file)
    known = [item.name for item in fields(recipe_class)]
    for key in content:
        if key not in known:
            raise InputError(f"{path!r}: unknown key {key!r}; {did_you_mean(str(key), known)}")
    return content


def _readable(message: str, flags: list[str]) -> str:
    """jsonargparse's message in one line."""
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        name = unknown[1].partition("=")[0]
        return f"unknown argument {name!r}; {did_you_mean(name, flags)}"
    if "required" in message:
        keys = re.findall(r'(?:Key|required: ?|key) "?([\w.]+)"?', message)
        return f"missing: {', '.join(keys) or message}. Give it as a flag, or as a key of a file with --config."
    wrong = re.match(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if wrong:
        value = re.search(r"(?:Got value|Given value): (.*?)$", message, re.MULTILINE)
        kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.(\w+\[.+?\])(?=\.|\s|$))", message)
        names = ", ".join(dict.fromkeys(first or second for first, second in kinds))
        return f"{wrong[1]}: expected {names or 'another value'}, got {value[1].strip() if value else '?'}"
    return " ".join(message.split())

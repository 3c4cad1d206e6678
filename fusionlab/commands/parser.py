"""Parsers for the commands that are no LightningCLI: a dataclass is the flags, its docstring the help."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import jsonargparse
import yaml

from fusionlab.errors import InputError, did_you_mean
from fusionlab.files import path_of
from fusionlab.foreign import as_json, check_keys, parse_yaml, read_yaml

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
    argv = checked_flags(argv, [item.name for item in fields(recipe_class) if "dict[" in str(item.type)])
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


def checked_flags(argv: Sequence[str], mappings: Sequence[str]) -> list[str]:
    """``argv`` with the files in front, so that every flag overrides them.

    Args:
        argv: a command's arguments.
        mappings: the options that are mappings, whose entries have flags of their own (``--finetuned.TASK PATH``).

    Raises:
        InputError: a list, a mapping or an entry of one is given by two flags, of which the first would be dropped.
    """
    refuse_repeated_keys()
    given = given_flags(argv)
    for flag, values in given.items():
        is_entry = any(flag.startswith(f"{name}.") for name in mappings)
        if len(values) > 1 and (is_entry or any(value.lstrip()[:1] in ("[", "{") for value in values)):
            raise InputError(f"--{flag} is given {len(values)} times: {', '.join(values)}; only one counts, keep it")
    for name in mappings:
        entries = [flag.removeprefix(f"{name}.") for flag in given if flag.startswith(f"{name}.")]
        for whole in given.get(name, []) if entries else []:
            content = parse_yaml(whole, f"--{name} {whole}")
            twice = [entry for entry in entries if isinstance(content, dict) and entry in map(str, content)]
            is_last = list(given).index(name) > list(given).index(f"{name}.{entries[0]}")
            if twice or is_last:
                lost = ", ".join(twice or entries)
                raise InputError(f"--{name} {whole} and --{name}.{lost}: only one of them would count; keep one")
    return _files_first(argv)


def given_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag that sets something, by its name; a class's arguments without ``init_args``."""
    given: dict[str, list[str]] = {}
    for flag, value in _flags(argv):
        given.setdefault(flag, []).append(value)
    return given


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each flag that sets something; appending (``--NAME+=VALUE``) and files are left out."""
    for position, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag.endswith("+") or flag == "--config":
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        yield (
            flag.removeprefix("--").replace(".init_args.", "."),
            value if equals or following.startswith("--") else following,
        )


def _files_first(argv: Sequence[str]) -> list[str]:
    files: list[str] = []
    rest: list[str] = []
    for argument in argv:
        is_path = bool(files) and files[-1] == "--config"
        (files if is_path or argument.partition("=")[0] == "--config" else rest).append(argument)
    return [*files, *rest]


def refuse_repeated_keys() -> None:
    """From now on a key given twice in one mapping, in a file or a flag, is an error and not the last one's value."""
    plain = jsonargparse.get_loader("yaml")
    if getattr(plain, "checks_keys", False):
        return

    def load(stream: str) -> Any:
        check_keys(stream, "what is given")
        return plain(stream)

    load.checks_keys = True  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", load, exceptions=(yaml.YAMLError,))


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

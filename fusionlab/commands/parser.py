"""Parsers for the commands that are no LightningCLI: a dataclass is the flags, its docstring the help."""

from __future__ import annotations

import json
import os
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from fusionlab.commands.bounds import RULES, check_finite
from fusionlab.commands.empty import refuse_empty
from fusionlab.commands.messages import readable
from fusionlab.errors import InputError, did_you_mean
from fusionlab.files import path_of
from fusionlab.foreign import as_json, check_keys, parse_yaml, read_yaml

_T = TypeVar("_T")


def parse(recipe_class: type[_T], argv: Sequence[str], command: str, switches: dict[str, str]) -> _T:
    """The recipe that a command line asks for; see :func:`values`."""
    return recipe_class(**values(recipe_class, argv, command, switches))


def values(
    recipe_class: type,
    argv: Sequence[str],
    command: str,
    switches: dict[str, str],
    read: Callable[[str], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The values of a recipe that a command line asks for; flags override ``--config FILE``.

    Args:
        recipe_class: a dataclass with a Google docstring.
        argv: the command's arguments.
        command: its name.
        switches: flags without a value, with their help.
        read: what reads a file into the recipe's keys; by default as YAML.

    Raises:
        InputError: an unknown key or flag, a value of the wrong type, a required one missing, or no such file.
    """
    parser = build_parser(recipe_class, command, switches)
    argv = checked_flags(argv, [item.name for item in fields(recipe_class) if "dict[" in str(item.type)])
    read = read or (lambda path: read_recipe(recipe_class, path))
    return _parsed(parser, command, lambda: parser.parse_args(_with_files(argv, read)))


def recipe_of(
    recipe_class: type[_T],
    given: _T | Mapping[str, Any] | str | Path,
    command: str,
    read: Callable[[str], dict[str, Any]] | None = None,
) -> _T:
    """The recipe that Python gives: one, its keys, or the path of a YAML file with them.

    Args:
        recipe_class: a dataclass with a Google docstring.
        given: any of them.
        command: name of the command whose recipe it is.
        read: what reads a file into the recipe's keys; by default as YAML.

    Raises:
        InputError: as :func:`values`.
    """
    if isinstance(given, recipe_class):
        return given
    if isinstance(given, Mapping):
        from fusionlab.rules.config import plain

        content = read_recipe(recipe_class, "recipe", plain(given))
    else:
        content = (read or (lambda path: read_recipe(recipe_class, path)))(str(given))
    parser = build_parser(recipe_class, command, {})
    return recipe_class(**_parsed(parser, command, lambda: parser.parse_object(content)))


def _parsed(
    parser: jsonargparse.ArgumentParser, command: str, parse: Callable[[], jsonargparse.Namespace]
) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse().as_dict()
    except ArgumentError as error:
        raise InputError(readable(str(error), flag_names(parser), command)) from error
    found.pop("config")
    refuse_empty(parser, found)
    return found


def flag_names(parser: jsonargparse.ArgumentParser) -> list[str]:
    """The names of a parser's flags, without dashes."""
    flags = (flag for action in parser._actions for flag in action.option_strings)
    return [flag.removeprefix("--") for flag in flags if flag.startswith("--") and not flag.endswith("+")]


def build_parser(recipe_class: type, command: str, switches: dict[str, str]) -> jsonargparse.ArgumentParser:
    """The parser of a command, whose help is the recipe's documentation."""
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m fusionlab {command}",
        description=str(recipe_class.__doc__).partition("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    also = ", or a mergekit configuration" if command == "fuse" else ""
    parser.add_argument("--config", action="config", help=f"a YAML file with the arguments below as keys{also}")
    parser.add_class_arguments(recipe_class, as_group=False, skip=set(switches))
    add_switches(parser, switches)
    return parser


def add_switches(parser: jsonargparse.ArgumentParser, switches: Mapping[str, str]) -> None:
    """Add flags that are off by default: ``--NAME`` turns one on, and so does ``--NAME true``, as in a file.

    Args:
        parser: of a command.
        switches: what each does, by name.
    """
    for name, text in switches.items():
        parser.add_argument(f"--{name}", type=bool, nargs="?", const=True, default=False, help=text)


def read_recipe(recipe_class: type, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys of a recipe out of a YAML file.

    Args:
        recipe_class: the recipe.
        path: of the file.
        content: of the file, where it was read already.

    Raises:
        InputError: no such file, no YAML mapping, a key that is not known, or a number that is none.
    """
    content = read_file(path) if content is None else content
    known = [item.name for item in fields(recipe_class)]
    for key in content:
        if key not in known:
            raise InputError(f"{path!r}: unknown key {key!r}; {did_you_mean(str(key), known)}")
        if key not in RULES:
            check_finite(content[key], key)
    return content


def read_file(path: str) -> dict[str, Any]:
    """A YAML file as it is.

    Raises:
        InputError: no such file, or no YAML mapping.
    """
    file = path_of(path)
    if not file.exists():
        raise InputError(f"--config: {path!r} does not exist; give a YAML file")
    return read_yaml(file)


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


def with_flag(argv: Sequence[str], name: str, *, several: bool = False, switches: Collection[str] = ()) -> list[str]:
    """``argv`` with the arguments that belong to no flag given by the flag ``name``.

    Args:
        argv: a command's arguments.
        name: of the flag.
        several: whether it takes a list.
        switches: names of the flags that need no value.

    Raises:
        InputError: there are several, and the flag takes one.

    Example:
        >>> with_flag(["a", "b", "--output", "out"], "runs", several=True)
        ['--output', 'out', '--runs', '["a", "b"]']
        >>> with_flag(["--dry_run", "a"], "folder", switches=["dry_run"])
        ['--dry_run', '--folder', 'a']
    """
    found: list[str] = []
    rest: list[str] = []
    flag = ""  # that may take what comes next
    for argument in argv:
        is_value = flag and (flag not in switches or argument in ("true", "false"))
        if is_value or argument.startswith("-"):
            opens = not is_value and argument.startswith("--") and "=" not in argument and argument != "--help"
            flag = argument.removeprefix("--") if opens else ""
            rest.append(argument)
        else:
            flag = ""
            found.append(argument)
    if not several and len(found) > 1:
        raise InputError(f"expected one {name}, got {len(found)}: {', '.join(found)}")
    value = [json.dumps(found) if several else found[0]] if found else []
    return [*rest, f"--{name}", *value] if found else rest


def config_files(argv: Sequence[str]) -> list[dict[str, Any]]:
    """What the files of a command line hold: ``--config``, and those for a part of it, such as ``--trainer FILE``.

    One that is not there is told of by who parses them.

    Raises:
        InputError: one is no YAML mapping.
    """
    whole = [argument.partition("=")[2] for argument in argv if argument.startswith("--config=")]
    whole += [value for flag, value in pairwise(argv) if flag == "--config"]
    found = [read_file(path) for path in whole if os.path.exists(os.path.expanduser(path))]
    given = given_flags(argv)
    for part in ("trainer", "model", "data", "fusion"):
        files = [path for path in given.get(part, ()) if os.path.isfile(os.path.expanduser(path))]
        found += [{part: read_file(path)} for path in files]
    return found


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


def _with_files(argv: Sequence[str], read: Callable[[str], dict[str, Any]]) -> list[str]:
    """``argv`` with the checked content of every ``--config`` file in the place of its path."""
    found, is_path = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if is_path:
            argument = as_json(read(argument), repr(argument))
        elif flag == "--config" and equals:
            argument = f"--config={as_json(read(value), repr(value))}"
        is_path = argument == "--config"
        found.append(argument)
    return found

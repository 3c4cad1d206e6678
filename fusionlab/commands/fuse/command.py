"""The command line: flags and recipe into a :class:`Recipe`, then plan, progress and result on the terminal."""

from __future__ import annotations

import re
from argparse import ArgumentError
from typing import Any

import jsonargparse

from fusionlab.commands.fuse.recipe import Recipe, read_recipe
from fusionlab.commands.parser import checked_flags
from fusionlab.errors import InputError, did_you_mean
from fusionlab.foreign import as_json, parse_yaml

_NESTED = ("rule", "model", "data")
_SWITCHES = {
    "hash": "know the inputs by a hash over all of their content: in fusion.json, and for norms kept beside them",
    "allow_other_base": "fuse adapters that were made for another base all the same; fusion.json says so",
    "dry_run": "check everything from the headers, print the plan and stop",
}


def main(argv: list[str]) -> int:
    """Fuse as the flags and the recipe say; returns 0.

    Raises:
        InputError: what the user can fix; nothing was written then.
    """
    recipe = parse(argv)
    from fusionlab.commands.fuse.offline import fuse_folder, prepare
    from fusionlab.commands.fuse.progress import progress_bar
    from fusionlab.commands.fuse.report import plan_text
    from fusionlab.commands.fuse.searching import look, search_of, with_rule_found

    search = search_of(recipe)
    if recipe.dry_run:
        looking = None if search is None else look(recipe, search)
        print(plan_text(prepare(recipe) if looking is None else looking.prepared))
        if looking is not None:
            print(looking.describe())
        return 0
    prepared = prepare(recipe) if search is None else with_rule_found(recipe, search)
    if prepared.forecast is not None:
        print(f"forecast: {prepared.forecast}", flush=True)
    with progress_bar(prepared.bytes_to_read) as advance:
        summary = fuse_folder(prepared, advance)
    print(summary)
    return 0


def parse(argv: list[str]) -> Recipe:
    """The recipe that the command line asks for; flags override the file.

    Raises:
        InputError: an unknown key or flag, a value of the wrong type, or a required one that is missing.
    """
    arguments, rest = _split_arguments(checked_flags(argv, ["finetuned"]))
    try:
        values: dict[str, Any] = build_parser().parse_args(_with_recipes(rest)).as_dict()
    except ArgumentError as error:
        raise InputError(_readable(str(error))) from error
    values.pop("config")
    for key, own in arguments.items():
        given = values[key] if isinstance(values[key], dict) else {"class_path": values[key]}
        if own and given["class_path"] is None:
            raise InputError(f"--{key}.{next(iter(own))}: give --{key} too, the class that has it.")
        values[key] = given | {"init_args": (given.get("init_args") or {}) | own}
    return Recipe(**values)


def _split_arguments(argv: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Arguments of rule, model and data, as ``--rule.NAME VALUE`` or ``--rule.init_args.NAME VALUE``; and the rest."""
    found: dict[str, dict[str, Any]] = {}
    rest, pending = [], ("", "")
    for argument in argv:
        flag, equals, value = argument.partition("=")
        key, _, name = flag.removeprefix("--").partition(".")
        name = name.removeprefix("init_args.")
        if all(pending):
            key, name = pending
            found.setdefault(key, {})[name] = parse_yaml(argument, f"--{key}.{name}: {argument!r}")
            pending = ("", "")
        elif key not in _NESTED or not flag.startswith("--") or name in ("", "class_path", "init_args"):
            rest.append(argument)
        elif equals:
            found.setdefault(key, {})[name] = parse_yaml(value, f"--{key}.{name}: {value!r}")
        else:
            pending = key, name
    if all(pending):
        raise InputError(f"--{'.'.join(pending)}: expected a value.")
    return found, rest


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser, whose help is the recipe's documentation."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fusionlab fuse",
        description=str(Recipe.__doc__).partition("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a recipe in YAML, or a mergekit configuration")
    parser.add_class_arguments(Recipe, as_group=False, skip=set(_SWITCHES))
    for name, text in _SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser


def _with_recipes(argv: list[str]) -> list[str]:
    """``argv`` with the checked content of every recipe in the place of its path."""
    found, is_path = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if is_path:
            argument = as_json(read_recipe(argument), repr(argument))
        elif flag == "--config" and equals:
            argument = f"--config={as_json(read_recipe(value), repr(value))}"
        is_path = argument == "--config"
        found.append(argument)
    return found


def _readable(message: str) -> str:
    """jsonargparse's message in one line, with the nearest flag for one that is not known."""
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        flags = [action.option_strings[-1] for action in build_parser()._actions if action.option_strings]
        name = unknown[1].partition("=")[0]
        return f"unknown argument {name!r}; {did_you_mean(name, flags)}"
    required = re.match(r"the following arguments are required: (.+)", message)
    if required:
        return f"missing: {required[1]}. Give them as flags (--finetuned.TASK PATH), or a recipe with --config."
    wrong = re.match(r'Parser key "([\w.]+)":', message)
    value = re.search(r"(?:Got value|Given value): (.*)$", message, re.DOTALL)
    if wrong and value:
        expected = re.findall(r"Expected a (?:<class ')?(?:typing\.)?([\w\[\]', ]+?)(?:'>)?(?:\.|\n|$)", message)
        kinds = " or ".join(dict.fromkeys(kind for kind in expected if kind != "NoneType"))
        return f"{wrong[1]}: expected {kinds or 'another value'}, got {value[1].strip()}."
    return " ".join(message.split())

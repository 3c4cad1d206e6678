"""The command line: flags and recipe into a :class:`Recipe`, then plan, progress and result on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionlab.commands import parser
from fusionlab.commands.fuse.recipe import Recipe, read_recipe
from fusionlab.errors import InputError
from fusionlab.foreign import parse_yaml

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
    fuse_checkpoints(parse(argv), verbose=True)
    return 0


def fuse_checkpoints(recipe: Recipe | Mapping[str, Any] | str | Path, *, verbose: bool = False) -> Path:
    """Fuse checkpoints or adapters on disk, of any size, into one model on disk, as the command ``fuse`` does.

    Args:
        recipe: what to fuse, how and where to: a :class:`~fusionlab.commands.fuse.recipe.Recipe`, its keys, or the path
            of a YAML file with them or of a mergekit configuration.
        verbose: print the forecast and the result, and show a progress bar on a terminal.

    Returns:
        the folder that was written; where the recipe says ``dry_run``, that would be, and the plan is printed.

    Raises:
        InputError: an unknown key, a value of another type, or what cannot be fused; nothing was written then.
    """
    recipe = parser.recipe_of(Recipe, recipe, "fuse", read_recipe)
    from fusionlab.commands.fuse.offline import fuse_folder, prepare
    from fusionlab.commands.fuse.progress import progress_bar
    from fusionlab.commands.fuse.report import plan_text
    from fusionlab.commands.fuse.searching import look, search_of, with_rule_found

    search = search_of(recipe)
    if recipe.dry_run:
        looking = None if search is None else look(recipe, search)
        prepared = prepare(recipe) if looking is None else looking.prepared
        print(plan_text(prepared))
        if looking is not None:
            print(looking.describe())
        return prepared.output
    prepared = prepare(recipe) if search is None else with_rule_found(recipe, search)
    if not verbose:
        fuse_folder(prepared)
        return prepared.output
    if prepared.forecast is not None:
        print(f"forecast: {prepared.forecast}", flush=True)
    with progress_bar(prepared.bytes_to_read) as advance:
        summary = fuse_folder(prepared, advance)
    print(summary)
    return prepared.output


def parse(argv: list[str]) -> Recipe:
    """The recipe that the command line asks for; flags override the file.

    Raises:
        InputError: an unknown key or flag, a value of the wrong type, or a required one that is missing.
    """
    arguments, rest = _split_arguments(parser.checked_flags(argv, ["finetuned"]))
    values = parser.values(Recipe, rest, "fuse", _SWITCHES, read_recipe)
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

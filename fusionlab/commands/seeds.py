"""One seed for everything: what it may be, and seeds of the model or the data, which it would override."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusionlab.errors import InputError
from fusionlab.foreign import parse_yaml

_LARGEST = 2**32 - 1  # that numpy takes


def check_seed(name: str, seed: Any) -> None:
    """Raise unless every library takes the seed.

    Raises:
        InputError: it is no whole number, or out of bounds.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"{name} must be a number, so that the run can be repeated, got {seed!r}")
    if not 0 <= seed <= _LARGEST:
        raise InputError(f"{name} must lie in 0..{_LARGEST}, got {seed}")


def check_one_seed(seed: Any, given: Mapping[str, Sequence[str]], files: Sequence[Mapping[str, Any]]) -> None:
    """Raise if the model or the data was given a seed of its own, which ``seed_everything`` would override.

    Args:
        seed: ``seed_everything``.
        given: the values of each flag on the command line, by its name.
        files: what the files that were given hold; in each a seed may stand that is the file's ``seed_everything``.

    Raises:
        InputError: ``seed_everything`` cannot be a seed, or another one differs from it.
    """
    check_seed("seed_everything", seed)
    for part in ("model", "data"):
        for value in given.get(f"{part}.seed", ()):
            _refuse_other(part, value, seed)
        for key in (part, f"{part}.init_args"):
            for value in given.get(key, ()):
                if value.lstrip().startswith("{"):
                    _refuse_other(part, seed_in({part: parse_yaml(value, f"--{key} {value}")}, part), seed)
    for content in files:
        check_one_seed_in(content, "seed_everything", seed)


def check_one_seed_in(content: Mapping[str, Any], name: str, default: int) -> None:
    """Raise if a configuration gives the model or the data another seed than its ``seed_everything``.

    Args:
        content: of the file.
        name: what is to be given instead.
        default: the seed where the file has none.

    Raises:
        InputError: naming the seed.
    """
    for part in ("model", "data"):
        _refuse_other(part, seed_in(content, part), content.get("seed_everything", default), name)


def seed_in(content: Mapping[str, Any], part: str) -> Any:
    """The seed that a configuration gives its model or its data; None where it gives none."""
    arguments = content.get(part)
    if isinstance(arguments, Mapping) and isinstance(inner := arguments.get("init_args"), Mapping):
        arguments = {**arguments, **inner}
    return arguments.get("seed") if isinstance(arguments, Mapping) else None


def one_seed(content: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The keys that give a configuration another seed, wherever it has one."""
    parts = [part for part in ("model", "data") if seed_in(content, part) is not None]
    return {"seed_everything": seed, **{part: {"init_args": {"seed": seed}} for part in parts}}


def _refuse_other(part: str, own: Any, seed: Any, name: str = "seed_everything") -> None:
    if own is not None and str(own) != str(seed):
        raise InputError(f"{part}.seed {own} does nothing beside seed_everything {seed}, which is for all; give {name}")

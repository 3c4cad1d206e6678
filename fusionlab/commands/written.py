"""What Python gives a recipe, in the form in which a file would have it."""

from __future__ import annotations


def as_written(recipe: object) -> None:
    """Replace the fields of a frozen recipe that no file could hold: paths, tuples, numbers of numpy, dtypes, rules."""
    from fusionlab.rules.config import plain

    for name, value in vars(recipe).items():
        object.__setattr__(recipe, name, plain(value))

"""The one exception that means "the user can fix this" (exit code 2), and the wording its messages share. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message says what was expected, what came, which names, and what to do. Maps to exit code 2."""


def name_list(names: Iterable[str], limit: int = 5) -> str:
    """The first ``limit`` names and how many there are in all.

    Example:
        >>> name_list(["a", "b", "c"], limit=2)
        'a, b and 1 more (3 in all)'
    """
    names = list(names)
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more ({len(names)} in all)"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names what ``name`` was probably meant to be, or all that is known.

    Example:
        >>> did_you_mean("mnsit", ["mnist", "cifar10"])
        "did you mean 'mnist'?"
        >>> did_you_mean("x", ["mnist", "cifar10"])
        'known: mnist, cifar10'
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not known:
        return "there is none"
    return f"did you mean {near[0]!r}?" if near else f"known: {name_list(known, limit=40)}"

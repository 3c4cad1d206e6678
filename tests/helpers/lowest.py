"""The lower bounds that ``pyproject.toml`` states, for ``make test-lowest``.

``python tests/helpers/lowest.py bounds`` prints each as ``name==version``, for an installer to be held to them;
``installed`` prints the versions that are installed here instead.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "fixtures" / "lowest.txt"
_BOUND = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)")


def bounds() -> dict[str, str]:
    """Stated lower bound by package, of what is required, of every extra, and of what builds the package.

    Raises:
        ValueError: a requirement without a bound, or two bounds of one package.
    """
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, found = stated["project"], dict[str, str]()
    of_extras = project["optional-dependencies"].values()
    for requirement in chain(stated["build-system"]["requires"], project["dependencies"], *of_extras):
        if requirement.startswith(f"{project['name']}["):
            continue
        bound = _BOUND.fullmatch(requirement)
        if bound is None or found.setdefault(bound[1], bound[2]) != bound[2]:
            raise ValueError(f"{requirement!r}: expected NAME>=VERSION, and one version for each name")
    return dict(sorted(found.items()))


def recorded() -> dict[str, str]:
    """The versions with which the suite last passed."""
    return dict(line.split("==") for line in RECORD.read_text().splitlines())


def plain(release: str) -> str:
    """A version without zeros at its end, which mean nothing.

    Example:
        >>> plain("2.11.0"), plain("0.10"), plain("4.0.0")
        ('2.11', '0.10', '4')
    """
    return re.sub(r"(\.0)+$", "", release)


if __name__ == "__main__":
    for name, bound in bounds().items():
        print(f"{name}=={bound if sys.argv[1] == 'bounds' else version(name).partition('+')[0]}")

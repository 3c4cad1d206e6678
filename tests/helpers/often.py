"""Cells of a test that run every time; the others run with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], *names: str) -> list[Any]:
    """The cases as parameters, slow but for ``names``; a case of several values is named as pytest names it.

    Example:
        >>> [bool(case.marks) for case in often([("clip", "lora"), ("t5", "full")], "clip-lora")]
        [False, True]
    """
    listed = list(cases)
    named = ["-".join(map(str, case)) if isinstance(case, tuple) else str(case) for case in listed]
    missing = set(names) - set(named)
    assert not missing, f"no case {missing}; there are {named}"
    marks = [() if name in names else (pytest.mark.slow,) for name in named]
    values = [case if isinstance(case, tuple) else (case,) for case in listed]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]

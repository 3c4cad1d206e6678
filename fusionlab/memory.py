"""What memory this process has used, and may use."""

from __future__ import annotations

import math
import re
import resource
import sys

from fusionlab.errors import InputError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)


def peak_bytes() -> int:
    """The most memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_size(value: int | str, what: str) -> int:
    """Bytes from a number or a text such as ``512MB`` or ``1GiB``.

    Raises:
        InputError: neither.

    Example:
        >>> parse_size("1.5GB", "memory_budget"), parse_size("1KiB", "memory_budget"), parse_size(7, "memory_budget")
        (1500000000, 1024, 7)
    """
    match = _SIZE.match(str(value))
    if match is None or not 0 < float(match[1]) < math.inf:
        raise InputError(f"{what}: expected bytes or a size such as 512MB or 1GB, got {value!r}.")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))

"""What memory this process has used."""

from __future__ import annotations

import resource
import sys


def peak_bytes() -> int:
    """The most memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

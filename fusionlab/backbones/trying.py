"""Whether a network can be asked in some way: by asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Found = TypeVar("_Found")


def tried(call: Callable[[], _Found]) -> _Found | None:
    """What the call gives; None where the architecture cannot be asked so, whatever it raises then.

    Raises:
        torch.OutOfMemoryError: which says nothing of the architecture.
    """
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever kind: every architecture has errors of its own
        return None

"""Temporary tensors in memory that is used again for every block.

A block's temporaries are megabytes; asking the system for them anew costs more than the arithmetic (page faults), and
the C library's aligned allocations grow without bound when small results stay behind. Rules that take their temporaries
here are fast inside the engine; anywhere else they get ordinary tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGNMENT = 64
_current = threading.local()


class Arena:
    """A piece of memory from which tensors are cut one after the other.

    Args:
        num_bytes: its size.
    """

    def __init__(self, num_bytes: int) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8)
        self.used = 0
        self._cut: dict[tuple[int, tuple[int, ...], torch.dtype], tuple[Tensor, int]] = {}

    def cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor, or None if there is no room left."""
        key = (self.used, shape, dtype)
        if key not in self._cut:  # blocks are alike: most tensors were cut before
            start = -(-self.used // _ALIGNMENT) * _ALIGNMENT
            end = start + torch.Size(shape).numel() * dtype.itemsize
            if end > len(self.memory):
                return None
            self._cut[key] = self.memory[start:end].view(dtype).view(shape), end
        tensor, self.used = self._cut[key]
        return tensor


@contextmanager
def using(arena: Arena) -> Iterator[None]:
    """Let :func:`empty` cut from ``arena`` on this thread."""
    _current.arena = arena
    try:
        yield
    finally:
        del _current.arena


@contextmanager
def frame() -> Iterator[None]:
    """Give back what was cut inside the block when it ends."""
    arena: Arena | None = getattr(_current, "arena", None)
    before = arena.used if arena is not None else 0
    try:
        yield
    finally:
        if arena is not None:
            arena.used = before


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of ``shape`` on the device of ``like``, valid until the frame around it ends.

    Example:
        >>> empty((2, 3), torch.zeros(1)).shape
        torch.Size([2, 3])
    """
    arena: Arena | None = getattr(_current, "arena", None)
    wanted = like.dtype if dtype is None else dtype
    if arena is not None and like.device.type == "cpu":
        found = arena.cut(shape, wanted)
        if found is not None:
            return found
    return torch.empty(shape, dtype=wanted, device=like.device)


def empty_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of the shape of ``like``; see :func:`empty`."""
    return empty(like.shape, like, dtype)

"""Masks as bits: eight entries a byte, the first in the lowest bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed_size(count: int) -> int:
    """Bytes of so many bits.

    Example:
        >>> packed_size(8), packed_size(9)
        (1, 2)
    """
    return -(-count // 8)


def pack(mask: Tensor) -> Tensor:
    """Bool ``(..., count)`` as uint8 ``(..., packed_size(count))`` on the CPU; bits beyond the last are 0.

    Example:
        >>> pack(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def unpack(packed: Tensor, first: int, count: int) -> Tensor:
    """The bits from number ``first`` on of flat uint8, as uint8 of 0 and 1, ``(count,)``.

    Example:
        >>> unpack(torch.tensor([5], dtype=torch.uint8), 1, 3)
        tensor([0, 1, 0], dtype=torch.uint8)
    """
    bits = np.unpackbits(packed.cpu().numpy(), count=first + count, bitorder="little")
    return torch.from_numpy(bits[first:])

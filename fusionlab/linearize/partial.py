"""Partial linearization: each adapted layer expanded to first order in its own (A, B). Torch only.

The layer W x + s·B A x, expanded about (A₀, B₀), is W x + s·B₀A₀x + s·(B−B₀)A₀x + s·B₀(A−A₀)x. With B₀ = 0 that is
W x + s·B A₀ x and the gradient of A is exactly zero: no Jacobian product, no second copy of the weights and nothing to
train but B, so that case needs no code at all: it is the ordinary adapter with A frozen at A₀.

Source: arXiv 2310.04742, equation 4, as its code applies it layer by layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linearized_term(inputs: Tensor, lora_a: Tensor, lora_b: Tensor, lora_a0: Tensor, lora_b0: Tensor) -> Tensor:
    """(B−B₀)A₀x + B₀(A−A₀)x: what an adapted layer adds, to first order, to its value at (A₀, B₀).

    Args:
        inputs: x, shape ``(..., in)``; where dropout applies it has been applied, once for both terms.
        lora_a: A, shape ``(rank, in)``.
        lora_b: B, shape ``(out, rank)``.
        lora_a0: A₀, the linearization point, shape of ``lora_a``.
        lora_b0: B₀, the linearization point, shape of ``lora_b``.

    Returns:
        shape ``(..., out)``, not scaled.

    Example:
        >>> a0, b0 = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]])
        >>> linearized_term(torch.tensor([[3.0, 4.0]]), a0 + 1, b0 + 1, a0, b0)
        tensor([[17.]])
    """
    return F.linear(F.linear(inputs, lora_a0), lora_b - lora_b0) + F.linear(F.linear(inputs, lora_a - lora_a0), lora_b0)


def centred_term(inputs: Tensor, lora_a: Tensor, lora_b: Tensor, lora_a0: Tensor, lora_b0: Tensor) -> Tensor:
    """B A x − B₀A₀x: what an ordinary adapter adds to its value at (A₀, B₀); arguments as in :func:`linearized_term`.

    Example:
        >>> a0, b0 = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]])
        >>> centred_term(torch.tensor([[3.0, 4.0]]), a0 + 1, b0 + 1, a0, b0)
        tensor([[24.]])
    """
    hidden = F.linear(inputs, torch.cat([lora_a, lora_a0]))
    return F.linear(hidden, torch.cat([lora_b, -lora_b0], dim=1))

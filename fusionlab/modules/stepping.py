"""Parts of the multi-task step: seeded generators, and gradients that are handed to one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generators that a step draws from, as ``torch.manual_seed`` does, which takes a stack trace besides."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class WithGradients(torch.autograd.Function):
    """Identity on a scalar whose backward hands out gradients that are computed already.

    The distributed wrapper then sees one backward over all tasks' parameters, each ready exactly once, although every
    task's graph was freed before the next task's forward.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Sequence[Tensor]], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        scaled: list[Tensor] = []
        while ctx.gradients:  # one task's at a time lie there twice
            scaled += torch._foreach_mul(ctx.gradients.pop(0), upstream)
        return None, None, *scaled

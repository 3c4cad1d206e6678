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


def gradients_of(losses: Sequence[Tensor], parameters: Sequence[Tensor], scale: float | None) -> Sequence[Tensor]:
    """The gradients of the sum of ``losses``, computed ``scale`` times as large and divided by it where it is given."""
    if scale is None:
        return torch.autograd.grad(losses, parameters)
    found = torch.autograd.grad(losses, parameters, [torch.full_like(loss, scale) for loss in losses])
    return torch._foreach_div(found, scale)


class WithGradients(torch.autograd.Function):
    """Identity on a scalar whose backward hands out gradients that are computed already.

    They are scaled where they lie, so that a custom autograd Function must not return what it saved as a gradient.
    The distributed wrapper then sees one backward over all tasks' parameters, each ready exactly once, although every
    task's graph was freed before the next task's forward.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Sequence[Tensor]], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        gradients = [gradient for of_task in ctx.gradients for gradient in of_task]
        ctx.gradients.clear()  # autograd takes over what nobody else refers to, and copies the rest
        if all(type(each) is Tensor and each.layout == torch.strided for each in gradients) and _own_their_storages(
            gradients
        ):
            torch._foreach_mul_(gradients, upstream)
        else:  # a gradient that two parameters share, an expanded one, or a share of a split one
            gradients = list(torch._foreach_mul(gradients, upstream))
        return None, None, *gradients


def _own_their_storages(tensors: Sequence[Tensor]) -> bool:
    if any(type(tensor) is not Tensor or tensor.layout != torch.strided for tensor in tensors):
        return False
    storages = [tensor.untyped_storage() for tensor in tensors]
    filled = all(tensor.nbytes == storage.nbytes() for tensor, storage in zip(tensors, storages, strict=True))
    return filled and len({storage.data_ptr() for storage in storages}) == len(storages)

"""The step's parts: gradients that are computed already go through one backward, scaled, and not copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusionlab.modules.stepping import WithGradients, seed_device


def handed_out(gradients: list[list[Tensor]], parameters: list[nn.Parameter]) -> None:
    loss = WithGradients.apply(torch.tensor(7.0, requires_grad=True), gradients, *parameters)
    assert loss.item() == 7.0
    (loss / 2).backward()  # as with two accumulated batches


def test_gradients_are_scaled_where_they_lie() -> None:
    first, second = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))
    gradients = [[torch.full((4, 3), 2.0)], [torch.arange(3.0)]]
    places = [gradient.data_ptr() for of_task in gradients for gradient in of_task]
    handed_out(gradients, [first, second])
    assert torch.equal(first.grad, torch.ones(4, 3))
    assert torch.equal(second.grad, torch.arange(3.0) / 2)
    assert [first.grad.data_ptr(), second.grad.data_ptr()] == places


@pytest.mark.parametrize("kind", ["one tensor twice", "parts of one", "expanded"])
def test_gradients_that_share_memory_are_scaled_once(kind: str) -> None:
    whole = torch.arange(6.0)
    pair = {
        "one tensor twice": lambda: [whole[:3].clone()] * 2,
        "parts of one": lambda: [whole[:3], whole[2:5]],
        "expanded": lambda: [torch.ones(1).expand(3), whole[:3].clone()],
    }[kind]()
    expected = [gradient.clone() / 2 for gradient in pair]
    parameters = [nn.Parameter(torch.zeros(3)) for _ in pair]
    handed_out([pair], parameters)
    assert [torch.equal(parameter.grad, value) for parameter, value in zip(parameters, expected, strict=True)] == [
        True
    ] * 2


def test_seeding_is_that_of_torch() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    seed_device(5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)

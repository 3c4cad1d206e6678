"""The closed form of partial linearization against forward-mode automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

from fusionlab import adapters
from fusionlab.linearize import centred_term, linearized_term

# forward-mode differentiation scripts its decompositions on first use; torch warns about that itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

SCALING = 2.0


def _problem(zero_b0: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (7, 5), "weight": (6, 5), "a0": (3, 5), "b0": (6, 3), "a": (3, 5), "b": (6, 3)}
    problem = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if zero_b0:
        problem["b0"].zero_()
    return problem


def _oracle(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    """The layer W x + s·BAx expanded to first order in (A, B) about (A₀, B₀), by a Jacobian-vector product."""

    def layer(lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return F.linear(x, weight) + SCALING * F.linear(F.linear(x, lora_a), lora_b)

    value, tangent_output = jvp(layer, (a0, b0), (a - a0, b - b0))
    return value + tangent_output


@pytest.mark.parametrize("zero_b0", [True, False])
def test_linearized_term_is_the_jvp_in_value_and_gradient(zero_b0: bool) -> None:
    p = _problem(zero_b0)
    inputs = {name: p[name].clone().requires_grad_() for name in ("x", "a", "b")}
    expected = _oracle(inputs["x"], p["weight"], inputs["a"], inputs["b"], p["a0"], p["b0"])
    start = F.linear(inputs["x"], p["weight"] + SCALING * p["b0"] @ p["a0"])
    got = start + SCALING * linearized_term(inputs["x"], inputs["a"], inputs["b"], p["a0"], p["b0"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(got, list(inputs.values()), upstream),
        torch.autograd.grad(expected, list(inputs.values()), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_at_zero_b0_the_gradient_of_a_is_exactly_zero_and_the_layer_is_the_ordinary_one() -> None:
    p = _problem(zero_b0=True)
    lora_a = p["a"].requires_grad_()
    term = linearized_term(p["x"], lora_a, p["b"], p["a0"], p["b0"])
    assert not torch.autograd.grad(term.sum(), lora_a)[0].any()
    torch.testing.assert_close(term, p["x"] @ p["a0"].T @ p["b"].T, rtol=0, atol=1e-12)


def test_centred_term_is_the_difference_of_two_ordinary_adapters() -> None:
    p = _problem(zero_b0=False)
    expected = p["x"] @ (p["b"] @ p["a"] - p["b0"] @ p["a0"]).T
    torch.testing.assert_close(centred_term(p["x"], p["a"], p["b"], p["a0"], p["b0"]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("method", ["lora", "l_lora"])
def test_an_injected_layer_starts_as_the_pretrained_one_and_moves_by_its_delta_weight(init: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    pretrained, weight = model(x), model[0].weight.clone()
    adapters.inject(model, ["task"], method=method, rank=2, lora_alpha=4, target_modules=["0"], init=init)
    adapters.activate(model, "task")
    torch.testing.assert_close(model(x), pretrained, rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters.trainable_parameters(model, "task"):
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    adapter = adapters.extract(model, "task")
    torch.testing.assert_close(model(x), pretrained + x @ adapter.delta_weight("0").T, rtol=0, atol=1e-12)
    assert torch.equal(adapters.base_state(model)["0.weight"], weight)
    expected = 1 if (method, init) == ("l_lora", "default") else 2
    assert len(adapters.trainable_parameters(model, "task")) == expected

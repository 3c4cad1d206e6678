"""Partial linearization: the layer expanded about (A₀, 0) is the ordinary one with A frozen at A₀."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusionlab import adapters


@pytest.mark.parametrize("method", ["lora", "l_lora"])
def test_an_injected_layer_starts_as_the_pretrained_one_and_moves_by_its_delta_weight(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    pretrained, weight = model(x), model[0].weight.clone()
    adapters.inject(model, ["task"], method=method, rank=2, lora_alpha=4, target_modules=["0"])
    adapters.activate(model, "task")
    torch.testing.assert_close(model(x), pretrained, rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters.trainable_parameters(model, "task"):
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    adapter = adapters.extract(model, "task")
    torch.testing.assert_close(model(x), pretrained + x @ adapter.delta_weight("0").T, rtol=0, atol=1e-12)
    assert torch.equal(adapters.base_state(model)["0.weight"], weight)
    assert len(adapters.trainable_parameters(model, "task")) == (1 if method == "l_lora" else 2)

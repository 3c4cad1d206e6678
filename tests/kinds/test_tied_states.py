"""A model's own ``state_dict`` has a tied tensor under all its names; the base has it under the first."""

from __future__ import annotations

from pathlib import Path

import own_kinds
import pytest
import torch
from torch import Tensor

import fusionlab
from fusionlab.adapters import base_state
from fusionlab.errors import InputError
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.folders import save_finetuned
from fusionlab.runs.loading import load_weights


def moved(state: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: value + by if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-lm"])
def test_a_state_dict_is_fused_as_the_base_names_it(name: str) -> None:
    backbone = fusionlab.load_backbone(name)
    whole, first = backbone.model.state_dict(), base_state(backbone.model)
    assert len(whole) > len(first)
    expected = fusionlab.fuse("average", backbone, finetuned={"a": moved(first, 0.01), "b": moved(first, 0.03)}).state
    given = {"a": moved(whole, 0.01), "b": moved(whole, 0.03)}
    for base in (backbone, backbone.model):
        found = fusionlab.fuse("average", base, finetuned=given).state
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[each], expected[each]) for each in expected)


def test_any_name_of_a_tensor_may_stand_for_it() -> None:
    network = own_kinds.Tied().network
    value = torch.ones(8, 8)
    by_first, by_second = (Finetuned(network, {"a": {f"{place}.weight": value}}).weights["a"] for place in (1, 3))
    assert list(by_first) == list(by_second) == ["1.weight"]


def test_two_values_for_one_tensor_are_refused_by_name() -> None:
    module = own_kinds.Tied()
    state = module.network.state_dict() | {"3.weight": torch.zeros(8, 8)}
    told = r"1\.weight and 3\.weight are one tensor, and the weights have two values for it"
    with pytest.raises(InputError, match=told):
        fusionlab.fuse("average", module, finetuned={"a": state})


def test_a_folder_is_read_as_a_state_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = own_kinds.Tied()
    state = moved(module.network.state_dict(), 0.5)
    save_finetuned(tmp_path / "a", state, module.backbone, {"model": "finetuned", "method": "full"})
    assert list(load_weights(tmp_path / "a", module.network).weights) == list(base_state(module.network))
    apart = {name: value.clone() for name, value in state.items()}
    apart["3.weight"] += 1
    save_file(apart, tmp_path / "a" / "model.safetensors")
    with pytest.raises(InputError, match=r"1\.weight and 3\.weight are one tensor"):
        load_weights(tmp_path / "a", module.network)

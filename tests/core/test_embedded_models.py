"""What holds for every embedded model: as small as its card says, and stored in float32."""

import pytest
import torch

from fusionlab.backbones import ASSETS, load_backbone


@pytest.fixture(scope="module", params=["tiny-clip", "tiny-t5"])
def backbone(request):
    return load_backbone(request.param)


def test_size_and_parameters_match_the_card(backbone):
    folder = ASSETS / backbone.name
    parameters = sum(p.numel() for p in backbone.model.parameters())
    assert 1_000_000 <= parameters <= 3_000_000
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert f"{parameters:,} parameters" in (folder / "README.md").read_text()


def test_all_weights_are_finite_float32(backbone):
    for name, parameter in backbone.model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name

"""Norms that are told, kept beside inputs and read back are of whole task vectors, whatever a rule measures itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionlab import fuse, rules
from fusionlab.__main__ import main
from fusionlab.layout import STATS

SHAPES = {"layers.0.w": (40, 30), "layers.1.w": (40, 30), "bias": (40,)}
INNER = ["model_stock", "nuslerp", {"class_path": "sce", "init_args": {"density": 1.0}}]
TRANSFORMS = {"dare": {"drop_rate": 0.5}, "trim": {"density": 0.5, "scope": "tensor"}, "della": {}}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    generator, states = torch.Generator().manual_seed(0), {}
    states["base"] = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for task, scale in (("a", 0.1), ("b", 0.3)):
        states[task] = {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator)
            for name, tensor in states["base"].items()
        }
    for name, state in states.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
    return {name: tmp_path / name for name in states}


def run(models: dict[str, Path], rule: dict[str, Any], output: Path) -> dict[str, Any]:
    recipe = {"base": str(models["base"]), "finetuned": {task: str(models[task]) for task in "ab"}, "rule": rule}
    output.with_suffix(".yaml").write_text(json.dumps(recipe | {"output": str(output)}))
    assert main(["fuse", "--config", str(output.with_suffix(".yaml"))]) == 0
    record: dict[str, Any] = json.loads((output / "fusion.json").read_text())
    return record


@pytest.mark.parametrize("inner", INNER, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_norms_and_cosines_are_of_whole_task_vectors(
    models: dict[str, Path], tmp_path: Path, transform: str, inner: Any
) -> None:
    rule = {"class_path": transform, "init_args": TRANSFORMS[transform] | {"rule": inner}}
    states = {name: load_file(path / "model.safetensors") for name, path in models.items()}
    flat = {
        task: torch.cat([(states[task][name] - states["base"][name]).double().flatten() for name in SHAPES])
        for task in "ab"
    }
    first = run(models, rule, tmp_path / "first")
    assert first["norms"] == pytest.approx({task: vector.norm().item() for task, vector in flat.items()}, rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(flat["a"], flat["b"], dim=0).item()
    assert first["cosines"]["a"]["b"] == pytest.approx(cosine, rel=1e-5)
    # what is kept serves MetaGPT, and the same rule gives the same weights where norms lie there and where not
    after = run(models, {"class_path": "metagpt"}, tmp_path / "after")
    for task in "ab":
        (models[task] / STATS).unlink()
    alone = run(models, {"class_path": "metagpt"}, tmp_path / "alone")
    assert after["scaling_coefficients"] == alone["scaling_coefficients"]
    run(models, rule, tmp_path / "second")
    again, once = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "first"))
    assert all(torch.equal(again[name], once[name]) for name in SHAPES)
    # in memory, where norms are known too
    in_memory = fuse(rules.from_config(rule), states["base"], finetuned={task: states[task] for task in "ab"})
    assert all(torch.equal(in_memory.weights[name], once[name]) for name in SHAPES)
    assert math.isclose(in_memory.norms["a"], first["norms"]["a"], rel_tol=1e-12)

"""Adapters through the fuse command: the same as the merged full weights, and adapters that stock PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import merge_adapter
from safetensors.torch import load_file, save_file

from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors

SHAPES = {"layers.0.q": (24, 16), "layers.0.v": (16, 16), "layers.1.q": (24, 16)}
ADAPTED = ("layers.0.q", "layers.1.q")
# Weights of size 1: the merged models were rounded to float32 once more, and λ differs by what that moved the norms.
TOLERANCE = {"rtol": 0, "atol": 2e-6}


def make_adapter(seed: int, rank: int, *, shared_a: bool = False, rslora: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for number, module in enumerate(ADAPTED):
        rows, columns = SHAPES[module]
        of_a = torch.Generator().manual_seed(100 + number) if shared_a else generator
        lora_a = torch.randn(rank, columns, generator=of_a)
        factors[module] = Factors(lora_a, 0.1 * torch.randn(rows, rank, generator=generator), 8.0, rslora)
    return Adapter(factors, "l_lora" if shared_a else "lora", a0_hash="same" if shared_a else "")


@pytest.fixture
def base(tmp_path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save(tmp_path / "base", state)
    return state


def save(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")


def run(folder: Path, finetuned: dict[str, str], output: str, **keys: Any) -> dict[str, Any]:
    recipe = {"base": str(folder / "base"), "output": str(folder / output), "rule": "metagpt"} | keys
    recipe["finetuned"] = {task: str(folder / name) for task, name in finetuned.items()}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["fuse", "--config", str(folder / "recipe.yaml")]) == 0
    return json.loads((folder / output / "fusion.json").read_text())


@pytest.mark.parametrize("rule", ["average", "metagpt", "ties", {"class_path": "task_arithmetic"}, "knots"], ids=str)
def test_adapters_fuse_like_the_merged_full_weights(rule: Any, base: dict, tmp_path: Path) -> None:
    made = {"a": make_adapter(1, 4), "b": make_adapter(2, 2, rslora=True)}
    for task, adapter in made.items():
        adapters.save_adapter(tmp_path / f"adapter-{task}", adapter)
        save(tmp_path / f"full-{task}", merge_adapter(base, adapter))
    # the base's third weight is no part of an adapter, and would be one of full models for a rule over the model
    ours = run(tmp_path, {"a": "adapter-a", "b": "adapter-b"}, "ours", rule=rule, save="weights")
    theirs = run(tmp_path, {"a": "adapter-a", "b": "full-b"}, "mixed", rule=rule)
    fused = load_file(tmp_path / "ours" / "model.safetensors")
    mixed = load_file(tmp_path / "mixed" / "model.safetensors")
    assert fused.keys() == base.keys()
    assert ours["tensors"]["from_base"] == {"layers.0.v.weight": "no task vector touches it"}
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    if rule != "ties":  # its threshold counts the untouched weight's zeros of full models, as it should
        for name in base:
            torch.testing.assert_close(mixed[name], fused[name], **TOLERANCE)
    assert torch.equal(fused["layers.0.v.weight"], base["layers.0.v.weight"])


def test_adapters_of_one_current_a_keep_their_rank_exactly(base: dict, tmp_path: Path) -> None:
    made = {task: make_adapter(seed, 4, shared_a=True) for seed, task in enumerate("abc", start=1)}
    for task, adapter in made.items():
        adapters.save_adapter(tmp_path / task, adapter)
    record = run(tmp_path, dict(zip("abc", "abc", strict=True)), "out")
    fused = adapters.load_adapter(tmp_path / "out")
    assert record["rank"] == 4
    assert set(fused.ranks.values()) == {4}
    coefficients = record["scaling_coefficients"]
    for module in ADAPTED:
        assert torch.equal(fused.factors[module].lora_a, made["a"].factors[module].lora_a)
        expected = sum(coefficients[task] * adapter.delta_weight(module).double() for task, adapter in made.items())
        torch.testing.assert_close(fused.delta_weight(module).double(), expected, rtol=0, atol=1e-6)


def test_other_adapters_get_the_summed_rank_or_the_one_asked_for(base: dict, tmp_path: Path, capsys) -> None:
    made = {"a": make_adapter(1, 4), "b": make_adapter(2, 2, rslora=True)}
    for task, adapter in made.items():
        adapters.save_adapter(tmp_path / task, adapter)
    record = run(tmp_path, {"a": "a", "b": "b"}, "summed")
    assert record["rank"] == 6
    weights = run(tmp_path, {"a": "a", "b": "b"}, "weights", save="weights")
    assert weights["scaling_coefficients"] == record["scaling_coefficients"]
    merged = merge_adapter(base, adapters.load_adapter(tmp_path / "summed"))
    full = load_file(tmp_path / "weights" / "model.safetensors")
    for name in base:
        torch.testing.assert_close(merged[name], full[name], **TOLERANCE)
    capsys.readouterr()
    truncated = run(tmp_path, {"a": "a", "b": "b"}, "truncated", rank=3)
    assert truncated["rank"] == 3
    assert 0 < truncated["truncation_error"] < 1
    assert "relative truncation error" in capsys.readouterr().out


def test_statistics_of_adapters_do_not_depend_on_the_base(base: dict, tmp_path: Path) -> None:
    adapters.save_adapter(tmp_path / "a", make_adapter(1, 4))
    adapters.save_adapter(tmp_path / "b", make_adapter(2, 4))
    first = run(tmp_path, {"a": "a", "b": "b"}, "first")
    kept = (tmp_path / "a" / "fusion_stats.json").read_bytes()
    again = run(tmp_path, {"a": "a", "b": "b"}, "again")
    assert (again["scaling_coefficients"], again["norms"]) == (first["scaling_coefficients"], first["norms"])
    assert (tmp_path / "a" / "fusion_stats.json").read_bytes() == kept


def refused(folder: Path, message: str, capsys: pytest.CaptureFixture[str], *flags: str) -> None:
    arguments = ["--base", str(folder / "base"), "--finetuned.a", str(folder / "a"), "--output", str(folder / "out")]
    assert main(["fuse", *arguments, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_adapters_that_cannot_be_fused_are_refused(base: dict, tmp_path: Path, capsys) -> None:
    adapters.save_adapter(tmp_path / "a", make_adapter(1, 4))
    config_path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    refused(
        tmp_path, "save: an adapter needs adapters and a linear rule", capsys, "--rule", "ties", "--save", "adapter"
    )
    refused(tmp_path, "say save: weights", capsys, "--dtype", "bfloat16")
    config_path.write_text(json.dumps(config | {"use_dora": True}))
    refused(tmp_path, "DoRA", capsys)
    config_path.write_text(json.dumps(config))
    save(tmp_path / "other", {name: tensor + 1 for name, tensor in base.items()})
    config_path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "other")}))
    refused(tmp_path, "was made for another base", capsys)
    own = json.loads((tmp_path / "a" / "fusionlab.json").read_text())
    (tmp_path / "a" / "fusionlab.json").write_text(json.dumps(own | {"base_hash": "0" * 16}))
    refused(tmp_path, "was made for another base", capsys)


def test_an_adapter_of_other_modules_is_refused_by_name(base: dict, tmp_path: Path, capsys) -> None:
    adapter = make_adapter(1, 4)
    factors = {f"model.{module}": factor for module, factor in adapter.factors.items()}
    adapters.save_adapter(tmp_path / "a", Adapter(factors))
    refused(tmp_path, "not in the base: model.layers.0.q.weight", capsys, "--save", "weights")


def test_an_adapter_is_no_base(base: dict, tmp_path: Path, capsys) -> None:
    adapters.save_adapter(tmp_path / "a", make_adapter(1, 4))
    arguments = ["--base", str(tmp_path / "a"), "--finetuned.a", str(tmp_path / "a"), "--output", str(tmp_path / "out")]
    assert main(["fuse", *arguments]) == 2
    assert "is an adapter; give the full model" in capsys.readouterr().err

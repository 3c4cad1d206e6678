"""Values of a rule's arguments that differ between tensors: by filter and along the blocks, for every rule that can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionlab import adapters, rules
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors
from fusionlab.blocks.task_vectors import Statistics
from fusionlab.engine import fuse
from fusionlab.errors import InputError
from fusionlab.rules.settings import blocks_of, value_at

BLOCKS = 5
NAMES = ["embed.weight"] + [f"h.{k}.{part}.weight" for k in range(BLOCKS) for part in ("attn", "mlp")] + ["norm.weight"]


def state(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(6, 4, generator=generator) for name in NAMES}


BASE = state(0)
TUNED = {task: {n: BASE[n] + d for n, d in state(k, 0.1).items()} for k, task in enumerate("ab", 1)}

SETTINGS: dict[str, Any] = {
    "gradient": [0.1, 0.9, 0.3],
    "filter": [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.4}],
    "whole names": [{"filter": "h.[01].*", "value": 0.8}, {"filter": "*.weight", "value": 0.15}],
    "blocks": [{"layers": [1, 4], "value": [0.1, 0.7]}, {"filter": "norm", "value": 0.9}, {"value": 0.25}],
}
BY_HAND = {
    "gradient": {"embed.weight": 0.1, "norm.weight": 0.1, "h.0.mlp.weight": 0.1, "h.1.attn.weight": 0.5,
                 "h.2.attn.weight": 0.9, "h.3.mlp.weight": 0.6, "h.4.mlp.weight": 0.3},
    "filter": {"embed.weight": 0.4, "h.0.attn.weight": 0.4, "h.0.mlp.weight": 0.2, "h.1.mlp.weight": 0.3,
               "h.4.mlp.weight": 0.6},
    "whole names": {"h.0.mlp.weight": 0.8, "h.1.attn.weight": 0.8, "h.2.mlp.weight": 0.15, "norm.weight": 0.15},
    "blocks": {"embed.weight": 0.25, "norm.weight": 0.9, "h.0.mlp.weight": 0.25, "h.1.attn.weight": 0.1,
               "h.2.mlp.weight": 0.4, "h.3.mlp.weight": 0.7, "h.4.mlp.weight": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_values_by_hand(kind: str) -> None:
    blocks = blocks_of(NAMES)
    for name, expected in BY_HAND[kind].items():
        assert value_at(SETTINGS[kind], name, blocks.get(name), "t") == pytest.approx(expected)


def of(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": init_args}


def with_number(rule: Any, number: float) -> Any:
    """The configuration with a number in the place of what is marked by SETTING."""
    if rule == "SETTING":
        return number
    return {key: with_number(each, number) for key, each in rule.items()} if isinstance(rule, dict) else rule


PLAIN = of("task_arithmetic", scaling_coefficient=0.5)
RULES = {
    "slerp": of("slerp", t="SETTING"),
    "of one task": of("task_arithmetic", scaling_coefficient={"a": "SETTING", "b": 0.3}),
    "of all tasks": of("task_arithmetic", scaling_coefficient="SETTING"),
    "average": of("average", weights={"a": "SETTING", "b": 1.0}),
    "nuslerp": of("nuslerp", weights={"a": "SETTING", "b": 1.0}),
    "dare": of("dare", rule=PLAIN, drop_rate={"a": "SETTING", "b": 0.2}, rescale="l1"),
    "inside dare": of("dare", rule=of("task_arithmetic", scaling_coefficient="SETTING"), drop_rate=0.4),
    "della": of("della", rule=PLAIN, density="SETTING", epsilon=0.01),
    "trim": of("trim", rule=PLAIN, density="SETTING", scope="tensor", at_threshold="first"),
    "ties": of("ties", density="SETTING", scope="tensor"),
    "breadcrumbs": of("breadcrumbs", keep="SETTING"),
    "sce": of("sce", density="SETTING"),
    "lines": of("lines", beta=0.1, alpha="SETTING"),
    "iso_c": of("iso_c", scaling_coefficient="SETTING"),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("case", RULES)
def test_every_tensor_is_fused_by_the_rule_with_its_value(case: str, kind: str) -> None:
    given = with_number(RULES[case], SETTINGS[kind])
    rule = rules.from_config(given)
    assert rules.from_config(json.loads(json.dumps(rules.to_config(rule)))) == rule
    assert rules.rule_name(rule) == RULES[case]["class_path"]
    fused = fuse(rule, BASE, finetuned=TUNED)
    for name, number in BY_HAND[kind].items():
        alone = fuse(rules.from_config(with_number(RULES[case], number)), BASE, finetuned=TUNED)
        torch.testing.assert_close(fused.state[name], alone.state[name], rtol=0, atol=1e-6)
        for task, each in fused.scaling_coefficients.items() if case != "inside dare" else ():
            own = alone.scaling_coefficients[task]
            found = each[name] if isinstance(each, dict) else each
            assert found == pytest.approx(own[name] if isinstance(own, dict) else own)


def test_density_one_beside_others_in_sce() -> None:
    """Of which the one measures once, the others in four passes."""
    rule = rules.from_config(of("sce", density=[1, 0.5]))
    found = fuse(rule, BASE, finetuned=TUNED).state
    for name, density in (("embed.weight", 1.0), ("h.0.mlp.weight", 1.0), ("h.4.attn.weight", 0.5)):
        alone = fuse(rules.Sce(density), BASE, finetuned=TUNED).state
        assert torch.equal(found[name], alone[name])


def test_other_arguments_beside_a_setting() -> None:
    rule = rules.from_config(of("dare", rule=of("task_arithmetic"), drop_rate=[0.1, 0.3]))
    assert rules.is_open(rule)
    closed = rules.with_argument(rules.with_coefficient(rule, 0.7), "seed", 3)
    expected = of("dare", rule=of("task_arithmetic", scaling_coefficient=0.7), drop_rate=[0.1, 0.3], seed=3)
    found = fuse(closed, BASE, finetuned=TUNED).state
    torch.testing.assert_close(found, fuse(rules.from_config(expected), BASE, finetuned=TUNED).state)
    with pytest.raises(LookupError, match="nothing"):
        rules.with_argument(rule, "nothing", 1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (of("ties", density=[0.1, 0.2]), r"ties.density: the rule works over the whole model.*got \[0.1, 0.2\]"),
        (of("metagpt", multiplier=[1, 2]), "metagpt.multiplier: the rule works over the whole model"),
        (of("karcher", max_iterations=[1, 2]), "karcher.max_iterations: expected a whole number"),
        (of("ties", scope=["tensor", "model"]), "ties.scope: value: expected a number or a list of numbers"),
        (of("slerp", t=[0.5, 1.2]), "slerp.t: expected a number in .0, 1., got 1.2"),
        (of("slerp", t=[]), r"slerp.t: value: expected a number or a list of numbers, got \[\]"),
        (of("slerp", t=[{"fliter": "mlp", "value": 1}]), "slerp.t: unknown key 'fliter'; did you mean 'filter'"),
        (of("slerp", t={"layers": [3, 3], "value": 1}), r"slerp.t: layers: expected .* got \[3, 3\]"),
        (of("slerp", t={"filter": "mlp", "value": 0.1}), "slerp.t has no value for embed.weight; add one"),
        (of("breadcrumbs", keep=[0.2, 0.9], gamma=[0.0, 0.2]), "keep . gamma: expected at most 1"),
    ],
)
def test_what_a_rule_cannot_is_refused_by_key(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fuse(rules.from_config(rule), BASE, finetuned=TUNED)


def test_blocks_are_those_of_the_model_whatever_is_fused() -> None:
    rule = rules.from_config(of("task_arithmetic", scaling_coefficient=[0, 1]))
    names = ("h.1.mlp.weight", "h.2.mlp.weight")
    statistics = Statistics(tasks=("a",), names=names, model=tuple(NAMES))
    assert isinstance(rule, rules.LinearRule)
    assert [rule.coefficients(name, ("a",), statistics)["a"] for name in names] == [0.25, 0.5]


RECIPE = of("task_arithmetic", scaling_coefficient={"a": SETTINGS["filter"], "b": 0.5})


def folder(path: Path, weights: dict[str, Tensor]) -> str:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    return str(path)


def run(tmp_path: Path, recipe: dict[str, Any], *flags: str) -> int:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"output": str(tmp_path / "out")}))
    return main(["fuse", "--config", str(tmp_path / "recipe.yaml"), *flags])


def test_the_plan_shows_what_holds_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"base": folder(tmp_path / "base", BASE), "rule": RECIPE}
    recipe["finetuned"] = {task: folder(tmp_path / task, each) for task, each in TUNED.items()}
    assert run(tmp_path, recipe, "--dry_run") == 0
    told = capsys.readouterr().out
    assert "by tensor       task_arithmetic.scaling_coefficient.a, mlp: 0.2 .. 0.6 (blocks 0-4, 5 tensors)" in told
    assert "by tensor       task_arithmetic.scaling_coefficient.a, *: 0.4 (blocks 0-4, 7 tensors)" in told
    assert run(tmp_path, recipe) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, number in BY_HAND["filter"].items():
        total = BASE[name] + number * (TUNED["a"][name] - BASE[name]) + 0.5 * (TUNED["b"][name] - BASE[name])
        torch.testing.assert_close(found[name], total)
    stored = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert rules.from_config(stored["rule"]) == rules.from_config(RECIPE)


def test_a_pattern_that_is_in_no_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"filter": "zzz", "value": 0.1}, {"filter": "mlp", "value": 0.5}, {"filter": "w", "value": 1.0}]
    recipe = {"base": folder(tmp_path / "base", BASE), "rule": of("slerp", t=[*lines, {"value": 0.0}])}
    recipe["finetuned"] = {"a": folder(tmp_path / "a", TUNED["a"]), "base": folder(tmp_path / "b", BASE)}
    assert run(tmp_path, recipe, "--dry_run") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "it is for none of the tensors" in line]
    assert len(told) == 1
    assert "slerp.t, zzz: it is for none of the tensors" in told[0]


@pytest.mark.parametrize("is_dry", [True, False])
def test_a_tensor_without_a_value_is_known_before_any_work(
    is_dry: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"base": folder(tmp_path / "base", BASE), "rule": of("slerp", t={"filter": ".0.", "value": 1.0})}
    recipe["finetuned"] = {task: folder(tmp_path / task, each) for task, each in TUNED.items()}
    assert run(tmp_path, recipe, *["--dry_run"][: int(is_dry)]) == 2
    assert "slerp.t has no value for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_of_adapters_one_adapter(tmp_path: Path) -> None:
    made = {}
    for seed, task in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        factors = {
            f"h.{k}.mlp": Factors(torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator), 4.0)
            for k in (1, 2)
        }
        made[task] = Adapter(factors, "lora", "", "")
        adapters.save_adapter(tmp_path / task, made[task])
    recipe = {"base": folder(tmp_path / "base", BASE), "finetuned": {task: str(tmp_path / task) for task in made}}
    recipe["rule"] = of("task_arithmetic", scaling_coefficient=[0, 1])
    assert run(tmp_path, recipe) == 0
    found = adapters.load_adapter(tmp_path / "out").task_vector()
    for name, share in (("h.1.mlp.weight", 0.25), ("h.2.mlp.weight", 0.5)):
        total = share * sum(each.task_vector()[name] for each in made.values())
        torch.testing.assert_close(found[name], total, rtol=1e-5, atol=1e-6)

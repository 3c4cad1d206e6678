"""What Python gives in a form of its own is taken as a file's text would be, or refused with one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_regressor
import pytest
import torch
import yaml
from torch import nn

import fusionlab
from fusionlab import rules
from fusionlab.__main__ import main
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.commands.parser import recipe_of
from fusionlab.commands.sweep.processes import _written
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.errors import InputError
from fusionlab.rules.config import from_config, plain, to_config

BASE, ONE = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    given = ["--model", "own_regressor.Regressor", "--data", "own_regressor.Planes", "--fusion.rules", "[average]"]
    assert main(["fit", *given, "--trainer.max_steps", "3", "--trainer.default_root_dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(home))
    return home


# fuse

TAKEN: dict[str, Callable[[], Any]] = {
    "a dtype by name": lambda: fusionlab.fuse("average", BASE, finetuned={"a": ONE}, dtype="bfloat16"),
    "a size": lambda: fusionlab.fuse("average", BASE, finetuned={"a": ONE}, memory_budget="1GB"),
    "a rule's class": lambda: fusionlab.fuse(rules.Average, BASE, finetuned={"a": ONE}),
    "a number of numpy": lambda: fusionlab.fuse(rules.TaskArithmetic(np.float32(1)), BASE, finetuned={"a": ONE}),
    "the same as a configuration": lambda: fusionlab.fuse(
        {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": np.float32(1)}},
        BASE,
        finetuned={"a": ONE},
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_fuse_takes(case: str) -> None:
    fused = TAKEN[case]()
    assert fused.state["w"].tolist() == [3.0, 2.0]
    json.dumps([fused.scaling_coefficients, to_config(fused.rule)])


def test_models_and_names_stand_for_their_weights() -> None:
    torch.manual_seed(0)
    base, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for given in (base, base.state_dict()):
        state = fusionlab.fuse("average", given, finetuned={"a": other}).state
        assert all(torch.allclose(state[name], value) for name, value in other.state_dict().items())
    clip = fusionlab.load_backbone("tiny-clip")
    assert fusionlab.fuse("average", "tiny-clip", finetuned={"a": clip}).norms == {"a": 0.0}


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_a = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"lora_b": nn.Linear(2, 2)})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: fusionlab.fuse("average", BASE, finetuned=[ONE]), "finetuned: expected a mapping .* got a list"),  # type: ignore[arg-type]
    "no weights": (lambda: fusionlab.fuse("average", BASE, finetuned={"a": 3}), "'a': expected weights, .* a int"),  # type: ignore[dict-item]
    "no base": (lambda: fusionlab.fuse("average", 3, finetuned={"a": ONE}), "base: expected a backbone, .* a int"),  # type: ignore[arg-type]
    "no such base": (lambda: fusionlab.fuse("average", "tiny-clib", finetuned={"a": ONE}), "tiny-clib"),
    "no dtype": (lambda: fusionlab.fuse("average", BASE, finetuned={"a": ONE}, dtype="bf16"), "no such dtype 'bf16'"),
    "no size": (lambda: fusionlab.fuse("average", BASE, finetuned={"a": ONE}, memory_budget="x"), "memory_budget: "),
    "no rule's class": (lambda: fusionlab.fuse(nn.Linear, BASE, finetuned={"a": ONE}), "is not a fusion rule"),
    "a module of several tasks": (
        lambda: fusionlab.fuse("average", own_regressor.Regressor(), finetuned={"a": own_regressor.Regressor()}),
        r"'a' is a Regressor, .* give its finetuned\(TASK\)",
    ),
    "a model with adapters": (
        lambda: fusionlab.fuse("average", BASE, finetuned={"a": Adapted()}),
        "'a' is a model with adapters in it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_fuse_refuses(case: str) -> None:
    call, told = REFUSED[case]
    with pytest.raises(InputError, match=told):
        call()


def test_paths_below_home(at_home: Path) -> None:
    module = own_regressor.Regressor()
    expected = fusionlab.fuse("average", module, finetuned={"a": at_home / "run/finetuned/plane 0"})
    found = fusionlab.fuse("average", module, finetuned={"a": "~/run/finetuned/plane 0"})
    assert found.norms == expected.norms
    values = fusionlab.FusionCallback(full_reference="~/run").full_reference
    assert values is not None
    assert {task for task, _ in values} == {"plane 0", "plane 1", "plane 2"}
    assert SweepRecipe("out", full_reference="~/run").reference == at_home / "run"


# evaluate

EVALUATED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"tasks": ["plane 9"]}, "task 'plane 9' is not known; did you mean 'plane "),
    "one task": ({"tasks": "plane"}, "task 'plane' is not known"),
    "split": ({"split": "valid"}, "task 'plane 0': split 'valid' is not known; did you mean 'validation'"),
    "label": ({"modle": "fused"}, "labels: field of a row 'modle' is not known; did you mean 'model'"),
}


@pytest.mark.parametrize("case", EVALUATED)
def test_what_evaluate_refuses(case: str) -> None:
    given, told = EVALUATED[case]
    with pytest.raises(InputError, match=told):
        fusionlab.evaluate(own_regressor.Regressor(), own_regressor.Planes(), **given)


def test_one_task_is_evaluated_by_its_name() -> None:
    rows = fusionlab.evaluate(own_regressor.Regressor(), own_regressor.Planes(), "plane 1")
    assert [row["task"] for row in rows] == ["plane 1"]


# recipes


def test_a_recipe_is_as_a_file_has_it() -> None:
    given = {
        "output": Path("out"),
        "runs": (Path("a"), "b"),
        "rules": {"mine": rules.Ties(np.float64(0.5))},
        "scaling_coefficients": np.linspace(0, 1, 3),
        "sizes": [np.int64(2)],
        "full_reference": Path("c"),
    }
    written = {
        "output": "out",
        "runs": ["a", "b"],
        "rules": {"mine": {"class_path": "fusionlab.rules.Ties", "init_args": to_config(rules.Ties(0.5))["init_args"]}},
        "scaling_coefficients": [0.0, 0.5, 1.0],
        "sizes": [2],
        "full_reference": "c",
    }
    expected = SweepRecipe(**written)
    assert recipe_of(SweepRecipe, given, "sweep") == expected
    own = SweepRecipe(**given)
    assert own == expected
    handed_on = SweepRecipe(**yaml.safe_load(_written(own)))
    assert handed_on.named_rules == {"mine": rules.Ties(0.5)}
    fused = {"base": Path("x"), "finetuned": {"a": Path("y")}, "output": Path("z"), "dtype": torch.bfloat16}
    recipe = recipe_of(Recipe, fused | {"rule": rules.Ties(0.5)}, "fuse")
    assert recipe == Recipe(**fused, rule=rules.Ties(0.5))
    assert (recipe.base, recipe.finetuned, recipe.dtype) == ("x", {"a": "y"}, "bfloat16")
    assert from_config(recipe.rule) == rules.Ties(0.5)


def carrying() -> Any:
    return rules.TaskArithmetic({"a": torch.ones(2)})  # type: ignore[dict-item]


def test_a_rule_that_no_configuration_gives_stays_itself_and_in_its_process() -> None:
    rule = carrying()
    assert plain({"mine": rule})["mine"] is rule
    with pytest.raises(InputError, match="no configuration gives mine again to another process; give processes 1"):
        _written(SweepRecipe("out", rules={"mine": rule}))


def test_a_sweep_by_several_processes_takes_paths_and_rules(at_home: Path, tmp_path: Path) -> None:
    recipe = {"output": tmp_path / "sweep", "runs": ["~/run"], "rules": {"mine": rules.Ties(0.5)}, "sizes": (2,)}
    assert fusionlab.sweep(recipe | {"processes": 1, "full_reference": at_home / "run"}).is_file()
    rows = json.loads((tmp_path / "sweep/results.json").read_text())["rows"]
    assert {row["rule"] for row in rows} == {"mine"}

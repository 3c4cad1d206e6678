"""The coefficient that validation chooses, and searches that look at data, on problems small enough to know."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.rules import Metagpt, Rule, TaskArithmetic
from fusionlab.search import (
    GRID,
    Adamerging,
    Lorahub,
    MetagptMultiplier,
    Validated,
    is_search,
    search_from_config,
    to_config,
)
from fusionlab.search.adamerging import entropy


class Peaked:
    """Validation scores by coefficient."""

    def __init__(self, score: Callable[[float], float]) -> None:
        self.score = score

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        return [self.score(rule.scaling_coefficient) for rule in rules]

    def num_samples(self, limit: int | None = None) -> int:
        return 1


def test_best_of_the_grid_and_the_smaller_of_equals() -> None:
    scores = {value: -abs(value - 0.375) for value in GRID}
    found = Validated().search(Peaked(lambda value: round(scores[value], 6)))
    assert found.rule == TaskArithmetic(0.35)
    assert list(found.scores) == list(map(str, GRID))
    assert len(GRID) == 21
    assert (GRID[0], GRID[1], GRID[-1]) == (0.0, 0.05, 1.0)


@pytest.mark.parametrize(("peak", "found", "tried"), [(1.0, 1.0, 26), (1.4, 1.4, 31), (9.0, 3.0, 61)])
def test_beyond_one_while_the_edge_wins(peak: float, found: float, tried: int) -> None:
    result = Validated().search(Peaked(lambda value: -abs(value - peak)))
    assert result.rule.scaling_coefficient == pytest.approx(found)
    assert len(result.scores) == tried


class Known:
    """Two tasks with a known best coefficient each; the network is a linear layer of two classes."""

    tasks = ("a", "b")
    best = {"a": 0.7, "b": -0.4}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[Rule] = []
        generator = torch.Generator().manual_seed(0)
        self.vectors = {task: {"w": torch.randn(3, 2, generator=generator)} for task in self.tasks}
        self.data = {task: torch.randn(40, 3, generator=generator) for task in self.tasks}

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        self.asked += rules
        values = [rule.multiplier if isinstance(rule, Metagpt) else rule.scaling_coefficient for rule in rules]
        return [-abs(value - 1.6) for value in values]

    def losses(self, rules: Sequence[Rule], num_samples: int) -> list[float]:
        self.asked += rules
        return [sum((rule.scaling_coefficient[task] - self.best[task]) ** 2 for task in self.tasks) for rule in rules]

    def inputs(self, task: str, step: int, batch_size: int) -> dict[str, Any]:
        return {"x": self.data[task][(torch.arange(batch_size) + step * batch_size) % 40]}

    def task_vectors(self) -> dict[str, dict[str, Tensor]]:
        return self.vectors

    def logits(self, task: str, batch: dict[str, Any], task_vector: dict[str, Tensor]) -> Tensor:
        return batch["x"] @ task_vector["w"]

    def num_samples(self, limit: int | None = None) -> int:
        return 2 * (40 if limit is None else min(limit, 40))


def test_validated_coefficient_and_multiplier_go_beyond_their_grid() -> None:
    found = Validated().search(Known())
    assert found.rule == TaskArithmetic(1.6)
    assert (found.num_samples, found.num_labels, found.passes) == (80, 80, 36)
    multiplier = MetagptMultiplier(grid=(0.5, 1.0)).search(Known())
    assert multiplier.rule == Metagpt("model", 1.5)
    assert "1.5" in multiplier.scores


def test_lorahub_finds_the_minimum_of_the_loss() -> None:
    problem = Known()
    found = Lorahub(regularization=0.0, num_samples=8).search(problem)
    assert len(problem.asked) == 40
    assert problem.asked[0] == TaskArithmetic({"a": 0.0, "b": 0.0})
    assert all(abs(value) <= 1.5 for rule in problem.asked for value in rule.scaling_coefficient.values())
    assert found.rule.scaling_coefficient == pytest.approx(problem.best, abs=0.1)
    assert (found.num_samples, found.num_labels, found.passes) == (16, 16, 40)
    again = Lorahub(regularization=0.0, num_samples=8).search(Known())
    assert again.rule == found.rule
    shrunk = Lorahub(regularization=5.0, num_samples=8).search(Known())
    assert shrunk.rule.scaling_coefficient == {"a": 0.0, "b": 0.0}


def test_lorahub_without_nevergrad_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(InputError, match=r"install fusionlab\[search\]"):
        search_from_config("lorahub")


@pytest.mark.parametrize("scope", ["task", "layer"])
def test_adamerging_lowers_the_entropy_without_labels(scope: str) -> None:
    problem = Known()
    found = Adamerging(scope=scope, num_steps=60, learning_rate=0.05).search(problem)
    assert found.num_labels == 0
    assert found.num_samples == 80
    assert found.passes == 2 * 60 * 16 * 2 / 80
    lambdas = found.rule.scaling_coefficient if scope == "task" else found.rule.by_name["w"]
    assert all(0.0 <= value <= 1.0 for value in lambdas.values())

    def total(values: dict[str, float]) -> float:
        fused = {"w": sum(values[task] * problem.vectors[task]["w"] for task in values)}
        return sum(entropy(problem.logits(task, {"x": problem.data[task]}, fused)).item() for task in problem.tasks)

    assert total(lambdas) < total({"a": 0.3, "b": 0.3}) - 0.05
    assert found.scores["59"] > found.scores["0"]


def test_adamerging_gradient_is_that_of_finite_differences() -> None:
    problem = Known()
    start = Adamerging(num_steps=1, learning_rate=1e-3).search(problem).rule.scaling_coefficient
    batches = [(task, problem.inputs(task, half, 16)) for task in problem.tasks for half in range(2)]

    def loss(a: float, b: float) -> float:
        fused = {"w": a * problem.vectors["a"]["w"].double() + b * problem.vectors["b"]["w"].double()}
        return sum(entropy(batch["x"].double() @ fused["w"]).item() for _, batch in batches)

    for task, shift in (("a", (1e-3, 0.0)), ("b", (0.0, 1e-3))):
        slope = loss(0.3 + shift[0], 0.3 + shift[1]) - loss(0.3 - shift[0], 0.3 - shift[1])
        assert (start[task] - 0.3) * slope < 0  # Adam's first step goes down the slope, by the learning rate
        assert abs(start[task] - 0.3) == pytest.approx(1e-3, rel=1e-2)


def test_searches_by_name_and_back() -> None:
    assert is_search("adamerging")
    assert is_search({"class_path": "Lorahub"})
    assert not is_search("metagpt")
    search = search_from_config({"class_path": "adamerging", "init_args": {"scope": "layer"}})
    assert search == Adamerging(scope="layer")
    assert search_from_config(to_config(search)) == search
    with pytest.raises(InputError, match=r"unknown argument 'scop'; did you mean 'scope'"):
        search_from_config({"class_path": "adamerging", "init_args": {"scop": "layer"}})
    with pytest.raises(InputError, match=r"expected task or layer, got 'model'"):
        Adamerging(scope="model")
    with pytest.raises(InputError, match=r"adamerging.num_steps: expected .*, got 'many'"):
        search_from_config({"class_path": "adamerging", "init_args": {"num_steps": "many"}})
    with pytest.raises(InputError, match=r"grid: expected numbers, at least one, got \['x'\]"):
        search_from_config({"class_path": "metagpt_multiplier", "init_args": {"grid": ["x"]}})

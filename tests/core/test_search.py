"""The coefficient that validation chooses, and searches that look at data, on problems small enough to know."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.rules import Dare, Metagpt, Rule, TaskArithmetic, Ties, from_config, is_open
from fusionlab.search import (
    Adamerging,
    Lorahub,
    MetagptMultiplier,
    ToTheTop,
    Validated,
    best,
    is_search,
    look,
    search_from_config,
    to_config,
)
from fusionlab.search.adamerging import entropy


class Peaked:
    """Validation scores by coefficient."""

    at_once = False

    def __init__(self, score: Callable[[float], float]) -> None:
        self.score = score

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        return [self.score(rule.scaling_coefficient) for rule in rules]

    def num_samples(self, limit: int | None = None, split: str = "validation") -> int:
        return 1


GRID = tuple(round(0.05 * step, 2) for step in range(21))


def test_a_search_for_an_open_coefficient_is_no_open_rule() -> None:
    assert is_open(TaskArithmetic())
    assert is_open(Dare(TaskArithmetic()))
    assert not is_open(Validated())
    assert not is_open(Validated(Dare(TaskArithmetic())))


def test_best_of_the_grid_and_the_smaller_of_equals() -> None:
    found = Validated(grid=GRID).search(Peaked(lambda value: round(-abs(value - 0.375), 6)))
    assert found.rule == TaskArithmetic(0.35)
    assert list(found.scores) == list(map(str, GRID))


@pytest.mark.parametrize(("peak", "found", "tried"), [(1.0, 1.0, 26), (1.4, 1.4, 31), (9.0, 3.0, 61)])
def test_beyond_one_while_the_edge_of_a_grid_wins(peak: float, found: float, tried: int) -> None:
    result = Validated(grid=GRID).search(Peaked(lambda value: -abs(value - peak)))
    assert result.rule.scaling_coefficient == pytest.approx(found)
    assert len(result.scores) == tried


@pytest.mark.parametrize("start", [0.0, 0.05, 0.3, 0.4, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("peak", [0.0, 0.05, 0.15, 0.4, 0.65, 1.0, 1.9, 3.0, 9.0])
def test_a_few_looks_find_the_top_from_any_start(peak: float, start: float) -> None:
    asked: list[float] = []

    def score(values: Sequence[float]) -> list[float]:
        asked.extend(values)
        return [-((value - peak) ** 2) for value in values]

    scores = look(score, ToTheTop(start))
    assert best(scores) == min(peak, 3.0)
    assert len(asked) == len(set(asked)) <= 16
    assert all(0 <= value <= 3 and round(value / 0.05, 6).is_integer() for value in asked)


def test_a_flat_top_and_a_line_end() -> None:
    assert best(look(lambda values: [0.5] * len(values), ToTheTop(0.4))) == 0.0
    plateau = look(lambda values: [min(value, 0.5) - max(0.0, value - 0.8) for value in values], ToTheTop(0.4))
    assert 0.5 <= best(plateau) <= 0.8
    assert best(look(lambda values: list(values), ToTheTop(0.4))) == 3.0


def test_looks_follow_from_the_scores_alone() -> None:
    """A search that goes on with what is known asks for the same numbers as one that was not stopped."""
    looks, scores = ToTheTop(0.4), {}
    whole = look(lambda values: [-((value - 0.9) ** 2) for value in values], looks)
    while values := looks(scores):
        scores = dict(reversed(scores.items())) | {value: -((value - 0.9) ** 2) for value in values}
    assert scores == whole


def test_other_arguments_are_chosen_one_after_another() -> None:
    class Rugged(Peaked):
        def scores(self, rules: Sequence[Rule]) -> list[float]:
            return [-abs(rule.scaling_coefficient - 2 * rule.density) - (rule.density - 0.3) ** 2 for rule in rules]

    rule = from_config({"class_path": "ties", "init_args": {"density": 0.1}})
    found = Validated(rule, others={"density": [0.1, 0.2, 0.3, 0.4]}).search(Rugged(lambda value: 0.0))
    assert found.rule.density == 0.1  # at the first coefficient, .2, none is better
    assert found.rule.scaling_coefficient == 0.2
    assert {"0.2", "density 0.3, 0.2", "density 0.1, 0.2"} <= found.scores.keys()
    assert found.scores["0.2"] == found.scores["density 0.1, 0.2"]
    assert found.passes < len(found.scores)  # one model under two names is scored once


def test_coefficients_of_rules_inside_transforms() -> None:
    class Inner(Peaked):
        def scores(self, rules: Sequence[Rule]) -> list[float]:
            return super().scores([rule.rule for rule in rules])

    search = search_from_config(
        {"class_path": "validated", "init_args": {"rule": {"class_path": "dare", "init_args": {"rule": "ties"}}}}
    )
    found = search.search(Inner(lambda value: -((value - 0.7) ** 2)))
    assert found.rule == Dare(Ties(scaling_coefficient=0.7))
    assert search_from_config(to_config(search)) == search


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "metagpt"}, "Metagpt has no argument 'scaling_coefficient'; it has scope, multiplier"),
        ({"others": {"density": [0.1]}}, "TaskArithmetic has no argument 'density'"),
        ({"rule": "ties", "others": {"density": []}}, "validated.others.density: expected numbers"),
        ({"grid": []}, "validated.grid: expected numbers, at least one, got []"),
        ({"grid": ["a"]}, "validated.grid: expected numbers"),
        ({"rule": "ties", "others": {"density": [7.0]}}, "density"),
    ],
)
def test_validated_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        search_from_config({"class_path": "validated", "init_args": arguments})


class Known:
    """Two tasks with a known best coefficient each; the network is a linear layer of two classes."""

    tasks = ("a", "b")
    best = {"a": 0.7, "b": -0.4}  # noqa: RUF012
    at_once = False

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

    def inputs(self, task: str, step: int, batch_size: int, split_name: str = "validation") -> dict[str, Any]:
        return {"x": self.data[task][(torch.arange(batch_size) + step * batch_size) % 40]}

    def task_vectors(self) -> dict[str, dict[str, Tensor]]:
        return self.vectors

    def logits(self, task: str, batch: dict[str, Any], task_vector: dict[str, Tensor]) -> Tensor:
        return batch["x"] @ task_vector["w"]

    def num_samples(self, limit: int | None = None, split: str = "validation") -> int:
        return 2 * (40 if limit is None else min(limit, 40))


def test_validated_coefficient_and_multiplier_go_beyond_their_grid() -> None:
    found = Validated(grid=GRID).search(Known())
    assert found.rule == TaskArithmetic(1.6)
    assert (found.num_samples, found.num_labels, found.passes) == (80, 80, 36)
    assert Validated().search(Known()).rule == TaskArithmetic(1.6)
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


def test_models_that_cost_as_one_are_tried_at_every_step() -> None:
    class AtOnce(Peaked):
        at_once = True
        calls = 0

        def scores(self, rules: Sequence[Rule]) -> list[float]:
            self.calls += 1
            return [-abs(getattr(rule, "multiplier", getattr(rule, "scaling_coefficient", 0)) - 1.3) for rule in rules]

    for search, tried in ((Validated(), 61), (MetagptMultiplier(), 31), (Validated(grid=(0.5, 1.3, 2.0)), 3)):
        problem = AtOnce(lambda value: 0.0)
        found = search.search(problem)
        assert (problem.calls, found.passes) == (1, tried)
        assert "1.3" in found.scores

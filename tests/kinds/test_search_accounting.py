"""What a search says that it took is what it took: samples and labels looked at, passes, and no model twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fusionlab
from fusionlab.adapters import base_state
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.rules import Rule, TaskArithmetic, Ties
from fusionlab.search import Adamerging, Found, Lorahub, MetagptMultiplier, Search, Validated, ValidationProblem


class Counted:
    """Tasks of several sizes, whose samples and labels are counted when they are looked at."""

    at_once = False

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = {f"task {number}": size for number, size in enumerate(sizes)}
        self.tasks = tuple(self.sizes)
        self.seen: set[tuple[str, int]] = set()
        self.labelled: set[tuple[str, int]] = set()
        self.run = 0  # samples that models were run over
        self.models: list[Any] = []
        generator = torch.Generator().manual_seed(len(sizes))
        self.vectors = {task: {"w": torch.randn(3, 2, generator=generator)} for task in self.tasks}
        self.best = {task: float(torch.rand((), generator=generator)) - 0.5 for task in self.tasks}

    def look(self, task: str, samples: Sequence[int], labels: bool) -> None:
        looked = {(task, sample) for sample in samples}
        self.seen |= looked
        self.labelled |= looked if labels else set()
        self.run += len(samples)

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        for rule in rules:
            self.models.append(rule)
            for task, size in self.sizes.items():
                self.look(task, range(size), labels=True)
        values = [getattr(rule, "multiplier", getattr(rule, "scaling_coefficient", 0.0)) for rule in rules]
        return [-abs(value - 1.6) for value in values]

    def losses(self, rules: Sequence[Rule], num_samples: int) -> list[float]:
        for rule in rules:
            self.models.append(rule)
            for task, size in self.sizes.items():
                self.look(task, range(min(num_samples, size)), labels=True)
        return [sum((rule.scaling_coefficient[task] - self.best[task]) ** 2 for task in self.tasks) for rule in rules]

    def inputs(self, task: str, step: int, batch_size: int, split_name: str = "validation") -> dict[str, Any]:
        samples = [(step * batch_size + row) % self.sizes[task] for row in range(batch_size)]
        self.look(task, samples, labels=False)
        return {"x": torch.stack([torch.tensor([1.0, sample, sample % 3]) for sample in samples])}

    def task_vectors(self) -> dict[str, dict[str, Tensor]]:
        return self.vectors

    def logits(self, task: str, batch: dict[str, Any], task_vector: dict[str, Tensor]) -> Tensor:
        return batch["x"] @ task_vector["w"]

    def num_samples(self, limit: int | None = None, split: str = "validation") -> int:
        return sum(size if limit is None else min(size, limit) for size in self.sizes.values())


SIZES = {"one task": [5], "tiny and large": [3, 400], "even": [40, 40], "odd": [1, 7, 33], "many": [50, 2, 9, 32, 31]}
SEARCHES: dict[str, Search] = {
    "lorahub": Lorahub(),
    "lorahub, few samples": Lorahub(budget=7, num_samples=4),
    "lorahub, one look": Lorahub(budget=1),
    "lorahub, two looks": Lorahub(budget=2, num_samples=33),
    "lorahub, wide": Lorahub(budget=12, bound=5.0),
    "lorahub, pulled to the start": Lorahub(budget=15, regularization=50.0),
    "adamerging": Adamerging(num_steps=3),
    "adamerging, large batches": Adamerging(num_steps=2, batch_size=50),
    "adamerging, by layer": Adamerging(num_steps=1, batch_size=5, scope="layer"),
    "validated": Validated(),
    "validated, a value twice": Validated(grid=(0.0, 0.5, 0.5, 1.0, 1)),
    "validated, another argument": Validated(Ties(density=0.2), others={"density": [0.1, 0.2, 0.3]}),
    "multiplier": MetagptMultiplier(),
    "multiplier, a value twice": MetagptMultiplier(grid=[1.0, 2.0, 1.0]),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_tells_what_it_took(search: str, sizes: str) -> None:
    problem = Counted(SIZES[sizes])
    found: Found = SEARCHES[search].search(problem)
    assert (found.num_samples, found.num_labels) == (len(problem.seen), len(problem.labelled))
    assert found.passes == pytest.approx(problem.run / len(problem.seen))
    assert len(problem.models) == len({repr(model) for model in problem.models})  # none twice
    if not isinstance(SEARCHES[search], Adamerging):
        others = isinstance(SEARCHES[search], Validated) and SEARCHES[search].others
        assert found.passes == len(problem.models) == len(found.scores) - bool(others)  # one model has two names
    if isinstance(SEARCHES[search], Lorahub):
        assert problem.models[0] == TaskArithmetic(dict.fromkeys(problem.tasks, 0.0))
        budget = SEARCHES[search].budget
        assert budget - 2 <= len(problem.models) <= budget  # its optimizer may come back to a point
        assert found.rule in problem.models
        assert max(found.scores.values()) == found.scores[str(problem.models.index(found.rule))]


TASKS = ["digits", "signs", "textures"]


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Finetuned]:
    """A module and adapters as if trained."""
    module, own = fusionlab.ClipModule(rank=1), fusionlab.ClipModule(rank=1)
    own.add_adapters(TASKS)
    generator = torch.Generator().manual_seed(1)
    for parameter in (parameter for task in TASKS for parameter in own.task_parameters[task]):
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module, Finetuned(base_state(module.base_model), {task: own.finetuned(task) for task in TASKS})


ON_MODELS = {
    "lorahub": Lorahub(budget=3),
    "lorahub, few samples": Lorahub(budget=2, num_samples=4),
    "adamerging": Adamerging(num_steps=1),
    "adamerging, small batches": Adamerging(num_steps=2, batch_size=3),
}


@pytest.mark.parametrize("search", ON_MODELS)
@pytest.mark.parametrize("max_samples", [6, 40])
def test_on_models_and_data_too(
    search: str, max_samples: int, trained: tuple[Any, Finetuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, finetuned = trained
    data = fusionlab.ImageTasks(TASKS, max_samples=max_samples, eval_batch_size=40)
    data.image_size = module.backbone.image_size
    data.setup("validate")
    module.prepare_tasks(data.tasks)
    subset, seen, ran = tuple(TASKS[1:]), set(), 0
    logits = module.logits

    def counted(task: str, images: Tensor) -> Tensor:
        nonlocal ran
        ran += len(images)
        seen.update((task, image.numpy().tobytes()) for image in images)
        return logits(task, images)

    monkeypatch.setattr(module, "logits", counted)
    problem = ValidationProblem(subset, finetuned, module, data, lambda rules: [])
    found = ON_MODELS[search].search(problem)
    assert found.num_samples == len(seen)
    assert found.passes == pytest.approx(ran / len(seen))
    assert problem.cost["passes"] == pytest.approx(ran / max_samples / len(TASKS))


def test_a_search_looks_in_evaluation_mode(trained: tuple[Any, Finetuned], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's own dropout, as T5 has it, is no part of a score, in whichever mode a fit has left the module."""
    module, finetuned = trained
    data = fusionlab.ImageTasks(TASKS[:2], max_samples=8, eval_batch_size=8)
    data.image_size = module.backbone.image_size
    data.setup("validate")
    module.prepare_tasks(data.tasks)
    attentions = [part for part in module.modules() if type(part).__name__ == "CLIPAttention"]
    for part in attentions:
        monkeypatch.setattr(part, "dropout", 0.5)
    problem = ValidationProblem(tuple(TASKS[:2]), finetuned, module, data, lambda rules: [])
    rules, batch = [TaskArithmetic(0.3)], problem.inputs(TASKS[0], 0, 8)
    found = []
    for mode in (module.train, module.eval):
        mode()
        logits = problem.logits(TASKS[0], batch, problem.task_vectors()[TASKS[0]])
        found.append((problem.losses(rules, 8), logits.tolist()))
        assert module.training == (mode == module.train)
    assert attentions
    assert found[0] == found[1]

"""Many candidates in one pass give the rows of each by itself, and the tangent shortcut those of the forward pass."""

from typing import Any

import pytest
import torch
from often import often
from torch import nn

import fusionlab
from fusionlab import rules
from fusionlab.adapters import base_state
from fusionlab.evaluation import (
    Candidate,
    TangentOutputs,
    linear_tasks,
    score_candidates,
    score_linear_sums,
    tangent_shortcut,
)
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.making import fuse_weights

TASKS = ["digits", "signs", "textures"]


@pytest.fixture(scope="module")
def prepared() -> tuple[Any, Any]:
    data = fusionlab.ImageTasks(TASKS, max_samples=48, eval_batch_size=32)
    module = fusionlab.ClipModule()
    data.image_size = module.backbone.image_size
    data.setup()
    module.prepare_tasks(data.tasks)
    return module, data


def finetuned_of(method: str, module: Any) -> Finetuned:
    """As if trained: every task's parameters moved at random."""
    trained = fusionlab.ClipModule(method=method)
    generator = torch.Generator().manual_seed(1)
    trained.add_adapters(TASKS)
    for parameter in (parameter for task in TASKS for parameter in trained.task_parameters[task]):
        size = 0.05 if method != "full" else 0.1 * parameter.std().nan_to_num(0.0)
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    return Finetuned(base_state(module.base_model), {task: trained.finetuned(task) for task in TASKS})


RULES = [
    rules.Average(), rules.TaskArithmetic(0.7), rules.TaskArithmetic(0.0), rules.Metagpt(), rules.Metagpt("layer"),
    rules.Lines(0.3), rules.Ties(density=0.5),
]  # fmt: skip


@pytest.mark.parametrize("method", often(["lora", "l_lora", "full"], "l_lora"))
def test_rows_and_features_of_each_by_itself(method: str, prepared: tuple[Any, Any]) -> None:
    module, data = prepared
    finetuned = finetuned_of(method, module)
    plans = {repr((rule, tasks)): finetuned.plan(rule, tasks) for rule in RULES for tasks in (TASKS, TASKS[1:])}
    candidates = {name: Candidate(finetuned.make(plan), plan.tasks, {"model": "fused"}) for name, plan in plans.items()}
    logits: list[torch.Tensor] = []
    original = module.logits
    module.logits = lambda task, images: logits.append(original(task, images)) or logits[-1]
    together = score_candidates(module, data, candidates, "test")
    many = {name: [] for name in plans}
    order = [n for task in TASKS for _ in data.eval_batches(task, "test") for n, p in plans.items() if task in p.tasks]
    for name, value in zip(order, logits, strict=True):
        many[name].append(value)
    for name, plan in plans.items():
        weights = fuse_weights(
            plan.rule, finetuned.base, {task: finetuned.weights[task] for task in plan.tasks}
        ).weights
        logits.clear()
        with module.use(weights):
            assert together[name] == fusionlab.evaluate(module, data, plan.tasks, "test", model="fused")
        assert all(torch.equal(a, b) for a, b in zip(many[name], logits, strict=True)), name
    del module.logits
    assert not any("forward" in vars(part) or part._forward_hooks for part in module.modules())


def test_frozen_work_is_done_once_a_batch(prepared: tuple[Any, Any]) -> None:
    module, data = prepared
    finetuned = finetuned_of("lora", module)
    calls = []
    conv = next(part for part in module.base_model.vision_model.modules() if isinstance(part, nn.Conv2d))
    original = conv._conv_forward
    conv._conv_forward = lambda *args: calls.append(1) or original(*args)
    candidates = {str(value): finetuned.plan(rules.TaskArithmetic(value), TASKS) for value in (0.1, 0.2, 0.3)}
    named = {name: Candidate(finetuned.make(plan), ("signs",), {}) for name, plan in candidates.items()}
    score_candidates(module, data, named, "test")
    del conv._conv_forward
    assert len(calls) == data.num_eval_batches("signs", "test") == 2


def test_tangent_shortcut_is_the_forward_pass(prepared: tuple[Any, Any]) -> None:
    module, data = prepared
    finetuned = finetuned_of("tangent_lora", module)
    shortcut = tangent_shortcut(module, data, finetuned)
    assert isinstance(shortcut, TangentOutputs)
    assert tangent_shortcut(module, data, finetuned_of("lora", module)) is None
    points = [(value, tasks) for value in (0.3, 1.0) for tasks in (TASKS, TASKS[:2])]
    plans = {str(point): finetuned.plan(rules.TaskArithmetic(point[0]), point[1]) for point in points}
    together = shortcut.score({name: (plan.by_task, TASKS, {}) for name, plan in plans.items()}, "test")
    assert shortcut.passes == len(TASKS) * (len(TASKS) + 1)
    parts = shortcut._parts("signs", "test")[0]
    images = [batch["images"] for batch in data.eval_batches("signs", "test")]
    for name, plan in plans.items():
        with module.use(finetuned.make(plan)), torch.no_grad():
            direct = fusionlab.evaluate(module, data, TASKS, "test")
            features = [module.output(lambda batch=batch: module.backbone.image_features(batch)) for batch in images]
        expected = torch.cat(features) @ module.heads["signs"].T
        lambdas = torch.tensor([1.0, *(plan.by_task.get(task, 0.0) for task in TASKS)])
        combined = (lambdas @ parts.flatten(1)).view(parts.shape[1:])
        torch.testing.assert_close(combined, expected, rtol=1e-4, atol=1e-5)
        assert (expected - parts[0]).abs().max() > 1e-2
        assert together[name] == direct


@pytest.mark.parametrize("method", often(["tangent_lora", "tangent"], "tangent"))
def test_sums_of_tangents_score_as_each_by_itself(method: str, prepared: tuple[Any, Any]) -> None:
    module, data = prepared
    finetuned = finetuned_of(method, module)
    assert linear_tasks(module, TASKS, finetuned.weights) == tuple(TASKS)
    assert linear_tasks(module, TASKS, finetuned_of("lora", module).weights) == ()
    values, calls = (0.0, 0.1, 0.4, 1.0), []
    original = module.backbone.image_features
    module.backbone.image_features = lambda images: calls.append(1) or original(images)
    sums = {str(value): (dict.fromkeys(TASKS, value), TASKS, {}) for value in values}
    together = score_linear_sums(module, data, finetuned.weights, sums, "validation")
    batches = sum(data.num_eval_batches(task, "validation") for task in TASKS)
    assert len(calls) == batches * len(TASKS)  # the base comes with the first task vector
    scores = set()
    for value, rows in zip(values, together.values(), strict=True):
        weights = fuse_weights(rules.TaskArithmetic(value), finetuned.base, finetuned.weights).weights
        with module.use(weights):
            expected = fusionlab.evaluate(module, data, TASKS, "validation")
        others = [{**row, "value": None} for row in rows]
        assert others == [{**row, "value": None} for row in expected]
        assert [row["value"] for row in rows] == pytest.approx([row["value"] for row in expected], abs=1e-12)
        scores.add(tuple(row["value"] for row in rows))
    del module.backbone.image_features
    assert len(scores) > 1


def test_equal_coefficients_are_one_model(prepared: tuple[Any, Any]) -> None:
    finetuned = finetuned_of("l_lora", prepared[0])
    half, average = finetuned.plan(rules.TaskArithmetic(0.5), TASKS[:2]), finetuned.plan(rules.Average(), TASKS[:2])
    assert half.signature == average.signature
    assert half.signature != finetuned.plan(rules.TaskArithmetic(0.5), TASKS[1:]).signature
    nothing = {finetuned.plan(rules.TaskArithmetic(0.0), tasks).signature for tasks in (TASKS, TASKS[:2])}
    assert nothing == {("linear",)}
    assert len({finetuned.hash(task) for task in TASKS}) == 3


def test_a_parameter_without_dimensions_is_part_of_the_hash() -> None:
    base = {"logit_scale": torch.tensor(1.0), "weight": torch.zeros(2, 2)}
    states = {task: base | {"logit_scale": torch.tensor(value)} for task, value in (("a", 2.0), ("b", 3.0), ("c", 2.0))}
    finetuned = Finetuned(base, states)
    assert finetuned.hash("a") == finetuned.hash("c") != finetuned.hash("b")

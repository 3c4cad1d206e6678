"""One loop makes every score: each batch is decoded once, and the network runs over it as often as it must."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fusionlab
from fusionlab.evaluation import Candidate, score_candidates, score_linear_sums, tangent_shortcut
from fusionlab.evaluation.plane import grid_of, measure_plane
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.rules import TaskArithmetic
from fusionlab.search import ValidationProblem

TASKS = ["digits", "signs"]
BATCHES = 4  # two of each task


def prepared(method: str) -> tuple[fusionlab.ClipModule, fusionlab.ImageTasks, Finetuned]:
    module = fusionlab.ClipModule(method=method)
    module.add_adapters(TASKS)
    torch.manual_seed(0)
    for parameter in (each for of_task in module.task_parameters.values() for each in of_task):
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = fusionlab.ImageTasks(TASKS, max_samples=30, eval_batch_size=16, image_size=32)
    data.setup(None)
    finetuned = {task: module.finetuned(task) for task in TASKS}
    module = fusionlab.ClipModule()
    module.prepare_tasks(data.tasks)
    return module, data, Finetuned(module, finetuned)


@contextmanager
def counted(module: fusionlab.ClipModule, data: fusionlab.ImageTasks) -> Iterator[dict[str, int]]:
    """How often the network runs over a batch, and how often a batch is decoded."""
    found = {"forwards": 0, "decoded": 0}
    vision, eval_batches = module.base_model.vision_model, data.eval_batches
    handle = vision.register_forward_pre_hook(lambda *_: found.update(forwards=found["forwards"] + 1))

    def batches(*args: object, **kwargs: object) -> Iterator[dict]:
        for batch in eval_batches(*args, **kwargs):  # type: ignore[arg-type]
            found["decoded"] += 1
            yield batch

    data.eval_batches = batches  # type: ignore[method-assign]
    yield found
    handle.remove()
    del data.eval_batches


def test_forwards_of_every_caller() -> None:
    module, data, finetuned = prepared("lora")
    with counted(module, data) as found:
        fusionlab.evaluate(module, data)
    assert found == {"forwards": BATCHES, "decoded": BATCHES}
    candidates = {task: Candidate(finetuned.weights[task], tuple(TASKS), {}) for task in TASKS}
    with counted(module, data) as found:
        rows = score_candidates(module, data, candidates, "test")
    assert found == {"forwards": 2 * BATCHES, "decoded": BATCHES}
    assert {name: [row["task"] for row in of] for name, of in rows.items()} == dict.fromkeys(TASKS, TASKS)
    with counted(module, data) as found:
        measure_plane(module, data, finetuned.weights, TASKS, grid_of(3, 1.0))
    assert found == {"forwards": 9 * BATCHES, "decoded": BATCHES}
    with counted(module, data) as found:
        problem = ValidationProblem(tuple(TASKS), finetuned, module, data, lambda rules: [])
        problem.losses([TaskArithmetic(0.3), TaskArithmetic(0.4)], 8)
    assert found == {"forwards": 2 * len(TASKS), "decoded": 0}
    assert problem.cost["passes"] == pytest.approx(2 * 8 / 30)


def test_forwards_of_tangents_do_not_grow_with_candidates() -> None:
    module, data, finetuned = prepared("tangent_lora")
    sums = {str(value): (dict.fromkeys(TASKS, value), TASKS, {}) for value in (0.1, 0.2, 0.3, 0.4, 0.5)}
    shortcut = tangent_shortcut(module, data, finetuned)
    assert shortcut is not None
    calls = {}
    for many in (1, 5):
        few = dict(list(sums.items())[:many])
        with counted(module, data) as found:
            score_linear_sums(module, data, finetuned.weights, few, "test")
        calls[many] = dict(found)
    assert calls[1] == calls[5] == {"forwards": 2 * BATCHES, "decoded": BATCHES}
    with counted(module, data) as found:
        shortcut.score(sums, "test")
        shortcut.score(sums, "test")
    assert found == {"forwards": 2 * BATCHES, "decoded": BATCHES}
    with counted(module, data) as found:
        measure_plane(module, data, finetuned.weights, TASKS, grid_of(3, 1.0))
    assert found == {"forwards": 2 * BATCHES, "decoded": BATCHES}

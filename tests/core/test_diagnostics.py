"""Diagnostics: the Gram matrix against dense vectors, shares, the plane against scoring each point by itself, files."""

import csv
from pathlib import Path

import pytest
import torch
from often import often

import fusionlab
from fusionlab.adapters import Adapter, Factors, base_state
from fusionlab.errors import InputError
from fusionlab.evaluation.plane import grid_of, measure_plane
from fusionlab.evaluation.scores import evaluate
from fusionlab.fusion.making import fuse_weights
from fusionlab.reporting.diagnostics import (
    Diagnostics,
    cosines,
    gram_matrix,
    norm_shares,
    norms,
    write_diagnostics,
)
from fusionlab.rules import TaskArithmetic

TASKS = ["digits", "signs"]


def module_with(method: str, scale: float, **options: object) -> fusionlab.ClipModule:
    torch.manual_seed(0)
    module = fusionlab.ClipModule(method=method, **options)  # type: ignore[arg-type]
    module.add_adapters(TASKS)
    with torch.no_grad():
        for parameters in module.task_parameters.values():
            for parameter in parameters:
                parameter += scale * torch.randn_like(parameter)
    return module


def prepared(module: fusionlab.ClipModule) -> fusionlab.ImageTasks:
    data = fusionlab.ImageTasks(TASKS, max_samples=30, eval_batch_size=16, image_size=32)
    data.setup(None)
    module.prepare_tasks(data.tasks)
    return data


@pytest.mark.parametrize("method", ["lora", "tangent_lora", "full", "tangent"])
def test_gram_matrix_is_that_of_the_dense_vectors(method: str) -> None:
    module = module_with(method, 0.05)
    base, finetuned = base_state(module.base_model), {task: module.finetuned(task) for task in TASKS}
    if "lora" in method:
        vectors = {task: dict(weights.task_vector()) for task, weights in finetuned.items()}
    else:
        states = {task: getattr(weights, "state", weights) for task, weights in finetuned.items()}
        vectors = {task: {name: state[name] - base[name] for name in state} for task, state in states.items()}
    flat = {
        task: torch.cat([value.double().flatten() for value in vector.values()]) for task, vector in vectors.items()
    }
    gram = gram_matrix(base, finetuned)
    for one in TASKS:
        for other in TASKS:
            assert gram[one][other] == pytest.approx(float(flat[one] @ flat[other]), rel=1e-4, abs=1e-4)
        assert norms(gram)[one] == pytest.approx(float(flat[one].norm()), rel=1e-5)
        assert cosines(gram)[one][one] == pytest.approx(1.0, abs=1e-12)
    expected = float(flat["digits"] @ flat["signs"] / flat["digits"].norm() / flat["signs"].norm())
    assert cosines(gram)["digits"]["signs"] == pytest.approx(expected, abs=1e-5)
    shares = norm_shares(base, finetuned)
    for task, row in shares.items():
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-12)
        first = "vision_model.encoder.layers.0"
        of_layer = sum(
            float(value.double().square().sum())
            for name, value in vectors[task].items()
            if name.startswith(first + ".")
        )
        assert row[first] == pytest.approx(of_layer / float(flat[task].square().sum()), rel=1e-4)
    assert ("visual_projection" in shares["signs"]) == (method in ("full", "tangent"))


@pytest.mark.parametrize(
    ("method", "scale"),
    often([("lora", 0.05), ("tangent_lora", 0.05), ("full", 0.02), ("tangent", 0.02)], "lora-0.05", "tangent-0.02"),
)
def test_the_plane_is_what_scoring_each_point_gives(method: str, scale: float) -> None:
    module = module_with(method, scale)
    data = prepared(module)
    finetuned = {task: module.finetuned(task) for task in TASKS}
    plane = measure_plane(module, data, finetuned, TASKS, grid_of(3, 1.0))
    assert plane.passes == (3 if method.startswith("tangent") else 9)
    for task in TASKS:
        for point, weights in (((0.0, 0.0), None), ((1.0, 0.0), "digits"), ((0.0, 1.0), "signs")):
            with module.use(weights):
                row = evaluate(module, data, [task], "validation")[0]
            assert plane.accuracy[point][task] == pytest.approx(row["value"], abs=1e-12)
    assert plane.disentanglement[0.0, 0.0] == 0
    assert all(0 <= value <= 2 for value in plane.disentanglement.values())
    expected = 0.0
    batches = {task: list(data.eval_batches(task, "validation")) for task in TASKS}
    joint = fuse_weights(TaskArithmetic(1.0), base_state(module.base_model), finetuned).weights
    for task in TASKS:
        changed = 0
        for batch in batches[task]:
            with torch.no_grad(), module.use(task):
                alone = module.logits(task, batch["images"]).argmax(1)
            with torch.no_grad(), module.use(joint):
                both = module.logits(task, batch["images"]).argmax(1)
            changed += int(((alone != both) & batch["mask"]).sum())
        expected += changed / len(data.splits[task]["validation"])
    assert plane.disentanglement[1.0, 1.0] == pytest.approx(expected, abs=1e-12)


def test_shares_of_adapters_count_each_layers_own_scaling() -> None:
    factors = {
        f"layers.{number}.q": Factors(torch.eye(2), torch.eye(2), lora_alpha=lora_alpha)
        for number, lora_alpha in enumerate((2.0, 6.0))
    }
    shares = norm_shares({}, {"a": Adapter(factors), "b": Adapter(factors)})
    assert shares["a"] == pytest.approx({"layers.0": 0.1, "layers.1": 0.9})  # scalings 1 and 3, squared 1 and 9


def test_files(tmp_path: Path) -> None:
    module = module_with("tangent_lora", 0.05, rank=2)
    data = prepared(module)
    finetuned = {task: module.finetuned(task) for task in TASKS}
    plane = Diagnostics(grid_size=3, num_batches=1).plane(module, data, finetuned)
    write_diagnostics(tmp_path, base_state(module.base_model), finetuned, plane)
    assert {path.name for path in (tmp_path / "diagnostics").iterdir()} == {
        "cosines.csv", "norms.csv", "norm_shares.csv", "plane.csv", "plane_tasks.csv",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "cosines.png", "norm_shares.png", "plane_disentanglement.png", "plane_loss.png", "plane_accuracy.png",
    }  # fmt: skip
    with (tmp_path / "diagnostics" / "plane.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    origin = next(line for line in lines if (line["coefficient_1"], line["coefficient_2"]) == ("0.0", "0.0"))
    assert float(origin["disentanglement_error"]) == 0
    assert float(origin["loss_1"]) > 0


def test_bad_input() -> None:
    base = {"w": torch.zeros(2)}
    with pytest.raises(InputError, match="need two tasks or more, got a"):
        norm_shares(base, {"a": {"w": torch.ones(2)}})
    with pytest.raises(InputError, match="need two tasks or more, got a"):
        Diagnostics().check(["a"])
    with pytest.raises(InputError, match="'c' is no task of this run"):
        Diagnostics(tasks=["a", "c"]).check(["a", "b"])
    with pytest.raises(InputError, match="two different tasks, got"):
        Diagnostics(tasks=["a", "a"]).check(["a", "b"])
    with pytest.raises(InputError, match="odd and at least 3, got 4"):
        Diagnostics(grid_size=4)
    with pytest.raises(InputError, match="unknown task 'sings'; did you mean 'signs'"):
        measure_plane(None, None, {"signs": {}, "digits": {}}, ["digits", "sings"], (0.0,))

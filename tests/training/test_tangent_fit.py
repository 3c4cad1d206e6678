"""`fit` and `test` with tangent_lora and tangent: the run folder, additivity of what is in it, precision, refusals."""

import json
from pathlib import Path

import pytest
import torch
from often import often
from oracles import jvp_call
from torch import Tensor

import fusionlab
from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.backbones import ClipBackbone, load_backbone
from fusionlab.linearize import LinearizedState, linearized_call
from fusionlab.modules.applying import applied, as_linearized
from fusionlab.runs.loading import load_weights

TASKS = ["digits", "signs"]
DATA = [
    "--data.tasks",
    json.dumps(TASKS),
    "--data.max_samples",
    "24",
    "--data.eval_batch_size",
    "24",
    "--data.batch_size",
    "8",
]
FIT = [
    "fit",
    *DATA,
    "--trainer.max_steps",
    "2",
    "--trainer.enable_progress_bar",
    "false",
    "--fusion.rules",
    "[average, ties]",
]
METHODS = {"tangent_lora": "adapters", "tangent": "finetuned"}


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {method: tmp_path_factory.mktemp("runs") / method for method in METHODS}
    for method, folder in folders.items():
        rate = ["--model.learning_rate", "0.01" if method == "tangent_lora" else "0.001"]
        assert main([*FIT, "--model.method", method, *rate, "--trainer.default_root_dir", str(folder)]) == 0
    return folders


def some_images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def features_of(folder: Path, images: Tensor) -> Tensor:
    backbone = load_backbone("tiny-clip")
    weights = load_weights(folder, backbone.model).weights
    with applied(backbone, weights) as application:
        return application(lambda: backbone.image_features(images))


@pytest.mark.parametrize(("method", "kind"), METHODS.items())
def test_the_run_folder_says_that_it_is_linearized(runs: dict[str, Path], method: str, kind: str) -> None:
    names = {path.name for path in runs[method].iterdir()}
    assert names == {"config.yaml", "checkpoints", kind, "fused", "results.json", "results.md", "plots"}
    points = set()
    for task in TASKS:
        own = json.loads((runs[method] / kind / task / "fusionlab.json").read_text())
        points.add(own["linearization_point"])
        assert own["row"] == {"model": "finetuned", "finetuned_on": task, "method": method, "seed": 42}
        assert "Read it with fusionlab" in (runs[method] / kind / task / "README.md").read_text()
    assert len(points) == 1
    run = fusionlab.load(runs[method])
    loaded = {**run.adapters, **{task: each.weights for task, each in run.finetuned.items()}}
    assert set(loaded) == set(TASKS)
    for weights in (*loaded.values(), run.fused["ties"].weights):
        assert isinstance(weights, LinearizedState) or weights.method == "tangent_lora"


@pytest.mark.parametrize(("method", "kind"), METHODS.items())
def test_average_is_the_mean_of_the_features_above_the_base(runs: dict[str, Path], method: str, kind: str) -> None:
    images = some_images()
    with torch.no_grad():
        base = load_backbone("tiny-clip").image_features(images)
    of_task = [features_of(runs[method] / kind / task, images) - base for task in TASKS]
    fused = features_of(runs[method] / "fused" / "average", images) - base
    assert min(float(each.abs().max()) for each in of_task) > 1e-2
    torch.testing.assert_close(
        fused, (of_task[0] + of_task[1]) / 2, rtol=1e-3, atol=2e-5
    )  # float32 features of about 10


@pytest.mark.parametrize(
    ("method", "rule"), [("tangent_lora", "average"), ("tangent_lora", "ties"), ("tangent", "average")]
)
def test_test_command_gives_the_rows_of_fit(runs: dict[str, Path], tmp_path: Path, method: str, rule: str) -> None:
    argv = ["test", *DATA, "--model.weights", str(runs[method] / "fused" / rule)]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    scored = {row["task"]: row for row in rows_of(tmp_path / "results.json")}
    expected = [row for row in rows_of(runs[method] / "results.json") if row["rule"] == rule]
    assert {row["task"] for row in expected} == set(TASKS)
    for row in expected:
        for key in ("value", "num_samples", "method", "rule", "model", "scaling_coefficients"):
            assert scored[row["task"]][key] == row[key]


def test_training_moves_b_alone_and_a_fused_adapter_has_the_rank_of_one(runs: dict[str, Path]) -> None:
    of_task = [adapters.load_adapter(runs["tangent_lora"] / "adapters" / task) for task in TASKS]
    fused = adapters.load_adapter(runs["tangent_lora"] / "fused" / "average")
    assert fused.method == "tangent_lora"
    for module, factors in fused.factors.items():
        assert torch.equal(factors.lora_a, of_task[0].factors[module].lora_a)
        assert torch.equal(of_task[1].factors[module].lora_a, of_task[0].factors[module].lora_a)
        assert of_task[0].factors[module].lora_b.abs().max() > 0


def test_another_base_is_refused(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = load_backbone("tiny-clip")
    with torch.no_grad():  # a weight that no adapter changes, but on which every derivative depends
        other.model.vision_model.encoder.layers[0].mlp.fc1.weight.add_(0.1)
    other.model.save_pretrained(tmp_path / "other")
    other.save_files(tmp_path / "other")
    for method, kind in METHODS.items():
        argv = ["test", *DATA, "--model.backbone", str(tmp_path / "other")]
        assert main([*argv, "--model.weights", str(runs[method] / kind / "digits")]) == 2
        assert "acts to first order about another model" in capsys.readouterr().err


def test_what_was_trained_otherwise_is_linearized_afterwards(tmp_path: Path) -> None:
    module = fusionlab.ClipModule(method="lora", rank=4)
    module.add_adapters(["task"])
    with torch.no_grad():
        for parameter in module.task_parameters["task"]:
            parameter += 0.1 * torch.randn_like(parameter)
    adapter, images = module.finetuned("task"), some_images()
    backbone = load_backbone("tiny-clip")
    own = dict(backbone.named_parameters())
    delta = {f"model.{name}": value for name, value in adapter.task_vector().items()}
    base, tangent = jvp_call(
        lambda: backbone.image_features(images), backbone, {name: own[name] for name in delta}, delta
    )
    state = {name: adapters.base_state(backbone.model)[name] + value for name, value in adapter.task_vector().items()}
    for weights in (as_linearized(adapter), as_linearized(state)):
        with torch.no_grad(), applied(backbone, weights) as application:
            output = application(lambda: backbone.image_features(images))
        torch.testing.assert_close(output, base + tangent, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), applied(backbone, adapter) as application:
        exact = application(lambda: backbone.image_features(images))
    assert (exact - output).abs().max() > 1e-2
    adapters.save_adapter(tmp_path / "adapter", adapter)
    rows = {}
    for method in ("lora", "tangent_lora"):
        argv = ["test", *DATA, "--model.method", method, "--model.weights", str(tmp_path / "adapter")]
        assert main([*argv, "--output", str(tmp_path / f"{method}.json")]) == 0
        rows[method] = rows_of(tmp_path / f"{method}.json")
    assert {row["method"] for row in rows["tangent_lora"]} == {"lora, linearized"}
    assert {row["method"] for row in rows["lora"]} == {"lora"}


@pytest.mark.parametrize(("method", "precision"), [("tangent_lora", "bf16-mixed"), ("tangent", "bf16-true")])
def test_bfloat16(method: str, precision: str, tmp_path: Path) -> None:
    argv = [*FIT, "--model.method", method, "--trainer.precision", precision, "--model.dropout", "0.1"]
    argv = argv if method == "tangent_lora" else argv[:-2]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    assert all(0 <= row["value"] <= 1 for row in rows_of(tmp_path / "results.json"))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    moved = [value for name, value in checkpoint["state_dict"].items() if "lora_B" in name or ".finetuned." in name]
    assert moved
    assert {value.dtype for value in moved} == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}


def test_float16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*FIT, "--model.method", "tangent_lora", "--trainer.precision", "16-true"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert "float16 overflows and underflows; use bfloat16 or float32" in capsys.readouterr().err


def test_training_steps_descend_on_the_linearized_loss() -> None:
    module = fusionlab.ClipModule(method="tangent_lora", rank=4)
    module.add_adapters(["task"])
    module.heads["task"] = torch.nn.functional.normalize(
        torch.randn(5, module.backbone.model.config.projection_dim), dim=1
    )
    batch = {"images": some_images(), "labels": torch.tensor([0, 1, 2, 3])}
    module.train()
    module.activate("task")
    names = [name for name, parameter in module.backbone.named_parameters() if parameter.requires_grad]
    assert all("lora_B" in name for name in names)
    loss = module.loss("task", batch)
    gradients = torch.autograd.grad(loss, module.task_parameters["task"])
    with torch.no_grad():
        for parameter, gradient in zip(module.task_parameters["task"], gradients, strict=True):
            parameter -= 1e-3 * gradient
        assert module.loss("task", batch) < loss
        own = dict(module.backbone.named_parameters())
        expected = linearized_call(
            lambda: module.backbone.image_features(batch["images"]),
            module.backbone,
            {name: own[name] for name in names},
            {name: torch.zeros_like(own[name]) for name in names},
        )
        assert torch.equal(module.output(lambda: module.backbone.image_features(batch["images"])), expected)


@pytest.mark.parametrize("method", often(["tangent_lora", "tangent"], "tangent_lora"))
def test_the_coefficient_grid_costs_one_pass_per_task_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    calls: list[str] = []
    original = ClipBackbone.image_features
    monkeypatch.setattr(ClipBackbone, "image_features", lambda *args: calls.append("") or original(*args))
    grid = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    rules = {"chosen": {"class_path": "validated", "init_args": {"grid": grid}}}
    argv = [*FIT[:-1], json.dumps(rules), "--model.method", method, "--model.learning_rate", "0.003"]
    rows, passes = {}, {}
    for how in ("together", "one by one"):
        if how == "one by one":
            monkeypatch.setattr("fusionlab.search.validation.linear_tasks", lambda *args: ())
        calls.clear()
        assert main([*argv, "--trainer.default_root_dir", str(tmp_path / how)]) == 0
        rows[how], passes[how] = rows_of(tmp_path / how / "results.json"), len(calls)
    assert rows["together"] == rows["one by one"]
    assert {row["scaling_coefficients"]["signs"] for row in rows["together"] if row["rule"]} != {0.0}
    # one by one: each coefficient runs the network on both tasks' one batch
    assert passes["together"] <= passes["one by one"] - 2 * len(grid) + 2 * len(TASKS)


def test_diagnostics_of_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--fusion.diagnostics.grid_size", "3", "--fusion.diagnostics.num_batches", "1"]
    argv = [*FIT, "--model.method", "tangent_lora", *wanted]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "results.json").is_file()
    lines = (tmp_path / "run" / "diagnostics" / "plane.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 3
    assert (tmp_path / "run" / "plots" / "plane_disentanglement.png").is_file()
    place = argv.index("--data.tasks")
    alone = [*argv[: place + 1], "[digits]", *argv[place + 2 :], "--trainer.default_root_dir", str(tmp_path / "alone")]
    assert main(alone) == 2
    assert "need two tasks or more, got digits" in capsys.readouterr().err
    assert not (tmp_path / "alone").exists()

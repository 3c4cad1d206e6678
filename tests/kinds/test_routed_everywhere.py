"""WEMoE in ``fit``, ``fuse``, ``sweep``, ``test``, ``predict`` and Python: one model, weights of each sample's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusionlab
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter
from fusionlab.adapters.routed import LowRankExperts, RoutedWeights
from fusionlab.commands.push import files_to_push
from fusionlab.errors import InputError
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.layout import ROUTED, ROUTED_OWN
from fusionlab.samplers import derive_seed
from fusionlab.search import Adamerging, ValidationProblem, Wemoe
from fusionlab.search.adamerging import entropy

TASKS, IMAGE = ["digits", "signs"], 32
SMALL = ["--data.max_samples", "16", "--data.eval_batch_size", "8", "--data.batch_size", "4"]
LAYERS = ["--model.target_modules", "[q_proj, v_proj, fc1, fc2]"]
STEPS = {"num_steps": 3, "batch_size": 4, "learning_rate": 0.05}


def of(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


RULES: dict[str, Any] = {
    "wemoe": of("wemoe", **STEPS),
    "published": of("wemoe", **STEPS, inputs="test"),
    "adamerging": of("adamerging", num_steps=1, batch_size=4, inputs="test"),
}
METHODS = ["lora", *(pytest.param(each, marks=pytest.mark.slow) for each in ("l_lora", "full"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, fitted = tmp_path_factory.mktemp("runs"), {}

    def folder(method: str) -> Path:
        if method not in fitted:
            argv = ["fit", "--model.method", method, "--data.tasks", json.dumps(TASKS), *SMALL]
            argv += [] if method == "full" else LAYERS
            argv += ["--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"]
            argv += ["--model.learning_rate", "0.001" if method == "full" else "0.01"]
            argv += ["--fusion.rules", json.dumps(RULES), "--trainer.default_root_dir", str(root / method)]
            assert main(argv) == 0
            fitted[method] = root / method
        return fitted[method]

    return folder


def rows_of(path: Path, rule: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    return {row["task"]: row for row in rows if row["rule"] == rule and row["denominator"] != "full"}


@pytest.mark.parametrize("method", METHODS)
def test_fit_scores_it_as_test_does_from_its_folder(method: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    folder, output = run(method), tmp_path / "rows.json"
    rows = rows_of(folder / "results.json", "wemoe")
    assert list(rows) == TASKS
    for row in rows.values():
        assert row["task_known"] is False
        assert row["routed"]["num_mlps"] == 5
        assert row["search"] == {"num_samples": 2 * 12, "num_labels": 0, "passes": 1.0}
    argv = ["test", "--model.method", method, "--data.tasks", json.dumps(TASKS), *SMALL, "--output", str(output)]
    assert main([*argv, "--model.weights", str(folder / "fused" / "wemoe")]) == 0
    tested = rows_of(output, "wemoe")
    assert {task: row["value"] for task, row in tested.items()} == {task: row["value"] for task, row in rows.items()}
    record = json.loads((folder / "fused" / "wemoe" / "fusion.json").read_text())
    assert len(record["search"]["scores"]) == STEPS["num_steps"]
    card = (folder / "fused" / "wemoe" / "README.md").read_text()
    assert "Experts and routers on top of `tiny-clip`" in card
    assert "No stock library reads them" in card
    assert "from_pretrained" not in card
    assert files_to_push(folder / "fused" / "wemoe") == ["README.md", "fusion.json", ROUTED_OWN, ROUTED]


def test_rows_say_that_test_inputs_were_looked_at(run: Callable[[str], Path]) -> None:
    for name in ("published", "adamerging"):
        for row in rows_of(run("lora") / "results.json", name).values():
            assert row["search"]["split"] == "test"
            assert row["search"]["num_labels"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_fuse_finds_and_writes_what_fit_does(
    method: str, run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(method)
    inside = next(path for path in (folder / "adapters", folder / "finetuned") if path.is_dir())
    recipe: dict[str, Any] = {
        "base": "tiny-clip",
        "finetuned": {task: str(inside / task) for task in TASKS},
        "rule": RULES["wemoe"],
        "model": "ClipModule",
        "data": of("ImageTasks", tasks=TASKS, max_samples=16, eval_batch_size=8),
        "output": str(tmp_path / "out"),
    }
    fusionlab.fuse_checkpoints(recipe | {"dry_run": True})
    assert "looks at        train samples: 16 of digits, 16 of signs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    fusionlab.fuse_checkpoints(recipe)
    for name in (ROUTED, ROUTED_OWN):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "fused" / "wemoe" / name).read_bytes()
    one, other = (json.loads((at / "fusion.json").read_text()) for at in (tmp_path / "out", folder / "fused" / "wemoe"))
    for key in ("rule", "base_hash", "routed", "norms", "scaling_coefficients"):
        assert one[key] == other[key], key
    with pytest.raises(InputError, match=r"dtype: wemoe writes experts and routers over the base as it is"):
        fusionlab.fuse_checkpoints(recipe | {"dtype": "bfloat16", "output": str(tmp_path / "other")})
    with pytest.raises(InputError, match="rule wemoe looks at data; give model and data"):
        fusionlab.fuse_checkpoints({**recipe, "model": None, "data": None, "output": str(tmp_path / "other")})
    with pytest.raises(InputError, match="no task vector"):
        fusionlab.fuse("average", fusionlab.load_backbone("tiny-clip"), finetuned={"a": str(tmp_path / "out")})
    with pytest.raises(InputError, match="no task vector"):
        fusionlab.fuse_checkpoints(
            {"base": "tiny-clip", "finetuned": {"a": str(tmp_path / "out")}, "rule": "average", "output": "never"}
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sweep_finds_the_same(method: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    rules = json.dumps({"wemoe": RULES["wemoe"]})
    argv = ["sweep", "--runs", json.dumps([str(run(method))]), "--rules", rules, "--output", str(tmp_path / "s")]
    assert main(argv) == 0
    swept, own = (rows_of(path / "results.json", "wemoe") for path in (tmp_path / "s", run(method)))
    assert {task: row["value"] for task, row in swept.items()} == {task: row["value"] for task, row in own.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_alone_what_it_is_in_a_batch(method: str, run: Callable[[str], Path]) -> None:
    """Up to the rounding of another batch size; and loaded weights give the bits of those that were made."""
    folder = run(method)
    inside = next(path for path in (folder / "adapters", folder / "finetuned") if path.is_dir())
    module, data = fusionlab.ClipModule("tiny-clip"), fusionlab.ImageTasks(TASKS, max_samples=16, image_size=IMAGE)
    data.setup("fit")
    module.prepare_tasks(data.tasks)
    weights = {task: fusionlab.load(inside / task) for task in TASKS}
    finetuned = Finetuned(module, {task: getattr(each, "weights", each) for task, each in weights.items()})
    problem = ValidationProblem(tuple(TASKS), finetuned, module, data, lambda rules: [])
    made = finetuned.make(finetuned.plan(Wemoe(**STEPS).search(problem).rule, TASKS))
    loaded = fusionlab.load(folder / "fused" / "wemoe").weights
    assert isinstance(made, RoutedWeights)
    assert isinstance(loaded, RoutedWeights)
    assert isinstance(loaded.rest, Adapter) == (method != "full")
    assert all(isinstance(each, LowRankExperts) == (method != "full") for each in loaded.experts.values())
    images = torch.cat([data.splits[task]["test"].batch(torch.arange(6))["images"] for task in TASKS])
    with torch.no_grad(), module.use(loaded):
        together = module.logits("signs", images)
        alone = torch.cat([module.logits("signs", image[None]) for image in images])
    with torch.no_grad(), module.use(made):
        assert torch.equal(module.logits("signs", images), together)
    assert (together - module.logits("signs", images)).abs().max() > 0.01
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-4)  # logits of up to 100, float32


def test_predict_reads_the_folder(run: Callable[[str], Path], tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in" / "a.png")
    argv = ["predict", "--model.weights", str(run("lora") / "fused" / "wemoe"), "--data.tasks", "[signs]"]
    assert main([*argv, "--data.images", str(tmp_path / "in"), "--output", str(tmp_path / "out.csv")]) == 0
    assert "a.png" in (tmp_path / "out.csv").read_text()


def test_another_base_or_method_is_refused(run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("lora") / "fused" / "wemoe"
    argv = ["test", "--data.tasks", json.dumps(TASKS), *SMALL, "--model.weights", str(folder)]
    assert main([*argv, "--model.method", "tangent_lora"]) == 2
    assert "has weights of its own for every sample, which do not act to first order" in capsys.readouterr().err
    module = fusionlab.ClipModule("tiny-clip")
    with torch.no_grad():
        module.base_model.vision_model.encoder.layers[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(InputError, match=r"was made for another base .'tiny-clip'.: its experts hold on that one only"):
        module._load(folder)


def test_descent_is_on_the_entropy_of_each_tasks_inputs(run: Callable[[str], Path]) -> None:
    """Its first score is task arithmetic's, on the inputs that its order gives."""
    module, data = fusionlab.ClipModule("tiny-clip"), fusionlab.ImageTasks(TASKS, max_samples=16, image_size=IMAGE)
    data.setup("fit")
    module.prepare_tasks(data.tasks)
    finetuned = Finetuned(module, {task: fusionlab.load(run("lora") / "adapters" / task) for task in TASKS})
    problem = ValidationProblem(tuple(TASKS), finetuned, module, data, lambda rules: [])
    found = Wemoe(num_steps=2, batch_size=4).search(problem)
    arithmetic = finetuned.make(finetuned.plan(fusionlab.rules.TaskArithmetic(0.3), TASKS))
    total = 0.0
    for task in TASKS:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(derive_seed("inputs", task)))
        batch = data.splits[task]["train"].batch(order[:4])
        with torch.no_grad(), module.use(arithmetic):
            total += entropy(module.scored_classes(task, batch)[0]).item()
    assert found.scores["0"] == pytest.approx(-total / 2, abs=1e-5)
    assert found.rule == Wemoe(num_steps=2, batch_size=4).search(problem).rule  # to the bit, by the hash of its routers
    assert found.rule != Wemoe(num_steps=2, batch_size=4, seed=1).search(problem).rule


REFUSED: dict[str, tuple[list[str], str]] = {
    "no MLP": ([], "no MLP was trained: it routes modules called mlp or DenseReluDense"),
    "one task": ([*LAYERS, "--data.tasks", "[digits]"], "wemoe weighs the experts of several tasks, got 1"),
    "first order": (
        [*LAYERS, "--model.method", "tangent_lora"],
        "models of method tangent_lora act to first order about the base only",
    ),
    "rounded": ([*LAYERS, "--fusion.dtype", "bfloat16"], "rules wemoe make experts and routers, which are not rounded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_before_training(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, told = REFUSED[case]
    argv = ["fit", *SMALL, "--trainer.default_root_dir", str(tmp_path / "run")]
    argv += [] if case == "one task" else ["--data.tasks", json.dumps(TASKS)]
    argv += ["--fusion.rules", "[wemoe]", "--trainer.max_steps", "1", *more]
    assert main(argv) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_steps": 0}, "wemoe: num_steps, batch_size and learning_rate must be positive, got 0"),
        ({"num_layers": 3}, "wemoe.num_layers: expected 1 or 2, got 3"),
        ({"inputs": "validation"}, "wemoe.inputs: expected train or test, got 'validation'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        Wemoe(**arguments)
    with pytest.raises(InputError, match=r"adamerging\.inputs: expected validation or test, got 'train'"):
        Adamerging(inputs="train")  # type: ignore[arg-type]


def test_what_it_says_that_it_took_is_what_it_took(run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that were looked at, each counted once, and how often a model was run over them; no labels are read."""
    module = fusionlab.ClipModule("tiny-clip")
    data = fusionlab.ImageTasks(TASKS, max_samples=16, image_size=IMAGE)
    data.setup("fit")
    module.prepare_tasks(data.tasks)
    finetuned = Finetuned(module, {task: fusionlab.load(run("lora") / "adapters" / task) for task in TASKS})
    problem = ValidationProblem(tuple(TASKS), finetuned, module, data, lambda rules: [])
    seen: list[tuple[str, int]] = []
    scored = module.scored_classes

    def counted(task: str, batch: dict[str, Any]) -> Any:
        seen.extend((task, int(index)) for index in batch["index"])
        return scored(task, {**batch, "labels": None})

    monkeypatch.setattr(module, "scored_classes", counted)
    found = Wemoe(num_steps=5, batch_size=6).search(problem)
    assert found.num_samples == len(set(seen)) == 32
    assert found.num_labels == 0
    assert found.passes == len(seen) / len(set(seen)) == 60 / 32
    assert problem.training.cost == pytest.approx(60 / 32)

"""`sweep` over runs of a T5: its points are what fuse and test, or the fused adapter by itself, give."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import fusionlab
from fusionlab.__main__ import main
from fusionlab.adapters import combine, load_adapter
from fusionlab.backbones import ASSETS
from fusionlab.commands.parser import parse
from fusionlab.commands.sweep import scores
from fusionlab.commands.sweep.choosing import share_of_all
from fusionlab.commands.sweep.command import SWITCHES
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.identity import Point
from fusionlab.commands.sweep.ledger import Ledger
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.worker import RunWorker
from fusionlab.evaluation import score_candidates
from fusionlab.rules import TaskArithmetic

# PEFT asks transformers for a property under its old name
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.slow,  # two sweeps of a T5, minutes
]

TASKS = ["sentiment", "entailment", "similarity"]  # two of label words, and a score that is generated
METHODS = ["lora", "tangent_lora"]
RECIPE: dict[str, Any] = {
    "fit": {
        "model": {"class_path": "T5Module", "init_args": {"max_new_tokens": 4, "learning_rate": 0.02}},
        "data": {"class_path": "TextTasks", "init_args": {"tasks": TASKS, "max_samples": 64, "eval_batch_size": 64}},
        "trainer": {"max_steps": 10, "enable_progress_bar": False},
    },
    "methods": METHODS,
    "by_method": {"lora": {"model": {"init_args": {"learning_rate": 0.003}}}},
    "subsets_per_size": 1,
    "rules": {
        "average": "average",
        "task_arithmetic": "task_arithmetic",
        "lorahub": {"class_path": "lorahub", "init_args": {"budget": 3, "num_samples": 8}},
    },
    "scaling_coefficients": [0.0, 0.5, 1.0],
    "protocols": ["strict", "published"],
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep-t5")
    recipe = {**RECIPE, "output": str(root / "all")}
    recipe["fit"]["data"]["init_args"]["cache_dir"] = str(root / "cache")
    (root / "all.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sweep", "--config", str(root / "all.yaml")]) == 0
    return root / "all"


def points_of(output: Path, **wanted: Any) -> list[dict[str, Any]]:
    records = [json.loads(path.read_text()) for path in (output / "ledger" / "points").rglob("*.json")]
    records = [each for each in records if each["kind"] == "point"]
    return [each for each in records if all(each[field] == value for field, value in wanted.items())]


def values_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By task, of its first metric."""
    found: dict[str, float] = {}
    for row in rows:
        found.setdefault(row["task"], row["value"])
    return found


def test_every_point_is_there(swept: Path) -> None:
    tested = {(each["method"], each["rule"], len(each["fused_tasks"])) for each in points_of(swept, split="test")}
    assert tested == {(method, rule, size) for method in METHODS for rule in RECIPE["rules"] for size in (2, 3)}
    metrics = {(row["task"], row["metric"]) for each in points_of(swept) for row in each["values"]}
    assert metrics == {("sentiment", "accuracy"), ("entailment", "accuracy"), ("similarity", "spearman")}
    content = json.loads((swept / "sweep.json").read_text())
    assert (content["backbone"], set(content["single_task"]["lora-seed42"]["values"])) == ("tiny-t5", set(TASKS))
    assert len(json.loads((swept / "results.json").read_text())["rows"]) == 2 * len(METHODS) * 3 * 2 * len(TASKS)
    assert main(["report", str(swept), "--output", str(swept / "report")]) == 0


def test_adamerging_needs_classes(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adamerging = {"entropy": {"class_path": "adamerging", "init_args": {"num_steps": 1, "batch_size": 4}}}
    recipe = {**RECIPE, "output": str(tmp_path / "out"), "methods": ["lora"], "rules": adamerging}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sweep", "--config", str(tmp_path / "recipe.yaml"), "--dry_run"]) == 2
    expected = (
        "fusionlab: rules entropy need tasks with classes or label words, and similarity has a score as its answer"
    )
    assert capsys.readouterr().err.startswith(expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "value"), [(2, 1.0), (3, 0.5), (3, 1.0)])
def test_a_point_is_fuse_and_test(swept: Path, tmp_path: Path, size: int, value: float) -> None:
    of = points_of(swept, method="lora", rule="task_arithmetic", split="test")
    [point] = [
        each
        for each in of
        if len(each["fused_tasks"]) == size and set(each["scaling_coefficients"].values()) == {value}
    ]
    adapters = {task: str(swept / "runs" / "lora-seed42" / "adapters" / task) for task in point["fused_tasks"]}
    argv = ["fuse", "--base", str(ASSETS / "tiny-t5"), "--finetuned", json.dumps(adapters), "--rule"]
    argv += [json.dumps({"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": value}})]
    assert main([*argv, "--output", str(tmp_path / "fused")]) == 0
    argv = ["test", "--model", "T5Module", "--model.max_new_tokens", "4", "--data", "TextTasks"]
    argv += ["--data.tasks", json.dumps(TASKS), "--data.max_samples", "64", "--data.eval_batch_size", "64"]
    argv += ["--data.cache_dir", str(tmp_path / "cache"), "--model.weights", str(tmp_path / "fused")]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "test")]) == 0
    rows = json.loads((tmp_path / "test" / "results.json").read_text())["rows"]
    assert values_of(rows) == values_of(point["values"])
    assert {row["data_version"] for row in rows} == {row["data_version"] for row in point["values"]}


@pytest.mark.parametrize("method", METHODS)
def test_every_coefficient_is_the_fused_adapter_by_itself(swept: Path, method: str) -> None:
    recipe = parse(SweepRecipe, ["--config", str(swept.with_suffix(".yaml"))], "sweep", SWITCHES)
    sweep = Sweep(recipe)
    [source] = [each for each in sweep.sources if each.method == method]
    finetuned, module = sweep.finetuned(source), sweep.bench.module
    assert finetuned.is_linearized is (method == "tangent_lora")
    adapters = {task: load_adapter(swept / "runs" / source.name / "adapters" / task) for task in TASKS}
    different = set()
    for rule in ("task_arithmetic", "lorahub"):
        points = points_of(swept, method=method, rule=rule, fused_tasks=TASKS)
        assert points
        for point in points:
            with module.use(combine(adapters, {"*": point["scaling_coefficients"]})):
                rows = fusionlab.evaluate(module, sweep.bench.data, TASKS, point["split"])
            assert values_of(rows) == values_of(point["values"]), point["rule_config"]
            different.add(tuple(values_of(rows).values()))
    assert len(different) > 2


def test_tangent_models_are_scored_together_but_where_answers_are_generated(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(parse(SweepRecipe, ["--config", str(swept.with_suffix(".yaml"))], "sweep", SWITCHES))
    [source] = [each for each in sweep.sources if each.method == "tangent_lora"]
    apart: list[str] = []

    def score_apart(module: Any, data: Any, candidates: dict[str, Any], split: str) -> Any:
        apart.extend(task for each in candidates.values() for task in each.tasks)
        return score_candidates(module, data, candidates, split)

    monkeypatch.setattr(scores, "score_candidates", score_apart)
    fresh = RunWorker(
        source, sweep.finetuned(source), sweep.identity(source), sweep.bench, Ledger(tmp_path / "ledger", 60)
    )
    values = (0.1, 0.4, 0.7)
    points = [Point("by hand", TaskArithmetic(value), tuple(TASKS), "test", tuple(TASKS)) for value in values]
    found = fresh.score(points)
    assert apart == ["similarity"] * len(values)
    assert len({tuple(row["value"] for row in rows) for rows in found}) > 1
    records = list(fresh.ledger.records())
    # a pass of each of three task vectors over two of three tasks for all, one of each model over the third
    assert sum(record["cost"]["passes"] for record in records) == pytest.approx((3 * 2 + len(values)) / 3)
    apart.clear()
    fresh.score([Point("by hand", TaskArithmetic(0.2), tuple(TASKS), "test", tuple(TASKS))])
    assert apart == TASKS  # one model takes one pass, fewer than its task vectors would


def test_published_choice_where_a_single_task_score_is_zero() -> None:
    values = {"a": 0.4, "b": 0.3, "c": 0.1}
    rows = [{"task": task, "metric": "accuracy", "value": value} for task, value in values.items()]
    assert share_of_all(rows, {"a": 0.8, "b": 0.6, "c": 0.4}) == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert share_of_all(rows, {"a": 0.8, "b": 0.0, "c": 0.4}) == pytest.approx((0.5 + 0.25) / 2)
    assert share_of_all(rows, {"a": 0.0, "b": 0.0, "c": 0.0}) == pytest.approx(0.8 / 3)

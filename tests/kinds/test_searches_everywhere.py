"""Rules that look at data find the same in ``fit`` and in ``sweep``, look at validation only, and say what they saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fusionlab
from fusionlab.__main__ import main
from fusionlab.commands.sweep.sources import RunSource, load_finetuned, run_config
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.rules import TaskArithmetic
from fusionlab.search import Search, ValidationProblem, complete, rule_or_search
from fusionlab.search.workbench import workbench


def of(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


SEARCHES: dict[str, Any] = {
    "open_trim": of("trim", density=0.5, rule="task_arithmetic"),
    "lorahub": of("lorahub", budget=4, num_samples=5),
    "multiplier": of("metagpt_multiplier", grid=[0.5, 1.0]),
    "multiplier_layer": of("metagpt_multiplier", scope="layer", grid=[0.5, 1.5]),
    "tall": "tall",
    "adamerging": of("adamerging", num_steps=2, batch_size=4, learning_rate=0.1),
    "adamerging_layer": of("adamerging", scope="layer", num_steps=2, batch_size=4, learning_rate=0.1),
}
ON_TRAINING: dict[str, Any] = {  # unlabelled inputs; not of what acts to first order
    "regmean": of("regmean", num_samples=6),
    "regmean_plus_plus": of("regmean_plus_plus", num_samples=4),
    "fisher": of("fisher", num_samples=3),
}
CLIP = ("ClipModule", ["digits", "signs"], [])
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "clip lora": CLIP,
    "clip full": (CLIP[0], CLIP[1], ["--model.method", "full"]),
    "clip tangent": (CLIP[0], CLIP[1], ["--model.method", "tangent_lora"]),
    "t5 l_lora": ("T5Module", ["sentiment", "inference"], ["--model.method", "l_lora"]),
}


def searches_of(case: str) -> dict[str, Any]:
    return SEARCHES if "tangent" in case else SEARCHES | ON_TRAINING


CELLS = [pytest.param(case, marks=[] if case == "clip lora" else [pytest.mark.slow]) for case in CASES]


@pytest.fixture(scope="module", params=CELLS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tasks, more = CASES[request.param]
    root = tmp_path_factory.mktemp("runs") / "run"
    data = "TextTasks" if model == "T5Module" else "ImageTasks"
    argv = ["fit", "--model", model, *more, "--data", data, "--data.tasks", json.dumps(tasks)]
    argv += ["--data.max_samples", "16", "--data.eval_batch_size", "8", "--data.batch_size", "4"]
    argv += ["--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"]
    rules = json.dumps(searches_of(request.param))
    assert main([*argv, "--fusion.rules", rules, "--trainer.default_root_dir", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def swept(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sweep") / "out"
    rules = {name: rule for name, rule in (SEARCHES | ON_TRAINING).items() if (run / "fused" / name).is_dir()}
    argv = ["sweep", "--runs", json.dumps([str(run)]), "--rules", json.dumps(rules), "--output", str(output)]
    assert main(argv) == 0
    return output


def test_fit_and_sweep_find_the_same(run: Path, swept: Path) -> None:
    own, others = (json.loads((folder / "results.json").read_text())["rows"] for folder in (run, swept))
    records = [json.loads(path.read_text()) for path in (swept / "ledger" / "points").rglob("*.json")]
    found = {record["rule"]: record for record in records if record["kind"] == "search"}
    names = {path.name for path in (run / "fused").iterdir()}
    assert names in ({*SEARCHES}, {*SEARCHES, *ON_TRAINING})
    for name in names:
        fused = json.loads((run / "fused" / name / "fusion.json").read_text())
        rows = [row for row in own if row["rule"] == name]
        values = {row["task"]: row["value"] for row in others if row["rule"] == name and row["denominator"] == "own"}
        assert values == {row["task"]: row["value"] for row in rows}, name
        looked = fused["search"]
        expected = {name: 2 * rule["init_args"]["num_samples"] for name, rule in ON_TRAINING.items()} | {"lorahub": 10}
        assert looked["num_samples"] == expected.get(name, 32), name
        unlabelled = "adamerging" in name or name in ON_TRAINING
        assert looked["num_labels"] == (0 if unlabelled else looked["num_samples"]), name
        assert len(looked["scores"]) > 1 or name in ON_TRAINING, name
        assert {json.dumps(row["search"]) for row in rows} == {
            json.dumps({k: looked[k] for k in looked if k != "scores"})
        }
        if name in found:  # open coefficients have points of their own there
            assert found[name]["rule_config"] == fused["rule"], name
            assert {key: found[name][key] for key in looked} == looked, name


@pytest.mark.slow
def test_statistics_are_found_again_where_a_sweep_stopped_before_their_points(
    run: Path, swept: Path, tmp_path: Path
) -> None:
    """A record of a search holds no tensors: what was to be scored by them is fused from the same ones all the same."""
    names = [name for name in ON_TRAINING if (run / "fused" / name).is_dir()]
    if not names:
        pytest.skip("refused for what acts to first order")
    shutil.copytree(swept, tmp_path / "out")
    records = {path: json.loads(path.read_text()) for path in (tmp_path / "out" / "ledger" / "points").rglob("*.json")}
    points = {path: record for path, record in records.items() if record["kind"] == "point" and record["rule"] in names}
    assert len(points) == len(names)
    for path in points:
        path.unlink()
    argv = ["sweep", "--runs", json.dumps([str(run)]), "--output", str(tmp_path / "out")]
    assert main([*argv, "--rules", json.dumps({name: ON_TRAINING[name] for name in names})]) == 0
    for path, record in points.items():
        again = json.loads(path.read_text())
        assert again | {"cost": {}} == record | {"cost": {}}


class Poisoned:
    """A split whose samples must not be looked at."""

    data_version = reading_version = "poisoned"
    evaluation_order = None

    def __init__(self, split: Any) -> None:
        self.size = len(split)

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Any) -> Any:
        raise AssertionError("a search looked at samples")


@pytest.fixture(scope="module")
def poisoned(run: Path) -> tuple[Any, Any, Finetuned]:
    """The run's module and data, and its fine-tuned weights."""
    config = run_config(run)
    source = RunSource(config["model"]["init_args"]["method"], 42, (run,))
    bench = workbench(config, [run])
    finetuned = load_finetuned(source, bench)
    return bench.module, bench.data, finetuned


@pytest.mark.parametrize("name", SEARCHES | ON_TRAINING)
def test_only_the_split_that_it_says_is_looked_at(
    name: str, run: Path, poisoned: tuple[Any, Any, Finetuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (run / "fused" / name).is_dir():
        pytest.skip("refused for what acts to first order")
    module, data, finetuned = poisoned
    others = ("train", "test") if name in SEARCHES else ("validation", "test")
    for splits in data.loaded.values():
        for split in others:
            monkeypatch.setitem(splits, split, Poisoned(splits[split]))

    def rows(rules: Any) -> list[list[dict[str, Any]]]:
        found: list[list[dict[str, Any]]] = []
        for rule in rules:
            found.append([])
            for weights, tasks in finetuned.acting(finetuned.plan(rule, finetuned.tasks), finetuned.tasks):
                with module.use(weights):
                    found[-1] += fusionlab.evaluate(module, data, tasks, "validation")
        return found

    problem = ValidationProblem(finetuned.tasks, finetuned, module, data, rows)
    fused = json.loads((run / "fused" / name / "fusion.json").read_text())
    found = complete(rule_or_search((SEARCHES | ON_TRAINING)[name]), problem)
    assert found.scores == pytest.approx(fused["search"]["scores"], abs=1e-6)
    assert found.looked_at | {"scores": {}} == fused["search"] | {"scores": {}}


def test_a_rule_with_its_coefficients_looks_at_nothing() -> None:
    found = complete(TaskArithmetic(0.3), None)  # type: ignore[arg-type]
    assert (found.rule, found.scores, found.num_samples) == (TaskArithmetic(0.3), {}, 0)
    assert not isinstance(found.rule, Search)


NO_VALIDATION = {
    "open": ("task_arithmetic", ["ImageTasks", "ClipModule"], "r look at validation data, and digits has no valid"),
    "score": (of("adamerging"), ["TextTasks", "T5Module"], "r need tasks with classes or label words, and similarity"),
    "score, fisher": ("fisher", ["TextTasks", "T5Module"], "r need tasks with classes or label words, and similarity"),
    "first order": ("regmean", ["ImageTasks", "ClipModule"], "rules r: models of method tangent act to first order"),
}


@pytest.mark.parametrize("case", NO_VALIDATION)
def test_what_gives_nothing_to_look_at_is_refused_before_training(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, (data, model), expected = NO_VALIDATION[case]
    tasks = ["digits", "signs"] if data == "ImageTasks" else ["sentiment", "similarity"]
    if case == "open":
        from fusionlab.data.images import ImageTasks

        own = ImageTasks.setup

        def without(self: Any, stage: str | None = None) -> None:
            own(self, stage)
            self.loaded["digits"].pop("validation", None)

        monkeypatch.setattr(ImageTasks, "setup", without)
    argv = ["fit", "--data", data, "--model", model, "--data.tasks", json.dumps(tasks), "--data.max_samples", "16"]
    argv += ["--trainer.max_steps", "2", "--fusion.rules", json.dumps({"r": rule})]
    argv += ["--model.method", "tangent"] if case == "first order" else []
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()

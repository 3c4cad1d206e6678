"""`sweep` on tiny-clip: its numbers are those of fit, fuse and test; it resumes; it refuses what does not fit."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS
from fusionlab.commands.parser import parse
from fusionlab.commands.sweep import scores, worker
from fusionlab.commands.sweep.command import SWITCHES
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.errors import InputError
from fusionlab.evaluation import TangentOutputs
from fusionlab.reporting import protocols
from fusionlab.reporting.charts import LineChart
from fusionlab.reporting.protocols import Denominators, Score
from fusionlab.reporting.published import published_summaries
from fusionlab.reporting.sections import sections_of

ROOT = Path(__file__).parents[2]
TASKS = ["digits", "signs", "textures"]
DATA = {"tasks": TASKS, "max_samples": 40, "eval_batch_size": 40}
FIT: dict[str, Any] = {
    "model": {"class_path": "ClipModule", "init_args": {"learning_rate": 0.01}},
    "data": {"class_path": "ImageTasks", "init_args": DATA},
    "trainer": {"max_steps": 4, "enable_progress_bar": False},
}
RECIPE: dict[str, Any] = {
    "fit": FIT,
    "methods": ["lora", "tangent_lora"],
    "rules": {
        "average": "average",
        "task_arithmetic": "task_arithmetic",
        "metagpt": "metagpt",
        "ties": {"class_path": "ties", "init_args": {"density": 0.5}},
        "multiplier": {"class_path": "metagpt_multiplier", "init_args": {"grid": [1.0, 2.0]}},
        "lorahub": {"class_path": "lorahub", "init_args": {"budget": 3, "num_samples": 8}},
        "adamerging": {"class_path": "adamerging", "init_args": {"num_steps": 1, "scope": "layer"}},
    },
    "scaling_coefficients": [0.0, 0.5, 1.0],
    "protocols": ["strict", "published"],
}


def sweep(output: Path, **changes: Any) -> int:
    path = output.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**RECIPE, "output": str(output), **changes}))
    return main(["sweep", "--config", str(path)])


def ledger_of(output: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(path.read_text()) for path in (output / "ledger" / "points").rglob("*.json")]
    return {record["key"]: {name: value for name, value in record.items() if name != "cost"} for record in records}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sweep") / "all"
    assert sweep(output) == 0
    return output


def test_every_point_is_there(swept: Path) -> None:
    records = list(ledger_of(swept).values())
    subsets = {tuple(record["fused_tasks"]) for record in records if record["kind"] == "point"}
    assert subsets == {("digits", "signs"), ("digits", "textures"), ("signs", "textures"), tuple(TASKS)}
    points = [record for record in records if record["kind"] == "point"]
    found = {(r["method"], r["rule"], tuple(r["fused_tasks"])) for r in points if r["split"] == "test"}
    assert found == {(m, rule, s) for m in RECIPE["methods"] for rule in RECIPE["rules"] for s in subsets}
    assert all(len(r["values"]) == (3 if r["split"] == "test" else len(r["fused_tasks"])) for r in points)
    assert sum(record["kind"] == "search" for record in records) == 2 * 3 * 4
    assert sum(record["kind"] == "fit" for record in records) == 2
    assert not list((swept / "ledger" / "leases").iterdir())


CASES = {
    "pair, coefficient 0.5": ("lora", "task_arithmetic", TASKS[:2], 0.5),
    "all, ties": ("lora", "ties", TASKS, None),
    "tangent, coefficient 1": ("tangent_lora", "task_arithmetic", TASKS, 1.0),
    "tangent, metagpt": ("tangent_lora", "metagpt", TASKS, None),
}


FUSED_BY_FIT = {
    "task_arithmetic": {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": 1.0}},
    "metagpt": "metagpt",
}


@pytest.fixture(scope="module")
def separate_fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("separate")
    flags = ["--data.tasks", json.dumps(TASKS), "--data.max_samples", "40", "--data.eval_batch_size", "40"]
    flags += ["--trainer.max_steps", "4", "--trainer.enable_progress_bar", "false", "--model.learning_rate", "0.01"]
    for method in RECIPE["methods"]:
        argv = ["fit", *flags, "--model.method", method, "--fusion.rules", json.dumps(FUSED_BY_FIT)]
        assert main([*argv, "--trainer.default_root_dir", str(root / method)]) == 0
    return {method: root / method for method in RECIPE["methods"]}


def test_single_task_scores_of_tangents_are_the_fits_and_take_no_pass_of_their_own(
    swept: Path, separate_fits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "score_candidates", lambda *arguments: pytest.fail("a pass of its own"))
    runs = [str(separate_fits["tangent_lora"])]
    assert sweep(tmp_path / "tangents", runs=runs, rules={"average": "average"}, protocols=["strict"]) == 0
    [of_run] = json.loads((tmp_path / "tangents" / "sweep.json").read_text())["single_task"].values()
    of_sweep = json.loads((swept / "sweep.json").read_text())["single_task"]["tangent_lora-seed42"]
    rows = json.loads((separate_fits["tangent_lora"] / "results.json").read_text())["rows"]
    own = {row["task"]: row["value"] for row in rows if row["model"] == "finetuned" and row["split"] == "test"}
    assert of_run["values"] == of_sweep["values"] == own


@pytest.mark.parametrize("case", CASES)
def test_a_point_is_fit_and_fuse_and_test(
    case: str, swept: Path, separate_fits: dict[str, Path], tmp_path: Path
) -> None:
    method, rule, subset, value = CASES[case]
    weights = separate_fits[method] / "fused" / rule  # tangent models are fused in their run only
    if method == "lora":
        init_args = {"density": 0.5} if rule == "ties" else {"scaling_coefficient": value}
        weights = tmp_path / "fused"
        recipe = {
            "base": str(ASSETS / "tiny-clip"),
            "finetuned": {task: str(separate_fits[method] / "adapters" / task) for task in subset},
            "rule": {"class_path": rule, "init_args": init_args},
            "output": str(weights),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
    argv = ["test", "--data.tasks", json.dumps(TASKS), "--data.max_samples", "40", "--data.eval_batch_size", "40"]
    argv += ["--model.weights", str(weights), "--trainer.default_root_dir", str(tmp_path / "test")]
    argv += ["--model.method", method]
    assert main(argv) == 0
    rows = json.loads((tmp_path / "test" / "results.json").read_text())["rows"]
    [point] = [
        record
        for record in ledger_of(swept).values()
        if record["kind"] == "point" and record["split"] == "test"
        and (record["method"], record["rule"], record["fused_tasks"]) == (method, rule, subset)
        and (value is None or record["rule_config"]["init_args"]["scaling_coefficient"] == value)
    ]  # fmt: skip
    assert {row["task"]: row["value"] for row in rows} == {row["task"]: row["value"] for row in point["values"]}
    assert {row["data_version"] for row in rows} == {row["data_version"] for row in point["values"]}


def test_a_finished_point_is_never_computed_again(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (swept / "ledger" / "points").rglob("*.json")}
    summary = (swept / "sweep.json").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(scores, "score_candidates", fail)
    monkeypatch.setattr(TangentOutputs, "score", fail)
    assert sweep(swept) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (swept / "ledger" / "points").rglob("*.json")}
    assert (swept / "sweep.json").read_bytes() == summary


def test_strict_and_published_choose_as_they_say(swept: Path) -> None:
    content, records = json.loads((swept / "sweep.json").read_text()), list(ledger_of(swept).values())
    singles = content["single_task"]["lora-seed42"]["values"]
    known = Denominators(tuple(TASKS), singles)
    of = [r for r in records if r["kind"] == "point" and (r["method"], r["rule"]) == ("lora", "task_arithmetic")]

    def scores_on(split: str) -> list[Score]:
        found = [
            Score(tuple(r["fused_tasks"]), (r["rule_config"]["init_args"]["scaling_coefficient"],),
                  {row["task"]: row["value"] for row in r["values"]})
            for r in of if r["split"] == split and len(r["fused_tasks"]) == 2
        ]  # fmt: skip
        return sorted(found, key=lambda score: score.candidate)

    def line(protocol: str) -> dict[str, Any]:
        wanted = ("lora", "task_arithmetic", 2, protocol)
        lines = [x for x in content["summary"] if (x["method"], x["rule"], x["num_tasks"], x["protocol"]) == wanted]
        assert len(lines) == 1
        return lines[0]

    chosen = protocols.per_subset_best(scores_on("validation"), known, "abs_sub").candidates
    tested = {(score.fused_tasks, score.candidate): score for score in scores_on("test")}
    strict = protocols.summarize({subset: tested[subset, value] for subset, value in chosen.items()}, known)
    assert line("strict")["mean"] == strict.mean
    assert line("strict")["std_over_subsets"] == pytest.approx(strict.std)
    grid = [score for score in scores_on("test") if score.candidate[0] in RECIPE["scaling_coefficients"]]
    published = protocols.per_subset_best(grid, known, "own_all")
    assert line("published")["mean"] == published.mean
    assert published.mean["own_all"] >= strict.mean["own_all"]
    rows = json.loads((swept / "results.json").read_text())["rows"]
    assert {row["protocol"] for row in rows} == {"strict", "published"}
    values = {name: run["values"] for name, run in content["single_task"].items()}
    for row in rows:
        assert row["normalized"] == row["value"] / values[f"{row['method']}-seed42"][row["task"]]


def test_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sweep", "--output", str(tmp_path / "out"), "--fit", json.dumps(FIT), "--seeds", "[1, 2]", "--dry_run"]
    assert main([*argv, "--rules", "[average, task_arithmetic, lorahub]", "--subsets_per_size", "2"]) == 0
    out = capsys.readouterr().out
    assert f"points: about {round(2 * 2 * 3 * (1 + 6.5 + 2))};" in out  # methods, seeds, subsets (2 pairs, all), rules
    assert "estimated time" in out
    assert "floor: " in out
    assert list(tmp_path.iterdir()) == []


def test_report_of_a_sweep_and_its_run(swept: Path, tmp_path: Path) -> None:
    assert main(["report", str(swept), str(swept / "runs" / "lora-seed42"), "--output", str(tmp_path / "report")]) == 0
    page, text = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("html", "md"))
    for needed in (
        "coefficients chosen on validation",
        "These numbers flatter",
        "Cosine similarity",
        "LoRA, TIES",
        "passes over",
    ):
        assert needed in page
        assert needed in text
    assert page.count("<figure") == text.count("![") == len(list((tmp_path / "report" / "plots").glob("*.png")))
    line = next(x for x in json.loads((swept / "sweep.json").read_text())["summary"] if x["rule"] == "ties")
    assert f"| {line['mean']['own_sub']:.3f} ± {line['std_over_subsets']['own_sub']:.3f} | " in text
    strict = text[: text.index("These numbers flatter")]
    rest = re.findall(r"\| LoRA, TIES \|.*\| (\S+) \|$", strict, re.MULTILINE)
    assert len(rest) == 4  # own share and score, over fused and over all tasks
    assert all(float(found) >= 0 for found in rest)  # all three tasks are one subset: it has no spread


@pytest.mark.slow
def test_results_are_of_this_recipe_not_of_an_earlier_one_in_the_same_ledger(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path / "copy")
    rules = RECIPE["rules"] | {
        "ties": {"class_path": "ties", "init_args": {"density": 0.9}},
        "adamerging": {"class_path": "adamerging", "init_args": {"num_steps": 2, "scope": "layer"}},
    }
    assert sweep(tmp_path / "copy", rules=rules, scaling_coefficients=[0.0, 0.5]) == 0
    rows = json.loads((tmp_path / "copy" / "results.json").read_text())["rows"]
    for rule in ("ties", "adamerging", "task_arithmetic"):
        own = [row for row in rows if row["rule"] == rule]
        of = [(row["protocol"], row["method"], *row["fused_tasks"], row["task"], row["denominator"]) for row in own]
        assert of
        assert len(of) == len(set(of))


def test_a_search_costs_what_it_runs_itself_and_its_points(swept: Path) -> None:
    records = [json.loads(path.read_text()) for path in (swept / "ledger" / "points").rglob("*.json")]
    costs = json.loads((swept / "sweep.json").read_text())["costs"]
    passes = {}
    for rule in ("multiplier", "lorahub"):
        (line,) = (each for each in costs if (each["method"], each["rule"], each["num_tasks"]) == ("lora", rule, 3))
        own = [r for r in records if (r.get("rule"), r["method"]) == (rule, "lora") and r["fused_tasks"] == TASKS]
        assert line["points"] == len(own)
        for name in ("seconds", "fuse_seconds", "passes"):
            assert line[name] == pytest.approx(sum(record["cost"][name] for record in own))
            assert line[name] > 0
        passes[rule] = {(record["kind"], record.get("split")): record["cost"]["passes"] for record in own}
    assert (passes["multiplier"]["search", None], passes["multiplier"]["point", "validation"]) == (0, 1)
    assert passes["lorahub"]["search", None] == pytest.approx(3 * 8 / 40)  # three looks at 8 of each task's 40 samples


def released(folder: Path) -> Path:
    """Two models' worth of files as arXiv 2310.04742 released them: two subsets of two tasks, two coefficients."""
    model = folder / "raw" / "tiny"
    model.mkdir(parents=True)
    singles = [f"{task},{mode},6000,0.5" for task in ("A", "B", "C") for mode in ("fullfinetuned", "lora")]
    (model / "single_task.csv").write_text("\n".join(["task,finetune_mode,step,accuracy", *singles]))
    scores = ["dataset:0,dataset:1,A,B,C", "A,B,0.4,0.3,0.2", "A,C,0.2,0.1,0.0"]
    (model / "lora_average_num-tasks=2.csv").write_text("\n".join(scores))
    header = "dataset:0,dataset:1,scaling_factor,A,B,C"
    searched = [header, "A,B,0.5,0.5,0.5,0.5", "A,B,1.0,0.1,0.1,0.1", "A,C,0.5,0.0,0.0,0.0", "A,C,1.0,0.25,0.25,0.25"]
    (model / "lora_task_addition_num-tasks=2.csv").write_text("\n".join(searched))
    return folder


def test_report_lays_published_curves_over_those_of_the_same_method(swept: Path, tmp_path: Path) -> None:
    sections = sections_of(swept, published_summaries(released(tmp_path)))
    drawn = {part.name: part.panels for section in sections for part in section.parts if isinstance(part, LineChart)}
    assert any("Dashed: the published averages of arXiv 2310.04742" in text for each in sections for text in each.text)
    for name, mean, best in (("own_sub", 0.45, 0.75), ("own_all", 0.4, 0.75)):
        panels = next(panels for key, panels in drawn.items() if key.endswith(f"strict-{name}"))
        dashed = {line.label: [(at.x, at.y) for at in line.points] for line in panels["LoRA"] if line.dashed}
        assert dashed == {
            "published average (tiny)": [(2, pytest.approx(mean))],
            "published task arithmetic (tiny)": [(2, pytest.approx(best))],
        }
        assert not any(line.dashed for line in panels["tangent LoRA"])


# what is refused


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def test_a_ledger_of_other_data(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(swept / "ledger" / "inputs", other / "ledger" / "inputs")
    fit = {**FIT, "data": {"class_path": "ImageTasks", "init_args": {**DATA, "max_samples": 30}}}
    assert sweep(other, fit=fit) == 2
    assert "was made with other inputs: task digits test: '" in refused(capsys)
    assert not (other / "runs").exists()


@pytest.mark.parametrize("case", ["A₀", "base", "data", "twice", "unfinished"])
def test_runs_that_do_not_fit_together(
    case: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(swept / "runs" / "lora-seed42", run)
    runs, own = [str(run)], run / "adapters" / "signs" / "fusionlab.json"
    content = json.loads(own.read_text())
    expected = {
        "A₀": "started from different A₀ .*signs 0000",
        "base": "was made for another base",
        "data": "was scored on other data: digits test",
        "twice": "task 'digits' of lora-seed42 is in .* and in",
        "unfinished": "is not finished",
    }[case]
    if case == "A₀":
        own.write_text(json.dumps(content | {"a0_hash": "0" * 64}))
    elif case == "base":
        own.write_text(json.dumps(content | {"base_hash": "0" * 16}))
    elif case == "data":
        results = json.loads((run / "results.json").read_text())
        results["rows"][0]["data_version"] = "another"
        (run / "results.json").write_text(json.dumps(results))
    elif case == "twice":
        runs.append(str(swept / "runs" / "lora-seed42"))
    else:
        (run / "results.json").unlink()
    assert sweep(tmp_path / "out", runs=runs) == 2
    message = refused(capsys)
    assert re.search(expected, message), message
    assert not (tmp_path / "out").exists()


BAD = {
    "one task": ({"fit": {**FIT, "data": {"class_path": "ImageTasks", "init_args": {"tasks": ["digits"]}}}},
                 "at least two tasks, got digits"),
    "method": ({"methods": ["loar"]}, "no such method 'loar'; did you mean 'lora'"),
    "rule": ({"rules": ["metagtp"]}, "'metagtp': no such rule; did you mean 'metagpt'"),
    "size": ({"sizes": [4]}, "expected 2 to 3, the number of tasks, got 4"),
    "key": ({"seed": 3}, "unknown key 'seed'; did you mean 'seeds'"),
    "type": ({"seeds": "many"}, "seeds: expected .*, got 'many'"),
    "no run": ({"runs": ["nowhere"]}, "no config.yaml in 'nowhere'"),
    "reference": ({"full_reference": "nowhere"}, "no results.json in 'nowhere'"),
    "routers": ({"methods": ["lora"], "rules": ["average", "wemoe"]}, "wemoe: no MLP was trained.*q_proj"),
    "fit file": ({"fit": "nowhere.yaml"}, "no file 'nowhere.yaml'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, expected = BAD[case]
    assert sweep(tmp_path / "out", **changes) == 2
    message = refused(capsys)
    assert re.search(expected, message), message
    assert not (tmp_path / "out").exists()


def test_sampled_subsets_are_seeded_and_of_every_size() -> None:
    tasks = [str(number) for number in range(7)]
    recipe = SweepRecipe("out", subsets_per_size=3)
    subsets = recipe.subsets(tasks)
    assert [len(subset) for subset in subsets] == [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3 + [6] * 3 + [7]
    assert subsets == recipe.subsets(tasks) != SweepRecipe("out", subsets_per_size=3, subset_seed=1).subsets(tasks)
    by_size = SweepRecipe("out", subsets_per_size={2: 1, 3: 2}).subsets(tasks)
    assert [len(subset) for subset in by_size].count(2) == 1
    assert [len(subset) for subset in by_size].count(3) == 2
    assert [subset for subset in by_size if len(subset) > 3] == [
        subset for subset in SweepRecipe("out").subsets(tasks) if len(subset) > 3
    ]
    for wrong in (0, {2: 0}):
        with pytest.raises(InputError, match="subsets_per_size must be at least 1"):
            SweepRecipe("out", subsets_per_size=wrong)
    assert len(SweepRecipe("out").subsets(tasks)) == 120


@pytest.mark.parametrize("name", ["methods", "wemoe"])
def test_configs_of_all_rules_can_begin(name: str, tmp_path: Path) -> None:
    recipe = parse(SweepRecipe, ["--config", str(ROOT / "configs" / "sweep" / f"{name}.yaml")], "sweep", SWITCHES)
    Sweep(dataclasses.replace(recipe, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_configs_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = parse(SweepRecipe, ["--config", str(path)], "sweep", SWITCHES)
    assert {name: getattr(recipe, name) for name in yaml.safe_load(path.read_text())} == yaml.safe_load(
        path.read_text()
    )
    assert len(recipe.named_rules) >= (2 if path.stem == "wemoe" else 5)
    for method in recipe.methods:
        config = recipe.fit_config(method, 7, Path("root"))
        assert config["model"]["init_args"]["method"] == method
        assert config["model"]["class_path"] == ("CausalModule" if path.stem == "lm" else "ClipModule")
        assert (config["seed_everything"], config["fusion"]) == (7, {"rules": {}})

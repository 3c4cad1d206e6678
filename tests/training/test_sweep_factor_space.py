"""`sweep` with A and B fused apart: its points are those of `combine_factors`, labelled, and never delta_weight's."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fusionlab
from fusionlab import rules
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, combine, combine_factors, load_adapter
from fusionlab.commands.sweep.identity import Point, RunIdentity
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.errors import InputError
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.keys import key_of
from fusionlab.search.workbench import Workbench

TASKS = ["digits", "signs", "textures"]
DATA = {"tasks": TASKS, "max_samples": 40, "eval_batch_size": 40}
RECIPE: dict[str, Any] = {
    "fit": {
        "model": {"class_path": "ClipModule", "init_args": {"learning_rate": 0.02}},
        "data": {"class_path": "ImageTasks", "init_args": DATA},
        "trainer": {"max_steps": 6, "enable_progress_bar": False},
    },
    "methods": ["lora", "l_lora", "tangent_lora"],
    "subsets_per_size": 1,
    "rules": {
        "average": "average",
        "task_arithmetic": "task_arithmetic",
        "given": {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": 0.9}},
        "metagpt": "metagpt",
        "lines": {"class_path": "lines", "init_args": {"beta": 1.0}},
        "multiplier": {"class_path": "metagpt_multiplier", "init_args": {"grid": [1.0, 2.0]}},
        "lorahub": {"class_path": "lorahub", "init_args": {"budget": 3, "num_samples": 8}},
    },
    "scaling_coefficients": [0.0, 0.5, 1.0],
    "protocols": ["strict", "published"],
}


def sweep(output: Path, space: str, /, **changes: Any) -> int:
    path = output.with_name(f"{output.name}-{space}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**RECIPE, "output": str(output), "space": space, **changes}))
    return main(["sweep", "--config", str(path)])


def records_of(output: Path, space: str) -> list[dict[str, Any]]:
    records = [json.loads(path.read_text()) for path in (output / "ledger" / "points").rglob("*.json")]
    return [each for each in records if each["kind"] != "fit" and each.get("space", "delta_weight") == space]


def rows_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One output that delta_weight and then factor swept into, and what each wrote."""
    output = tmp_path_factory.mktemp("factor") / "both"
    found: dict[str, Any] = {"output": output}
    for space in ("delta_weight", "factor"):
        assert sweep(output, space) == 0
        found[space] = {"rows": rows_of(output), "sweep": json.loads((output / "sweep.json").read_text())}
    return found


@pytest.fixture(scope="module")
def prepared() -> tuple[Any, Any]:
    data = fusionlab.ImageTasks(**DATA)
    module = fusionlab.ClipModule()
    data.image_size = module.backbone.image_size
    data.setup()
    module.prepare_tasks(data.tasks)
    return module, data


def adapters_of(output: Path, method: str, tasks: list[str] = TASKS) -> dict[str, Adapter]:
    return {task: load_adapter(output / "runs" / f"{method}-seed42" / "adapters" / task) for task in tasks}


def values_of(record: dict[str, Any]) -> dict[str, float]:
    return {row["task"]: row["value"] for row in record["values"]}


POINTS = [("lora", TASKS), ("l_lora", TASKS), ("tangent_lora", TASKS)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "subset"), POINTS, ids=str)
def test_a_point_is_that_of_combine_factors(
    method: str, subset: list[str], both: dict[str, Any], prepared: tuple[Any, Any]
) -> None:
    module, data = prepared
    adapters, of = adapters_of(both["output"], method, subset), records_of(both["output"], "factor")
    points = [each for each in of if each["kind"] == "point" and each["split"] == "test"]
    points = [each for each in points if (each["method"], each["fused_tasks"]) == (method, subset)]
    assert {point["rule"] for point in points} == {f"{name} (factor)" for name in RECIPE["rules"]}
    for point in points:
        first, *_ = lambdas = point["scaling_coefficients"].values()
        names = first if isinstance(first, dict) else ["*"]
        by_task = list(zip(subset, lambdas, strict=True))
        coefficients = {
            name: {task: each[name] if isinstance(each, dict) else each for task, each in by_task} for name in names
        }
        fused = combine_factors(adapters, coefficients)
        with module.use(fused):
            rows = fusionlab.evaluate(module, data, split="test")
        assert {row["task"]: row["value"] for row in rows} == values_of(point), point["rule"]


@pytest.mark.slow
def test_trained_a_gives_other_weights_with_the_same_coefficients(both: dict[str, Any]) -> None:
    adapters = adapters_of(both["output"], "lora")
    base = {name: torch.zeros(shape.shape) for name, shape in adapters["digits"].task_vector().items()}
    for rule in (rules.TaskArithmetic(0.9), rules.Metagpt(), rules.Lines(1.0)):
        exact, apart = Finetuned(base, adapters), Finetuned(base, adapters, "factor")
        plan = apart.plan(rule, TASKS)
        assert plan == exact.plan(rule, TASKS)
        made = apart.make(plan)
        by_hand, sums = combine_factors(adapters, plan.coefficients), combine(adapters, plan.coefficients)
        assert (made.space, exact.make(plan).space) == ("factor", "delta_weight")
        for name, value in made.task_vector().items():
            assert torch.equal(value, by_hand.task_vector()[name])
            assert torch.equal(exact.make(plan).task_vector()[name], sums.task_vector()[name])
            difference = value - sums.task_vector()[name]
            assert difference.norm() > 0.01 * sums.task_vector()[name].norm()


@pytest.mark.slow
def test_the_start_is_part_of_the_identity_where_it_acts(both: dict[str, Any]) -> None:
    adapters = adapters_of(both["output"], "lora")
    moved = {task: replace(adapter, seed=7, a0_hash="") for task, adapter in adapters.items()}
    for space, same in (("delta_weight", True), ("factor", False)):
        one, other = (Finetuned({}, of, space).hash("signs") for of in (adapters, moved))
        assert (one == other) is same


@pytest.mark.slow
def test_the_space_is_part_of_the_identity_but_for_delta_weight(
    both: dict[str, Any], prepared: tuple[Any, Any], tmp_path: Path
) -> None:
    module, data = prepared
    adapters = adapters_of(both["output"], "l_lora")
    for space, expected in (("delta_weight", set()), ("factor", {"space"})):
        finetuned = Finetuned({}, adapters, space)  # type: ignore[arg-type]
        identity = RunIdentity(RunSource("l_lora", 42, ()), finetuned, Workbench(module, data, ""), "")
        common = {"schema", "run", "base", "finetuned", "split", "formulas", "scored_by"}
        assert set(identity._common(TASKS, "validation", TASKS)) == common | expected
        point = Point("average", rules.Average(), tuple(TASKS), "validation", tuple(TASKS))
        known = identity._common(TASKS, "validation", TASKS) | {
            "rule_name": "average",
            "rule": rules.to_config(point.rule),
        }
        assert identity.of_point(point) == key_of(known)


@pytest.mark.slow
def test_frozen_a_gives_the_values_of_delta_weight(both: dict[str, Any]) -> None:
    def known(space: str) -> dict[tuple[Any, ...], dict[str, float]]:
        points = [each for each in records_of(both["output"], space) if each["kind"] == "point"]
        return {
            (each["method"], each["rule"].removesuffix(" (factor)"), json.dumps(each["rule_config"]),
             *each["fused_tasks"], each["split"]): values_of(each)
            for each in points if each["method"] != "lora"
        }  # fmt: skip

    exact, apart = known("delta_weight"), known("factor")
    assert len(exact) == 56
    assert exact == apart
    adapters = adapters_of(both["output"], "l_lora")
    coefficients = {"*": {"digits": 0.5, "signs": 0.9, "textures": -0.3}}
    sums, fused = combine(adapters, coefficients).task_vector(), combine_factors(adapters, coefficients).task_vector()
    for name in sums:
        torch.testing.assert_close(fused[name], sums[name], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_everything_says_the_space(both: dict[str, Any], tmp_path: Path) -> None:
    labelled = {f"{name} (factor)" for name in RECIPE["rules"]}
    for space, names in (("delta_weight", set(RECIPE["rules"])), ("factor", labelled)):
        content = both[space]["sweep"]
        assert {row["rule"] for row in both[space]["rows"]} == names
        assert {line["rule"] for line in content["summary"]} == names
        assert {line["rule"] for line in content["costs"]} == names
        searched, open_rule = (
            {name for name in names if name.startswith(starts)} for starts in (("multi", "lora"), "task_")
        )
        assert {line["rule"] for line in content["searches"]} == searched
        assert {line["rule"] for line in content["coefficient_curves"]} == open_rule
        assert {record["rule"] for record in records_of(both["output"], space)} == names
    assert main(["report", str(both["output"]), "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "LoRA, MetaGPT (factor)" in text
    assert not re.search(r"LoRA, MetaGPT(?! (× multiplier )?\(factor\))", text)


@pytest.mark.slow
def test_both_spaces_in_one_output_do_not_mix(both: dict[str, Any], tmp_path: Path) -> None:
    for space in ("delta_weight", "factor"):
        assert sweep(tmp_path / space, space, runs=[str(both["output"] / "runs" / "lora-seed42")]) == 0
        kept = [each for each in records_of(both["output"], space) if each["method"] == "lora"]
        alone, kept = (
            {each["key"]: each | {"cost": 0} for each in of} for of in (records_of(tmp_path / space, space), kept)
        )
        assert len(alone) > 30
        assert alone == kept
        assert rows_of(tmp_path / space) == [row for row in both[space]["rows"] if row["method"] == "lora"]


@pytest.mark.slow
def test_a_rule_that_is_only_called_factor_does_not_mix(both: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(both["output"], output)
    named = {"rules": {f"{name} (factor)": rule for name, rule in RECIPE["rules"].items()}}
    for space, changes in (("delta_weight", named), ("factor", {})):
        assert sweep(output, space, methods=["lora"], **changes) == 0
        rows = [{**row, "rule": row["rule"].removesuffix(" (factor)")} for row in both[space]["rows"]]
        found = [{**row, "rule": row["rule"].removesuffix(" (factor)")} for row in rows_of(output)]
        assert {row["rule"].endswith(" (factor)") for row in rows_of(output)} == {True}
        assert found == [row for row in rows if row["method"] == "lora"]


# what is refused


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


DARE = {"class_path": "dare", "init_args": {"rule": "average", "drop_rate": 0.5}}
BAD = {
    "rules": ({"rules": {"average": "average", "dared": DARE, "flat": "tsv_m", "mine": "ties", "turned": "slerp"}},
              "space factor: expected rules that are weighted sums .*, got dared, flat, mine, turned; leave those"),
    "search": ({"rules": ["average", "adamerging"]}, "space factor: .*, got adamerging; leave those out"),
    "methods": ({"methods": ["lora", "full", "tangent"]},
                r"expected runs that train adapters \(lora, l_lora, tangent_lora\), got full-seed42, tangent-seed42;"),
    "space": ({"space": "factors"}, "space: no such choice 'factors'; did you mean 'factor'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_factors_is_refused_by_name(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, expected = BAD[case]
    assert sweep(tmp_path / "out", "factor", dry_run=True, **changes) == 2
    message = refused(capsys)
    assert re.search(expected, message), message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["seed", "no seed", "frozen A", "alpha"])
def test_adapters_that_cannot_be_fused_apart(
    case: str, both: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(both["output"] / "runs" / ("l_lora-seed42" if case == "frozen A" else "lora-seed42"), run)
    folder = run / "adapters" / "signs"
    own, config = folder / "fusionlab.json", folder / "adapter_config.json"
    weights = load_file(folder / "adapter_model.safetensors")
    if case == "seed":
        own.write_text(json.dumps(json.loads(own.read_text()) | {"seed": 7}))
    elif case == "no seed":
        own.write_text(json.dumps(json.loads(own.read_text()) | {"seed": None}))
    elif case == "frozen A":
        first = next(name for name in weights if "lora_A" in name)
        save_file({**weights, first: weights[first] + 1}, folder / "adapter_model.safetensors")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1}))
    expected = {
        "seed": "run.*lora-seed42: factor space needs the A₀ that 'signs' started from; what its seed 7 gives is",
        "no seed": "factor space needs the A₀ that 'signs' started from, and the adapter does not say it",
        "frozen A": "l_lora-seed42: factor space needs one A₀ for all tasks; 'digits' and 'signs' started from",
        "alpha": r"needs one rank and scaling; 'digits', 'signs' differ at .* \(rank 16 and 16, scaling 2 and 0.0625\)",
    }[case]
    assert sweep(tmp_path / "out", "factor", runs=[str(run)]) == 2
    message = refused(capsys)
    assert re.search(expected, message), message
    assert message.rstrip().endswith("Use delta_weight space, which is exact for any adapters.")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_of_whole_weights_and_rules_that_are_no_sums(both: dict[str, Any]) -> None:
    adapters = adapters_of(both["output"], "lora")
    base = {name: torch.zeros(value.shape) for name, value in adapters["digits"].task_vector().items()}
    with pytest.raises(InputError, match="fuses A and B of adapters, and signs is none"):
        Finetuned(base, {**adapters, "signs": base}, "factor")
    apart = Finetuned(base, adapters, "factor")
    with pytest.raises(InputError, match=r"needs a weighted sum, got Ties"):
        apart.make(apart.plan(rules.Ties(), TASKS))
    with pytest.raises(InputError, match="no such space 'factors'; did you mean 'factor'"):
        SweepRecipe("out", space="factors")  # type: ignore[arg-type]

"""Sweeps of modules of another package: which methods are theirs, and what scores their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusionlab.__main__ import main
from fusionlab.commands.sweep.alike import check_scored_alike
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.forecast import num_batches, seconds_of_fit, steps_of
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.sources import sources
from fusionlab.errors import InputError
from fusionlab.search.workbench import workbench


def fit_of(module: str, **arguments: Any) -> dict[str, Any]:
    model = {"class_path": f"own_named.{module}", "init_args": arguments}
    return {"model": model, "data": {"class_path": "own_regressor.Planes"}, "trainer": {"max_steps": 2}}


def recipe_of(fit: dict[str, Any], **more: Any) -> SweepRecipe:
    return SweepRecipe("out", fit, **{"rules": ["average"], **more})


TAKEN = {
    "one of its own": ("Bitfit", None, ["bitfit"]),
    "the same, asked for": ("Bitfit", ["bitfit"], ["bitfit"]),
    "an argument that means something else": ("Named", None, ["full"]),
    "an argument": ("Choosing", ["ia3", "prompts"], ["ia3", "prompts"]),
    "ours by default": ("Choosing", None, ["lora", "l_lora"]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_module_is_fitted_once_by_each_method_that_it_has(case: str) -> None:
    module, methods, expected = TAKEN[case]
    found = sources(recipe_of(fit_of(module), methods=methods, seeds=[1, 2]))
    assert [source.name for source in found] == [f"{method}-seed{seed}" for method in expected for seed in (1, 2)]
    of_module = [(source.config or {})["model"]["init_args"].get("method") for source in found]
    given = module == "Choosing"
    assert of_module == [source.method if given else None for source in found]


@pytest.mark.parametrize(
    ("module", "more", "told"),
    [
        ("Bitfit", {"methods": ["bitfit", "full"]}, "Bitfit trains by 'bitfit' and takes no other, got 'full'; leave"),
        ("Named", {"methods": ["lora"]}, "Named trains by 'full' and takes no other, got 'lora'"),
        ("Bitfit", {"by_method": {"bitfti": {}}}, "by_method: no such method bitfti; did you mean 'bitfit'"),
    ],
    ids=str,
)
def test_methods_that_it_does_not_have_are_refused(module: str, more: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        sources(recipe_of(fit_of(module), **more))


def test_a_method_of_ours_that_is_none() -> None:
    with pytest.raises(InputError, match=r"methods: no such method 'lroa'; did you mean 'lora'"):
        sources(SweepRecipe("out", methods=["lroa"]))


def test_a_given_run_has_the_method_that_its_rows_say(tmp_path: Path) -> None:
    run = ["--trainer.max_steps", "2", "--fusion.rules", "{}", "--trainer.default_root_dir", str(tmp_path / "run")]
    assert main(["fit", "--model", "own_named.Bitfit", "--data", "own_regressor.Planes", *run]) == 0
    given = ["--runs", f"[{tmp_path / 'run'}]", "--rules", "[average]", "--processes", "1", "--sizes", "[3]"]
    assert main(["sweep", *given, "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"bitfit"}


NESTED = {"activation": {"class_path": "torch.nn.Tanh"}}
DIFFERING = {
    "precision": ({"trainer": {"precision": "bf16-mixed"}}, r"trainer.precision \('32-true' of {}, 'bf16-mixed'\)"),
    "a number of the module": (
        {"model": {"init_args": {"scale": 2.0}}}, r"scoring_settings.plane 0.backbone.scale \(1.0 of {}, 2.0\)",
    ),
    "the class of the data": (
        {"data": {"class_path": "own_named.Counted", "init_args": {}}},
        r"classes.data \('Planes' of {}, 'Counted'\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("methods", [["ia3", "prompts"], ["prompts", "ia3"]], ids=str)
@pytest.mark.parametrize("case", DIFFERING)
def test_runs_that_ask_for_other_scores_are_refused(case: str, methods: list[str]) -> None:
    above, told = DIFFERING[case]
    if methods[0] == "prompts":
        told = r"ia3-seed42 would be scored in another way than the other runs: "
    fit = fit_of("ChoosingNested", **NESTED)
    with pytest.raises(InputError, match=told.format("ia3-seed42")):
        Sweep(recipe_of(fit, methods=methods, by_method={"prompts": above}))


def test_runs_that_are_trained_otherwise_are_scored_alike() -> None:
    above = {
        "model": {"init_args": {"learning_rate": 0.5}},
        "data": {"init_args": {"batch_size": 4, "eval_batch_size": 20}},
        "trainer": {"precision": "32-true", "max_steps": 3},
    }
    fit = fit_of("ChoosingNested", **NESTED)
    Sweep(recipe_of(fit, methods=["ia3", "prompts"], by_method={"prompts": above}))


@pytest.mark.parametrize("key", ["evaluation", "max_new_tokens"])
def test_the_same_of_ours(key: str) -> None:
    values: dict[str, Any] = {"evaluation": "generate", "max_new_tokens": 3}
    fit = {"model": {"class_path": "T5Module"}, "data": {"class_path": "TextTasks", "init_args": {"max_samples": 8}}}
    above = {"model": {"init_args": {key: values[key]}}}
    found = sources(SweepRecipe("out", fit, methods=["full", "lora"], by_method={"lora": above}))
    with pytest.raises(InputError, match=rf"lora-seed42 would be .* model.{key} \(.* of full-seed42, '?{values[key]}"):
        check_scored_alike(found, workbench({"model": {"class_path": "own_named.Bitfit"}, "data": fit_of("")["data"]}))


def test_a_forecast_counts_the_batches_of_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    above = {"data": {"init_args": {"batch_size": 4}}}
    fit = fit_of("Choosing") | {"trainer": {"max_steps": -1, "max_epochs": 2}}
    sweep = Sweep(recipe_of(fit, methods=["ia3", "prompts"], by_method={"prompts": above}))
    seen = {}
    monkeypatch.setattr(
        "fusionlab.commands.sweep.forecast.seconds_of_step",
        lambda config, data: seen.setdefault(config["model"]["init_args"]["method"], data.batch_size),
    )
    assert set(steps_of(sweep)) == {"ia3", "prompts"}
    assert seen == {"ia3": 8, "prompts": 4}
    steps, free = dict.fromkeys(("ia3", "prompts"), 1.0), dict.fromkeys(sweep.tasks, 0.0)
    ia3, prompts = (seconds_of_fit(sweep, source, steps, free) for source in sweep.sources)
    assert prompts - ia3 == 2 * (10 - 5)  # of 40 samples, two epochs


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [({"limit_train_batches": 5}, 10), ({"limit_train_batches": 0.25}, 16), ({"overfit_batches": 3}, 6),
     ({"limit_train_batches": None}, 64), ({"limit_train_batches": 5, "overfit_batches": 0.0}, 10)],
)  # fmt: skip
def test_a_forecast_knows_the_trainers_limits(trainer: dict[str, Any], expected: int) -> None:
    assert num_batches({"max_steps": -1, "max_epochs": 2, **trainer}, 32) == expected

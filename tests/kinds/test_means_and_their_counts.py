"""What a number is a mean of: equal sets on both sides of a comparison, counted as they are, and named apart."""

from __future__ import annotations

import itertools
import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from report_folders import row, written
from torchmetrics import MeanMetric, MetricCollection

from fusionlab.callbacks import FusionCallback
from fusionlab.callbacks.predictions import PredictionWriter
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.summaries import curves, summaries
from fusionlab.errors import InputError
from fusionlab.evaluation.metrics import Perplexity
from fusionlab.evaluation.predicting import labelled
from fusionlab.evaluation.rows import rows_of
from fusionlab.reporting import print_table, table
from fusionlab.reporting.charts import DotChart, range_of, tick_text, ticks
from fusionlab.reporting.page import file_name
from fusionlab.reporting.pairing import paired
from fusionlab.reporting.reference import check_reference
from fusionlab.reporting.scores import groups, means, panel
from fusionlab.reporting.sections import sections_of
from fusionlab.rules import to_config, with_coefficient
from fusionlab.search import rule_or_search

TASKS = ("a", "b", "c", "d")
PAIRS = list(itertools.combinations(TASKS, 2))
RULE: Any = rule_or_search("task_arithmetic")


def sweep_of(seeds: Sequence[int], rule: Any = RULE) -> Any:
    sources = [SimpleNamespace(method="lora", seed=seed, name=f"lora-seed{seed}") for seed in seeds]
    return SimpleNamespace(
        tasks=TASKS, rules={"rule": rule}, sources=sources, recipe=SimpleNamespace(scored_tasks="all")
    )


def point(fused: tuple[str, ...], value: float, coefficient: float = 0.3, seed: int = 1, split: str = "test") -> Any:
    values = [
        {"task": task, "metric": "accuracy", "value": value, "num_samples": 10, "higher_is_better": True}
        for task in TASKS
    ]
    config = to_config(with_coefficient(RULE, coefficient))
    return {"kind": "point", "method": "lora", "seed": seed, "rule": "rule", "split": split} | {
        "fused_tasks": list(fused), "rule_config": config, "values": values
    }  # fmt: skip


def summary_of(by_seed: dict[int, dict[tuple[str, ...], float]]) -> dict[str, Any]:
    chosen = {
        f"lora-seed{seed}": [point(fused, value, seed=seed) for fused, value in of.items()]
        for seed, of in by_seed.items()
    }
    singles = {name: dict.fromkeys(TASKS, 1.0) for name in chosen}
    [line] = summaries(sweep_of(list(by_seed)), chosen, singles, {})
    return line


def test_coefficients_that_other_subsets_have_are_not_beside_one_another() -> None:
    places = zip(PAIRS[:3], (0.9, 0.3, 0.5), (0.3, 0.6, 1.0), strict=True)
    chosen_apart = [point(pair, value, at) for pair, value, at in places]
    assert curves(sweep_of([1]), chosen_apart) == []
    tried = [point(pair, 0.1 * at, at, split="validation") for pair in PAIRS[:2] for at in (0.3, 0.6)]
    tried += [point(PAIRS[0], 1.0, 0.9, split="validation"), point(PAIRS[1], 0.0, 1.2, split="validation")]
    [curve] = curves(sweep_of([1]), tried)
    assert [at for at, _ in curve["points"]] == [0.3, 0.6]


def test_seeds_with_other_subsets_are_compared_on_what_they_share() -> None:
    first = dict(zip(PAIRS, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), strict=True))
    line = summary_of({1: first, 2: {PAIRS[0]: 0.9}})
    assert (line["num_points"], line["num_subsets"], line["num_seeds"]) == (7, 6, 2)
    assert line["mean"]["own_sub"] == pytest.approx(0.65)  # each subset once
    assert line["std_over_subsets"]["own_sub"] == pytest.approx(statistics.stdev(first.values()))
    assert line["std_over_seeds"]["own_sub"] == 0.0  # of the one pair that both have
    apart = summary_of({1: {PAIRS[0]: 0.9}, 2: {PAIRS[1]: 0.5}})
    assert apart["std_over_subsets"]["own_sub"] is None
    assert apart["std_over_seeds"]["own_sub"] is None
    even = summary_of({1: first, 2: {pair: value + 0.1 for pair, value in first.items()}})
    assert even["std_over_seeds"]["own_sub"] == pytest.approx(statistics.stdev((0.65, 0.75)))
    assert even["mean"]["own_sub"] == pytest.approx(0.7)


@pytest.mark.parametrize("what", ["seeds", "methods", "sizes", "protocols"])
def test_what_is_given_twice_is_not_counted_twice(what: str, tmp_path: Path) -> None:
    value: Any = {"seeds": [1, 1], "methods": ["lora", "lora"], "sizes": [2, 2], "protocols": ["strict", "strict"]}[
        what
    ]
    with pytest.raises(InputError, match=f"{what}: expected each once, got"):
        SweepRecipe(str(tmp_path), **{what: value})


def test_no_coefficients_to_try_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scaling_coefficients: expected at least one, got none"):
        SweepRecipe(str(tmp_path), scaling_coefficients=[])


def test_rules_that_tables_call_the_same_are_refused(tmp_path: Path) -> None:
    rules = {"ties": "ties", "TIES": "ties"}
    with pytest.raises(InputError, match="'ties' and 'TIES' are both called 'TIES'"):
        SweepRecipe(str(tmp_path), rules=rules)
    with pytest.raises(InputError, match="'ties' and 'TIES' are both called 'TIES'"):
        FusionCallback(rules=rules)


def test_a_reference_needs_every_task(tmp_path: Path) -> None:
    run = written(tmp_path, [row(model="finetuned", task="a", finetuned_on="a", value=0.5)])
    data: Any = SimpleNamespace(tasks={"a": None, "b": None}, splits={})
    check_reference(run, None, data)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no fine-tuned model scored on its own task for b; it has a"):
        check_reference(run, None, data, whole=True)  # type: ignore[arg-type]


def test_a_fine_tuned_model_that_is_alone_has_all_its_rows(tmp_path: Path) -> None:
    known = {"model": "finetuned", "finetuned_on": "a"}
    alone = [row(task=task, value=value, **known) for task, value in (("a", 0.9), ("b", 0.4), ("c", 0.2))]
    header, body = table(alone)
    assert header == ["model", "a", "b", "c", "mean"]
    assert body == [["fine-tuned on a", "0.900", "0.400", "0.200", "0.500"]]
    assert table(alone[1:])[1] == [["fine-tuned on a", "0.400", "0.200", "0.300"]]
    chart = next(part for part in sections_of(written(tmp_path, alone))[0].parts if isinstance(part, DotChart))
    [panel] = chart.panels.values()
    assert set(panel.dots["fine-tuned on a"]) == {"a", "b", "c", "(mean)"}
    beside = [*alone, row(model="pretrained", task="a", value=0.1), row(model="pretrained", task="b", value=0.1)]
    assert table(beside)[1][0] == ["finetuned", "0.900", "-", "0.900"]


def test_a_task_called_mean_keeps_its_place() -> None:
    rows = [row(model="pretrained", task=task, value=value) for task, value in (("mean", 0.9), ("b", 0.1))]
    [group] = groups(rows)
    assert means(group)["pretrained"].value == pytest.approx(0.5)
    assert {name: dot.value for name, dot in panel(group).dots["pretrained"].items()} == {
        "mean": 0.9, "b": 0.1, "(mean)": pytest.approx(0.5)
    }  # fmt: skip


def test_a_report_averages_what_the_table_does() -> None:
    """The first metric of a task is an error: its other ones are in no mean of scores."""
    rows = [
        row(model="pretrained", task="a", value=3.0, metric="error", higher_is_better=False, stderr=None),
        row(model="pretrained", task="a", value=0.1, metric="score"),
        row(model="pretrained", task="b", value=0.9),
    ]
    by_title = {group.higher: means(group)["pretrained"].value for group in groups(rows)}
    assert by_title == {True: 0.9, False: 3.0}
    assert table(rows)[1][0][-1] == "0.900"


def test_what_one_side_lacks_is_said() -> None:
    def fused(rule: str, tasks: list[str]) -> list[dict[str, Any]]:
        return [row(model="fused", rule=rule, task=task, value=0.5, fused_tasks=tasks) for task in tasks]

    both = [row(model="pretrained", task=task, value=0.1) for task in "abc"]
    found = paired(
        [*both, *fused("ties", ["a", "b"])], [*both, *fused("ties", ["a", "b", "c"]), *fused("average", ["a"])]
    )
    assert len(found.compared) == 1
    assert found.told == [
        "In the first only, and left out: TIES of 2 tasks (2 scores).",
        "In the second only, and left out: TIES of 3 tasks (3 scores), average of 1 task (1 score).",
    ]
    assert paired(both, both).told == []


def test_names_of_tables_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(model="fused", rule=f"ties [{name}]", task="a", value=0.5) for name in ("density", "scale")]
    print_table(rows, "run [bold]")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("ties [density]", "ties [scale]", "run [bold]"))


def test_no_two_runs_share_a_picture() -> None:
    names = ["a.1", "a-1", "a/1", "a 1", "a_1", "..", "a\\1"]
    assert len({file_name(name) for name in names}) == len(names)
    assert file_name("a-1_b.2") == "a-1_b.2"


@pytest.mark.parametrize("values", [[1e304], [-1e304], [1e-9, 3e-9], [5e-7], [0.0], [1e12, 1e12]])
def test_axes_have_ticks_that_differ(values: list[float]) -> None:
    low, high = range_of(values)
    assert low < high
    texts = [tick_text(each, ticks(low, high)) for each in ticks(low, high)]
    assert len(set(texts)) == len(texts) > 1


def test_no_loss_that_is_not_finite_passes_for_a_score(caplog: pytest.LogCaptureFixture) -> None:
    for broken in (float("nan"), float("inf"), float("-inf")):
        metric = Perplexity()
        metric.update(torch.tensor([broken, 1.0]), torch.ones(2).long(), torch.arange(2), torch.ones(2).bool())
        with caplog.at_level(logging.WARNING):
            assert metric.compute().item() > 1e300
        assert "the loss of 1 of 2 samples is not finite" in caplog.text
        caplog.clear()


def test_a_value_that_is_no_number_is_told_by_its_metric() -> None:
    metric = MeanMetric(nan_strategy="disable")
    metric.update(torch.tensor(float("nan")))
    samples: Any = [0]
    with pytest.raises(InputError, match="task 'a', test: mean is nan, which is no score"):
        rows_of("a", "test", MetricCollection({"mean": metric}), samples, {"model": "pretrained"})


def test_outputs_that_are_nan_have_no_label() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("nan"), 0.0]])
    assert [each["label"] for each in labelled(logits, ["x", "y"], "a", ["one.png"])] == ["y"]
    with pytest.raises(InputError, match=r"outputs are NaN for two\.png"):
        labelled(logits, ["x", "y"], "a", ["one.png", "two.png"])


@pytest.mark.parametrize(("limit", "is_part"), [(1, True), (2, True), (0.5, True), (1.0, False)])
def test_a_part_of_the_inputs_is_told(
    limit: float, is_part: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = PredictionWriter(str(tmp_path / "p.jsonl"))
    trainer: Any = SimpleNamespace(limit_predict_batches=limit, fast_dev_run=False)
    module: Any = None
    writer.write_on_batch_end(trainer, module, [{"x": 1}], None, {}, 0, 0)
    writer.on_predict_end(trainer, module)
    assert ("a part of the inputs" in capsys.readouterr().out) == is_part
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {"x": 1}

"""A sweep over processes, within a budget, and forecast: the same file however the work is shared and cut."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fusionlab import ClipModule
from fusionlab.__main__ import main
from fusionlab.commands.sweep import forecast as expecting
from fusionlab.commands.sweep import processes, timing
from fusionlab.commands.sweep.choosing import NotScoredError, Tried, choose, leading
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.floor import distinct_rows, floor
from fusionlab.commands.sweep.forecast import Forecast, as_fused, forecast, num_points, steps_of
from fusionlab.commands.sweep.jobs import rounds, works
from fusionlab.commands.sweep.processes import num_processes
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.commands.sweep.timing import bare_seconds
from fusionlab.search import Search, ToTheTop
from fusionlab.search.base import known_searches

TASKS = ["digits", "signs", "textures"]
ZERO = {"scaling_coefficient": 0.0}
HALF: dict[str, Any] = {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": 0.5}}
FIT: dict[str, Any] = {
    "model": {"class_path": "ClipModule", "init_args": {"learning_rate": 0.01}},
    "data": {"class_path": "ImageTasks", "init_args": {"tasks": TASKS, "max_samples": 24, "eval_batch_size": 16}},
    "trainer": {"max_steps": 2, "enable_progress_bar": False},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Finished runs of lora and tangent_lora."""
    output = tmp_path_factory.mktemp("runs") / "sweep"
    recipe = SweepRecipe(str(output), FIT, methods=["lora", "tangent_lora"], rules=["average"], sizes=[3])
    Sweep(recipe).run()
    return [str(output / "runs" / f"{method}-seed42") for method in ("lora", "tangent_lora")]


def swept(output: Path, **recipe: Any) -> dict[str, Any]:
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"output": str(output), **recipe}))
    assert main(["sweep", "--config", str(path)]) == 0
    content: dict[str, Any] = json.loads((output / "sweep.json").read_text())
    for timed in ("costs", "fits", "searches"):
        del content[timed]
    return content | {"rows": json.loads((output / "results.json").read_text())["rows"]}


@pytest.mark.slow
def test_two_processes_and_one_write_the_same_file(runs: list[str], tmp_path: Path, recwarn: Any) -> None:
    rules = ["average", "task_arithmetic", "metagpt_multiplier"]
    alone = swept(tmp_path / "alone", runs=runs, rules=rules, processes=1)
    threads = torch.get_num_threads()
    assert swept(tmp_path / "shared", runs=runs, rules=rules, processes=2) == alone
    assert torch.get_num_threads() == threads
    assert not [warning for warning in recwarn if "helping process" in str(warning.message)]


@pytest.mark.slow
def test_a_helper_that_fails_is_told_of_and_its_work_done(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(processes.subprocess.Popen):
        def __init__(self, argv: list[str], **options: Any) -> None:
            super().__init__(["sh", "-c", "echo no memory; exit 3"], **options)
            self.wait()

    monkeypatch.setattr(processes.subprocess, "Popen", Failing)
    with pytest.warns(UserWarning, match=r"exit code 3; .* no memory"):
        content = swept(tmp_path / "out", runs=runs, rules=["average"], processes=2)
    assert content["missing"] == []
    assert len(content["summary"]) == 2 * 2  # methods, sizes


def test_a_helper_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    recipe = SweepRecipe(str(tmp_path / "out"), FIT)
    with processes.helping(recipe, 2):
        [child] = [pid for pid in _children() if "sweep.processes" in _argv(pid)]
    assert child not in _children()


def _children() -> list[int]:
    import psutil

    return [process.pid for process in psutil.Process().children()]


def _argv(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.parametrize(
    ("asked", "runs", "threads", "device", "expected"),
    [
        (None, 12, 2, "cpu", 2),
        (None, 1, 8, "cpu", 1),
        (None, 12, 1, "cpu", 1),
        (None, 12, 8, "cuda", 1),
        (5, 1, 2, "cpu", 5),
    ],
)
def test_one_process_a_thread_on_cpus(
    asked: int | None, runs: int, threads: int, device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert num_processes(SweepRecipe("out", processes=asked), runs, torch.device(device)) == expected


def test_a_budget_that_is_over_leaves_points_for_the_next_time(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"runs": runs[:1], "rules": ["average", "task_arithmetic"]}
    whole = swept(tmp_path / "whole", **recipe)
    assert whole["missing"] == []
    capsys.readouterr()
    cut = swept(tmp_path / "cut", **recipe, budget_minutes=1e-6)
    places = [(each["method"], each["rule"], each["num_tasks"], each["num_subsets"]) for each in cut["missing"]]
    sizes = ((2, 3), (3, 1))
    assert places == [("lora", rule, *size) for rule in ("average", "task_arithmetic") for size in sizes]
    assert "8 points are missing" in capsys.readouterr().out
    assert cut["rows"] == cut["summary"] == []
    assert swept(tmp_path / "cut", **recipe) == whole


def test_a_point_that_is_missing_leaves_out_its_subset_alone(runs: list[str], tmp_path: Path) -> None:
    recipe = {"runs": runs[:1], "rules": ["task_arithmetic"]}
    whole = swept(tmp_path / "out", **recipe)
    for path in (tmp_path / "out" / "ledger" / "points").rglob("*.json"):
        record = json.loads(path.read_text())
        if record["split"] == "validation" and record["fused_tasks"] == TASKS[1:]:
            path.unlink()
    cut = swept(tmp_path / "out", **recipe, budget_minutes=1e-6)
    # the third pair is one of those that the search over all three starts from
    assert [(each["num_tasks"], each["num_subsets"]) for each in cut["missing"]] == [(2, 1), (3, 1)]
    assert cut["rows"] == [row for row in whole["rows"] if row["fused_tasks"] in (TASKS[:2], [TASKS[0], TASKS[2]])]


def source(method: str, seed: int = 1) -> RunSource:
    return RunSource(method, seed, ())


PAIRS = [("t", f"{number:02}") for number in range(15)]


def test_work_by_rounds_takes_some_subsets_of_every_run_first() -> None:
    triples = [("a", "b", str(number)) for number in range(2)]
    assert leading(PAIRS) == [PAIRS[0], PAIRS[7], PAIRS[14]]
    assert [[len(part) for part in parts] for parts in rounds([*PAIRS, *triples])] == [[3, 2], [10], [2]]
    sources = [source("lora"), source("tangent_lora"), source("full")]

    def is_linear(source: RunSource) -> bool:
        return source.method == "tangent_lora"

    for by_rounds in (False, True):
        found = works(sources, ["average", "ties"], [*PAIRS, *triples], is_linear, by_rounds=by_rounds)
        order = [(work.jobs[0].source.method, len(work.jobs)) for work in found]
        lora, tangents, full = ("lora", 1), ("tangent_lora", 8), ("full", 1)
        first = [lora] * 4 + [tangents] + [full] * 4
        assert order == (first + [lora, lora, full, full] * 2 if by_rounds else [lora] * 8 + [tangents] + [full] * 8)
        assert len({work.lease for work in found}) == len(found)
        every = [
            (job.source.method, job.rule_name, subset) for work in found for job in work.jobs for subset in job.subsets
        ]
        assert sorted(every) == sorted(
            (method, rule, subset) for method in ("lora", "tangent_lora", "full") for rule in ("average", "ties")
            for subset in [*PAIRS, *triples]
        )  # fmt: skip


def test_a_size_starts_from_the_leading_choices_of_the_next_smaller_one() -> None:
    tops = dict.fromkeys(PAIRS, 1.5) | {PAIRS[0]: 0.2, PAIRS[7]: 0.6, PAIRS[14]: 0.7}
    triple, looked = ("a", "b", "c"), []

    def score(tried: Sequence[Tried]) -> list[float]:
        looked.extend(value for subset, value in tried if subset == triple)
        if tried[0][0] == PAIRS[3]:
            raise NotScoredError("it")
        return [-abs(value - tops.get(subset, 0.6)) for subset, value in tried]

    chosen = choose([*PAIRS, triple], score, ToTheTop)
    assert PAIRS[3] not in chosen
    assert looked[:3] == [0.4, 0.6, 0.85]


def watch_rows(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Samples that models are run on from now on, by split."""
    counted, splits, score = dict.fromkeys(("validation", "test"), 0), [""], ClipModule.score
    data: Any = sweep.bench.data
    batches = data.eval_batches

    def dealt(task: str, split: str, **place: int) -> Any:
        splits[0] = split
        return batches(task, split, **place)

    def scored(module: ClipModule, task: str, batch: dict[str, Any], *rest: Any) -> Any:
        counted[splits[0]] += int(batch["mask"].sum())
        return score(module, task, batch, *rest)

    monkeypatch.setattr(data, "eval_batches", dealt)
    monkeypatch.setattr(ClipModule, "score", scored)
    return counted


def test_equal_models_are_run_once_by_whichever_process(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a pair the average is task arithmetic at a half, and at zero every subset is the pretrained model."""
    at = {name: {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": value}}
          for name, value in (("half", 0.5), ("again", 0.5), ("none", 0.0))}  # fmt: skip
    recipe: dict[str, Any] = {"runs": runs[:1]}
    found = []
    for rules in ({"average": "average"}, {name: at[name] for name in ("half", "none")}, at | {"average": "average"}):
        sweep = Sweep(SweepRecipe(str(tmp_path / "out"), rules=rules, **recipe))  # as another process has it
        with monkeypatch.context() as patch:
            counted = watch_rows(sweep, patch)
            sweep.run()
        found.append(counted["test"] // (24 * 3))
    # the three models fine-tuned on one task each, three pairs and all three; all three at a half, and pretrained
    assert found == [1 + 3 + 1, 1 + 1, 0]
    looks = []
    for size in (2, 3):
        recipe_of_size = SweepRecipe(
            str(tmp_path / "out"), rules=["task_arithmetic"], scaling_coefficients=[0.0], sizes=[size], **recipe
        )
        sweep = Sweep(recipe_of_size)
        with monkeypatch.context() as patch:
            counted = watch_rows(sweep, patch)
            sweep.run()
        looks.append(counted)
    assert looks == [{"validation": 24 * 3, "test": 0}, {"validation": 0, "test": 0}]
    content = swept(tmp_path / "out", rules=at | {"average": "average"}, **recipe)
    assert content["equal_models"] == [{"method": "lora", "seed": 42, "points": 16, "models": 6}]
    assert "16 points are 6 models; those that are equal by construction were scored once" in capsys.readouterr().out


def test_a_forecast_counts_the_rows_that_are_run(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {
        "task_arithmetic": "task_arithmetic",
        "ties": {"class_path": "ties", "init_args": {"density": 0.5, "scaling_coefficient": 1.0}},
        "multiplier": {"class_path": "metagpt_multiplier", "init_args": {"grid": [1.3]}},
    }
    recipe = SweepRecipe(str(tmp_path / "out"), runs=runs[:1], rules=rules, scaling_coefficients=[0.35])
    sweep = Sweep(recipe)
    expected = forecast(sweep)
    counted = watch_rows(sweep, monkeypatch)
    sweep.run()
    assert counted == expected.rows
    assert expected.fits == 0
    assert expected.points == (2 + 1 + 3) * 4 == sweep.ledger.count()
    assert expected.seconds > 0
    least = floor(sweep, expected)
    assert {"validation": least.looked_at, "test": least.test_rows} == counted
    assert least.fit_seconds == 0
    assert least.cores * least.seconds == pytest.approx(1e-3 * least.milliseconds * sum(counted.values()))


def test_the_floor_counts_equal_models_once(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"average": "average", "again": "average", "half": HALF, "none": {**HALF, "init_args": ZERO}}
    sweep = Sweep(SweepRecipe(str(tmp_path / "out"), runs=runs[:1], rules=rules))
    counted = watch_rows(sweep, monkeypatch)
    sweep.run()
    assert counted == {"validation": 0, "test": 24 * 3 * (1 + 3 + 1 + 1 + 1)}
    assert sum(distinct_rows(sweep)[0].values()) == counted["test"]
    linear = Sweep(SweepRecipe(str(tmp_path / "linear"), runs=runs[1:], rules=["average", "task_arithmetic", "ties"]))
    test, looked = distinct_rows(linear)
    assert test == dict.fromkeys(TASKS, 24 * (1 + (1 + 3) + 4))  # its own, base and three task vectors, TIES by subset
    assert looked == dict.fromkeys(TASKS, 24 * (1 + 3))


@pytest.mark.parametrize("kind", known_searches().values(), ids=list(known_searches()))
def test_every_search_can_be_forecast(kind: type[Search]) -> None:
    search = kind()
    assert isinstance(search, Search)  # which a class is not that lacks one of the methods
    assert search.expected_rows(100) > 0
    assert search.expected_points(True) >= search.expected_points(False) >= 0


def test_points_of_sums_are_every_step(runs: list[str], tmp_path: Path) -> None:
    rules = ["average", "task_arithmetic", "metagpt_multiplier"]
    sweep = Sweep(SweepRecipe(str(tmp_path / "out"), runs=runs[1:], rules=rules, sizes=[3]))
    sweep.run()
    assert num_points(sweep) == sweep.ledger.count() == 1 + (61 + 1) + (1 + 31 + 1)


def test_bare_forwards_run_at_once_and_what_that_costs_is_forecast(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(SweepRecipe(str(tmp_path / "out"), runs=runs[:1], rules=["average"], processes=2))
    module, data, threads = sweep.bench.module, sweep.bench.data, torch.get_num_threads()
    met, seen = threading.Barrier(2, timeout=60), []

    def features(images: torch.Tensor) -> torch.Tensor:
        met.wait()  # passes only where two threads are here
        seen.append((threading.get_ident(), len(images), torch.is_grad_enabled(), torch.get_num_threads()))
        return images

    monkeypatch.setattr(module.backbone, "image_features", features)
    found = bare_seconds(module, data, at_once=2)
    assert found == dict.fromkeys(TASKS, found["digits"])
    assert len({place[0] for place in seen}) == 2
    assert {place[1:] for place in seen} == {(100, False, 1)}
    assert torch.get_num_threads() == threads

    monkeypatch.setattr(timing, "bare_seconds", lambda module, data, at_once, until: {"digits": 0.2 * at_once})
    assert timing.slowdown(module, data, 1) == 1.0
    assert timing.slowdown(module, data, 3) == pytest.approx(3.0)

    monkeypatch.setattr(expecting, "_seconds_a_sample", lambda *given: dict.fromkeys(TASKS, 0.5))
    seconds = []
    for times in (1.0, 1.5):
        monkeypatch.setattr(expecting, "slowdown", lambda module, data, at_once, times=times: times)
        seconds.append(forecast(sweep).seconds)
    assert seconds[1] == pytest.approx(1.5 * seconds[0])


def test_steps_of_what_is_to_be_fitted_are_timed_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of two steps of two micro-batches each, by one process."""
    given = {**FIT, "trainer": {**FIT["trainer"], "accumulate_grad_batches": 2}}
    sweep = Sweep(SweepRecipe(str(tmp_path / "out"), given, methods=["lora", "full"], rules=["average"], sizes=[3]))
    data, state = sweep.bench.data, torch.random.get_rng_state()
    trainer, module = data.trainer, sweep.bench.module
    weights = {name: value.clone() for name, value in module.base_model.state_dict().items()}
    steps = steps_of(sweep)
    assert set(steps) == {"lora", "full"}
    assert min(steps.values()) > 0
    assert data.trainer is trainer
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in module.base_model.state_dict().items())
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(expecting, "_seconds_a_sample", lambda *given: dict.fromkeys(TASKS, 0.5))
    monkeypatch.setattr(expecting, "num_processes", lambda *given: 1)
    told = []
    for seconds in (1.0, 3.0):
        monkeypatch.setattr(expecting, "seconds_of_step", lambda config, data, seconds=seconds: seconds)
        told.append(forecast(sweep))
    assert told[1].steps == {"lora": 3.0, "full": 3.0}
    assert told[1].seconds - told[0].seconds == pytest.approx(2 * 2 * 2 * (3.0 - 1.0))


def test_adapters_are_timed_as_large_as_fused_ones(runs: list[str], tmp_path: Path) -> None:
    sweep = Sweep(SweepRecipe(str(tmp_path / "out"), runs=runs[:1], rules=["average"], sizes=[2, 3]))
    for method, rank in (("lora", 36), ("l_lora", 16)):  # 2.25 tasks on average
        adapter = as_fused(sweep, method)
        assert adapter is not None
        assert {factors.rank for factors in adapter.factors.values()} == {rank}
        assert len(adapter.factors) == 10
    assert as_fused(sweep, "full") is None


def test_a_forecast_is_told_with_processes_and_threads(tmp_path: Path) -> None:
    told = Forecast(2, 30, {"validation": 1200.0, "test": 3400.4}, 150.0, 2, 1, {})
    recipe = SweepRecipe(str(tmp_path), budget_minutes=8.0)
    text = told.told(recipe, num_runs=4, num_subsets=5, num_tasks=3)
    assert "4 runs (2 to fit), 5 subsets of 3 tasks, 4 rules" in text
    assert "about 30; samples to run through models: 1,200 of validation, 3,400 of test" in text
    assert "2.5 min, 2 x 1 threads; 8 min are given" in text

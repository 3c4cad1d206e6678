"""A chat template that writes the date writes that of the run, on whichever day it is gone on with."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusionlab.__main__ import main
from fusionlab.commands import dates
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.sources import sources
from fusionlab.data.chat import given
from fusionlab.modules import CausalModule
from fusionlab.runs.folder import changed_keys

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TODAY = "{{ strftime_now('%d %b %Y %H:%M') }}\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the day of January 2026."""

    def set_day(number: int) -> None:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> Day:
                return cls(2026, 1, number)

        monkeypatch.setattr(dates, "day", Day)
        monkeypatch.setattr(given, "day", Day)

    return set_day


@pytest.fixture
def flags(tokenizer: Any, causal_folder: Callable[[str], Path], tmp_path: Path) -> list[str]:
    (tmp_path / "dated.jinja").write_text(TODAY + tokenizer.chat_template)
    for name in ("a", "b"):
        rows = [{"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "yes"}]}
                for i in range(24)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), "--model.max_new_tokens", "2",
        "--data", "ChatTasks", "--data.cache_dir", str(tmp_path / "cache"), "--data.batch_size", "2",
        "--data.chat_template_path", str(tmp_path / "dated.jinja"),
    ]  # fmt: skip


def tasks(root: Path, *names: str) -> list[str]:
    return ["--data.tasks", json.dumps([{"name": name, "path": str(root / f"{name}.jsonl")} for name in names])]


def fit(flags: list[str], root: Path, *more: str) -> int:
    train = ["--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false", "--fusion.rules", "[average]"]
    place = ["--trainer.default_root_dir", str(root), "--checkpoint_every_n_steps", "1"]
    return main(["fit", *flags, *train, *place, *more])


def date_in(folder: Path) -> Any:
    return yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["date"]


def test_a_run_is_gone_on_with_and_extended_on_another_day(
    flags: list[str], tmp_path: Path, clock: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root, whole = tmp_path / "run", CausalModule.loss

    def dying(self: CausalModule, task: str, batch: dict[str, Any]) -> Any:
        if self.global_step == 1:
            raise RuntimeError("killed")
        return whole(self, task, batch)

    clock(29)
    monkeypatch.setattr(CausalModule, "loss", dying)
    with pytest.raises(RuntimeError, match="killed"):
        fit(flags, root, *tasks(tmp_path, "a"))
    monkeypatch.setattr(CausalModule, "loss", whole)
    clock(30)
    assert fit(flags, root, *tasks(tmp_path, "a")) == 0
    assert date_in(root) == "2026-01-29"
    clock(31)
    assert fit(flags, root, *tasks(tmp_path, "a", "b")) == 0
    assert date_in(root) == "2026-01-29"
    before = {(row["model"], row["task"]): row for row in json.loads((root / "results.json").read_text())["rows"]}
    out = tmp_path / "scored.json"
    scored = ["--trainer.enable_progress_bar", "false", "--output", str(out)]
    weights = ["--model.weights", str(root / "adapters/a")]
    assert main(["test", *flags, *tasks(tmp_path, "a"), *scored, *weights]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["data_version"] == before["finetuned", "a"]["data_version"]
    capsys.readouterr()
    assert main(["fit", *flags, *tasks(tmp_path, "a", "b"), "--data.date", "2026-01-31", "--trainer.max_steps", "2",
                 "--trainer.default_root_dir", str(root), "--fusion.rules", "[average]"]) == 2  # fmt: skip
    assert "data.init_args.date ('2026-01-29' before, '2026-01-31' now)" in capsys.readouterr().err


def test_jobs_of_one_run_have_one_date(flags: list[str], tmp_path: Path, clock: Callable[[int], None]) -> None:
    root = tmp_path / "run"
    for number, name in enumerate("ab"):
        clock(30 + number)
        assert fit(flags, root, *tasks(tmp_path, name), "--train_only", "true") == 0
    assert {date_in(path.parent) for path in root.glob("parts/*/config.yaml")} == {"2026-01-30"}
    assert fit(flags, root, *tasks(tmp_path, "a", "b")) == 0
    clock(28)
    assert fit(flags, root, *tasks(tmp_path, "a", "b"), "--overwrite", "true") == 0
    assert date_in(root) == "2026-01-28"


def test_a_sweep_has_the_date_of_its_runs(tmp_path: Path, clock: Callable[[int], None]) -> None:
    config = {"data": {"class_path": "ChatTasks", "init_args": {"tasks": None}}}
    clock(30)
    assert dates.dated(config, [tmp_path / "none"])["data"]["init_args"]["date"] == "2026-01-30"
    (tmp_path / "one").mkdir()
    begun = {"model": {}, "data": {"class_path": "ChatTasks", "init_args": {"date": "2026-01-02"}}}
    (tmp_path / "one/config.yaml").write_text(yaml.safe_dump(begun))
    assert dates.dated(config, [tmp_path / "none", tmp_path / "one"])["data"]["init_args"]["date"] == "2026-01-02"
    assert dates.dated(begun, [])["data"]["init_args"]["date"] == "2026-01-02"
    assert dates.dated({"data": {"class_path": "TextTasks"}}, []) == {"data": {"class_path": "TextTasks"}}
    fitted = {**config, "model": {"class_path": "CausalModule"}}
    recipe = SweepRecipe(output=str(tmp_path / "sweep"), methods=["lora", "l_lora"], seeds=[1], fit=fitted)
    (tmp_path / "sweep/runs/lora-seed1").mkdir(parents=True)
    (tmp_path / "sweep/runs/lora-seed1/config.yaml").write_text(yaml.safe_dump(begun))
    dated = [dict(source.config or {})["data"]["init_args"]["date"] for source in sources(recipe)]
    assert dated == ["2026-01-02", "2026-01-02"]


def test_no_date_is_any_date() -> None:
    first, none, other = ({"data": {"init_args": {"date": date}}} for date in ("2026-01-02", None, "2026-01-03"))
    assert changed_keys(first, none) == changed_keys(none, first) == []
    assert len(changed_keys(first, other)) == 1

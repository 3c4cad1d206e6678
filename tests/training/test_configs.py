"""Every config parses into objects' arguments, and its first line is its command."""

import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule

from fusionlab.commands.fit import FusionCLI
from fusionlab.data import ImageTasks
from fusionlab.modules import FusionModule
from fusionlab.rules.config import known_rules, known_task_known_rules
from fusionlab.search.base import known_searches

ROOT = Path(__file__).parents[2]
LIGHTNING = sorted(
    path for folder in ("clip", "lm", "t5", "vit") for path in (ROOT / "configs" / folder).glob("*.yaml")
)


def test_there_are_configs() -> None:
    assert len(LIGHTNING) >= 16


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_is_short_and_says_its_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# python -m fusionlab ")
    assert f"--config {path.relative_to(ROOT)}" in lines[0]
    assert len(lines) <= 60
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", LIGHTNING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_fit_config_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusionCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(FusionCLI, "before_instantiate_classes", lambda self: None)
    monkeypatch.setattr(FusionCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(FusionCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = FusionCLI(
        FusionModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, save_config_callback=None,
        seed_everything_default=42, auto_configure_optimizers=False, load_from_checkpoint_support=False,
        parser_kwargs={"exit_on_error": False}, args=["fit", "--config", str(path)],
    )  # fmt: skip
    written = yaml.safe_load(path.read_text())
    for section, values in written.items():
        parsed = cli.config["fit"][section]
        for key, value in (values.get("init_args") or values).items():
            found = parsed["init_args"][key] if "init_args" in values else parsed[key]
            assert found == value, f"{section}.{key}"


def test_image_configs_name_known_tasks() -> None:
    for path in (ROOT / "configs" / "clip").glob("*.yaml"):
        data = yaml.safe_load(path.read_text())["data"]["init_args"]
        if "suite" in data:
            assert ImageTasks(**data).definitions
        named = [task for task in data.get("tasks", []) if isinstance(task, str)]
        if named:
            assert list(ImageTasks(named).definitions) == named


def test_two_configs_have_every_rule_and_search_of_several_models() -> None:
    text = "".join((ROOT / "configs" / "sweep" / name).read_text() for name in ("methods.yaml", "wemoe.yaml"))
    known = {*known_rules(), *known_task_known_rules(), *known_searches()}
    absent = {name for name in known if not re.search(rf"\b{name}\b", text)}
    of_two_models_or_one = {"slerp", "nuslerp", "passthrough"}
    parts_of_ties, needs_a_number = {"trim", "disjoint_mean"}, {"lines"}
    assert absent == of_two_models_or_one | parts_of_ties | needs_a_number

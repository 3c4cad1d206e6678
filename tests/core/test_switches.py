"""Flags that are off by default: alone, or with a value as Lightning's users and files write it."""

from __future__ import annotations

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from fusionlab.commands.flags import add_flags
from fusionlab.commands.fuse.command import parse as parse_fuse
from fusionlab.commands.parser import parse, with_flag
from fusionlab.commands.push import _SWITCHES, PushRecipe
from fusionlab.commands.sweep.command import SWITCHES
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.errors import InputError

WRITTEN = [([], True), (["true"], True), (["false"], False)]


@pytest.mark.parametrize(("value", "expected"), WRITTEN)
def test_a_switch_stands_alone_or_has_a_value(value: list[str], expected: bool) -> None:
    given = ["--dry_run", *value, "--output", "out"]
    assert parse(SweepRecipe, given, "sweep", SWITCHES).dry_run is expected
    assert parse_fuse([*given, "--base", "b", "--finetuned.a", "a"]).dry_run is expected
    pushed = with_flag(["--repo", "a/b", "--private", *value, "FOLDER", "--dry_run"], "folder", switches=_SWITCHES)
    recipe = parse(PushRecipe, pushed, "push", _SWITCHES)
    assert (recipe.folder, recipe.private, recipe.dry_run) == ("FOLDER", expected, True)


@pytest.mark.parametrize(("value", "expected"), WRITTEN)
@pytest.mark.parametrize("name", ["overwrite", "train_only", "dry_run"])
def test_a_switch_of_fit(name: str, value: list[str], expected: bool) -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    add_flags(parser)
    found = parser.parse_args([f"--{name}", *value])
    assert found[name] is expected
    assert not any(found[other] for other in {"overwrite", "train_only", "dry_run"} - {name})
    assert parser.parse_args([f"--{name}=false"])[name] is False


def test_another_value_is_refused() -> None:
    with pytest.raises(InputError, match="dry_run: expected bool, got 'maybe'"):
        parse(SweepRecipe, ["--output", "out", "--dry_run", "maybe"], "sweep", SWITCHES)

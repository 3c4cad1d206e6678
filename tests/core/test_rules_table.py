"""The table of ``python -m fusionlab rules``: all rules, as the classes are, and true."""

from pathlib import Path

import pytest
import torch

import fusionlab
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors
from fusionlab.commands.rules import HEADER, _instance, markdown, rows
from fusionlab.rules.config import known_rules, known_task_known_rules
from fusionlab.search.base import known_searches
from fusionlab.tensors.masked import MaskedVectors

TABLE = {row[0]: dict(zip(HEADER, row, strict=True)) for row in rows()}


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    assert page.endswith(markdown()), "python -m fusionlab rules, below the page's own first lines"
    assert main(["rules"]) == 0
    assert capsys.readouterr().out == markdown()
    assert set(TABLE) == {*known_rules(), *known_task_known_rules(), *known_searches()}
    needing = {name for name, row in TABLE.items() if row["needs the task"] == "yes"}
    assert needing == {*known_task_known_rules(), "validated_masks"}


def test_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "ties"]) == 2
    assert "rules takes no arguments, got 'ties'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*known_rules(), *known_task_known_rules()])
def test_what_it_says_of_adapters_is_so(name: str) -> None:
    backbone = fusionlab.load_backbone("tiny-clip")
    layer = next(name for name, part in backbone.model.named_modules() if name.endswith("q_proj"))
    weight = backbone.model.get_submodule(layer).weight
    draw = torch.Generator().manual_seed(0)
    adapters = {}
    for task in ("a", "b"):
        factors = Factors(
            torch.randn(2, weight.shape[1], generator=draw), torch.randn(weight.shape[0], 2, generator=draw), 2.0
        )
        adapters[task] = Adapter({layer: factors}, "lora", "tiny-clip")
    rule = _instance((known_rules() | known_task_known_rules())[name])
    fused = fusionlab.fuse(rule if name != "task_arithmetic" else "average", backbone, finetuned=adapters)
    says = TABLE[name]["of adapters makes"]
    assert isinstance(fused.weights, Adapter) == (says == "an adapter")
    assert isinstance(fused.weights, MaskedVectors) == (says == "masks")
    assert says in ("an adapter", "full weights", "masks")

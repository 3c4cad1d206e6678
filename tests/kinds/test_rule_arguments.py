"""Arguments that no rule can work with end `fuse` with one message, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml

from fusionlab import rules
from fusionlab.__main__ import main
from fusionlab.errors import InputError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
INF, NAN = float("inf"), float("nan")
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "inf": ("lines", {"beta": INF}, "lines.beta: expected"),
    "nan": ("metagpt", {"multiplier": NAN}, "metagpt.multiplier: expected"),
    "one of two": ("metagpt", {"multiplier": [0.1, INF], "scope": "tensor"}, "metagpt.multiplier: "),
    "inside": ("dare", {"rule": {"class_path": "ties", "init_args": {"scaling_coefficient": NAN}}},
               "ties.scaling_coefficient: expected"),
    "beyond float32": ("task_arithmetic", {"scaling_coefficient": 1e300}, "the fused factors overflow torch.float32"),
    "a task too many": ("ties", {"density": {"a": 0.2, "b": 0.2, "c": 0.2}}, "ties.density: c: no such task"),
    "inside, too": ("dare", {"rule": "average", "drop_rate": {"a": 0.2, "b": 0.2, "A": 0.2}}, "A: no such task"),
    "by block, too": ("ties", {"density": {"a": [0.2, 0.3], "b": 0.2, "c": 0.2}, "scope": "tensor"}, "c: no such task"),
    "a base class": ("fusionlab.rules.dropping.Dropping", {}, "is what rules are made of"),
    "another": ("fusionlab.rules.matrix_rule.MatrixRule", {}, "is what rules are made of"),
    "by tensor": ("fusionlab.rules.by_tensor.ByTensor", {"class_path": "average", "init_args": {}}, "are made of"),
    "a rate": ("wudi", {"learning_rate": 1e300}, "learning_rate must be positive, the latter below 1e6"),
    "a scale of the base": ("passthrough", {"scale": 0.5}, "passthrough.scale 0.5 scales the whole model"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(root / "base")
    for task in "ab":
        model = transformers.LlamaForCausalLM.from_pretrained(root / "base")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(root / task)
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, init_args, message = REFUSED[case]
    tasks = "a" if name == "passthrough" else "ab"
    recipe = {
        "base": str(folder / "base"), "finetuned": {task: str(folder / task) for task in tasks},
        "rule": {"class_path": name, "init_args": init_args}, "output": str(tmp_path / "out"),
    }  # fmt: skip
    recipe |= {"save": "weights"} if name == "passthrough" else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize("number", [INF, -INF, NAN])
def test_flags_give_infinite_numbers_as_numbers(number: float) -> None:
    for name, init_args in (("lines", {"beta": number}), ("metagpt", {"scope": "tensor", "multiplier": [0.1, number]})):
        with pytest.raises(InputError, match=rf"{name}\.\w+: expected finite numbers, got"):
            rules.from_config({"class_path": name, "init_args": init_args})


def test_a_scale_of_what_the_adapters_change_only(folder: Path, tmp_path: Path) -> None:
    scale = [{"filter": "q_proj", "value": 0.5}, {"value": 1.0}]
    recipe = {
        "base": str(folder / "base"), "finetuned": {"a": str(folder / "a")}, "save": "weights",
        "rule": {"class_path": "passthrough", "init_args": {"scale": scale}}, "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["fuse", "--config", str(tmp_path / "recipe.yaml"), "--rule.init_args.scale", "0.5"]) == 2

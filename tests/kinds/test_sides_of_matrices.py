"""Rules that tell a matrix's sides apart see ``(out, in)``, whichever way the base stores it, in every way to fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import fusionlab
from fusionlab import rules
from fusionlab.__main__ import main

RULES = ["wudi", "knots", "iso_cts", "iso_c", "tsv_m"]
TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, three adapters over it, and the models that these make merged."""
    root = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "base")
    for seed, task in enumerate("abc", 1):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel.from_pretrained(root / "base")
        targets = ["c_attn", "c_fc", "mlp.c_proj"]
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(root / task)
        adapted.merge_and_unload().save_pretrained(root / f"full_{task}")
    return root


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def expected(rule: Any, folder: Path) -> dict[str, Tensor]:
    """The rule on the weights as linear layers of torch store them."""

    def turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.T.contiguous() if name.endswith(TRANSPOSED) else value.clone() for name, value in state.items()
        }

    finetuned = {task: turned(weights(folder / f"full_{task}")) for task in "abc"}
    return turned(fusionlab.fuse(rule, turned(weights(folder / "base")), finetuned=finetuned).weights)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[name], wanted[name], rtol=0, atol=2e-5) for name in wanted)


@pytest.mark.parametrize("name", RULES)
def test_weights_stored_in_by_out(folder: Path, tmp_path: Path, name: str) -> None:
    rule = rules.from_config(name)
    wanted = expected(rule, folder)
    # as files, full and of adapters
    for start in ("full_", ""):
        inputs = [part for task in "abc" for part in (f"--finetuned.{task}", str(folder / f"{start}{task}"))]
        output = tmp_path / f"out{start}"
        argv = ["fuse", "--base", str(folder / "base"), *inputs, "--rule", name, "--save", "weights"]
        assert main([*argv, "--output", str(output)]) == 0
        assert close(weights(output), wanted), start
    # in memory, of a model
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "base")
    states = {
        task: transformers.GPT2LMHeadModel.from_pretrained(folder / f"full_{task}").state_dict() for task in "abc"
    }
    names = {key: key for key in weights(folder / "base")}
    finetuned = {task: {key: state[key] for key in names} for task, state in states.items()}
    made = fusionlab.fuse(rule, model, finetuned=finetuned)
    assert close(made.weights, wanted)
    # the other way round would be another model, but for rules that do not tell the sides apart
    as_stored = fusionlab.fuse(
        rule,
        {key: value.clone() for key, value in weights(folder / "base").items()},
        finetuned={task: weights(folder / f"full_{task}") for task in "abc"},
    )
    assert close(as_stored.weights, wanted) is (name in ("iso_c", "tsv_m"))

"""How samples of one row are kept apart is found by trying: by positions, by a mask, or the architecture is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionlab.__main__ import main
from fusionlab.backbones.causal import CausalBackbone
from fusionlab.backbones.masks import visible_within
from fusionlab.errors import InputError

SAMPLES = [list(range(30, 52)), [60, 61, 62], list(range(100, 112))]  # one is longer than a window of 8


def packed() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[token for sample in SAMPLES for token in sample]])
    return ids, torch.cat([torch.arange(len(sample)) for sample in SAMPLES])[None]


def without_own_masks(backbone: CausalBackbone) -> CausalBackbone:
    """An architecture that rotates by positions, but takes them for no border: an all-ones mask stands in."""
    forward = backbone.model.forward

    def leaking(input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Any = None, **more: Any) -> Any:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **more)

    backbone.model.forward = leaking
    return backbone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "mistral", "mixtral"])
@pytest.mark.parametrize("training", [False, True])
def test_where_positions_leak_a_mask_keeps_samples_apart(
    causal_folder: Callable[[str], Path], kind: str, attention: str, training: bool
) -> None:
    if (kind, attention) == ("gemma2", "sdpa"):
        attention = "eager"  # which it alone knows
    backbone = CausalBackbone.load(str(causal_folder(kind)), name=kind)
    backbone.model.set_attn_implementation(attention)
    ids, positions = packed()
    with torch.no_grad():
        expected = [backbone.logits(torch.tensor([sample]))[0] for sample in SAMPLES]
        leaking = without_own_masks(backbone)
        leaking.model.train(training)
        found = leaking.logits(ids, position_ids=positions)[0]
    assert leaking._apart_by == "mask"
    assert leaking.model.training == training
    for own, alone in zip(found.split([len(sample) for sample in SAMPLES]), expected, strict=True):
        torch.testing.assert_close(own.log_softmax(-1), alone.log_softmax(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gemma2", "gpt2", "phi3", "mixtral", "mistral"])
def test_positions_keep_samples_apart_where_transformers_masks_by_them(
    causal_folder: Callable[[str], Path], kind: str
) -> None:
    backbone = CausalBackbone.load(str(causal_folder(kind)), name=kind)
    before = torch.get_rng_state()
    backbone.check_packing(64)
    assert backbone._apart_by == "positions"
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in backbone.model.modules())


def state_space(tokenizer: Any, folder: Path) -> Path:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=2)
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_architectures_that_carry_a_state_along_are_refused_before_anything_is_written(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = state_space(tokenizer, tmp_path / "mamba")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"one two {i}"}) + "\n" for i in range(40)))
    tasks = json.dumps([{"name": "a", "path": str(tmp_path / "a.jsonl")}])
    argv = ["fit", "--model", "CausalModule", "--model.backbone", str(folder), "--model.target_modules", "[in_proj]"]
    argv += ["--data", "ChatTasks", "--data.tasks", tasks, "--data.cache_dir", str(tmp_path / "cache")]
    argv += ["--data.packing", "true", "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path / "run")]
    assert main(argv) == 2
    assert "MambaForCausalLM, does not keep samples of one row apart" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fault", ["ignores both", "shifted positions", "sees all", "drops positions", "forgets", "leaks a little"]
)
def test_architectures_of_which_neither_way_is_exact_are_refused(
    causal_folder: Callable[[str], Path], fault: str
) -> None:
    backbone = CausalBackbone.load(str(causal_folder("gpt2" if fault == "drops positions" else "llama")), name="odd")
    forward = backbone.model.forward

    def odd(input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Any = None, **more: Any) -> Any:
        ones = torch.ones_like(input_ids)
        given = {"position_ids": position_ids, "attention_mask": ones}
        if fault == "ignores both":
            given["position_ids"] = None
        if fault == "shifted positions" and position_ids is not None:
            given["position_ids"] = position_ids + torch.arange(position_ids.shape[1])
        if fault == "sees all":
            given["attention_mask"] = torch.zeros(len(ones), 1, ones.shape[1], ones.shape[1])
        if fault == "drops positions":
            given = {"position_ids": None, "attention_mask": attention_mask}
        if fault == "forgets" and isinstance(attention_mask, Tensor):
            given["attention_mask"] = attention_mask[:, :, -1:, :].expand_as(attention_mask)
        if fault == "leaks a little" and isinstance(attention_mask, Tensor):
            given["attention_mask"] = attention_mask.clamp(min=-6.0)
        return forward(input_ids=input_ids, **given, **more)

    backbone.model.forward = odd
    with pytest.raises(InputError, match=r"'odd', a .*, does not keep samples of one row apart"):
        backbone.check_packing(64)


@pytest.mark.parametrize(("longest", "is_refused"), [(24, False), (64, True)])
def test_a_window_counts_where_a_sample_can_be_longer(
    causal_folder: Callable[[str], Path], longest: int, is_refused: bool
) -> None:
    """A mask of ours that forgets a window of 40 is exact for samples that the window holds, and for no longer ones."""
    backbone = CausalBackbone.load(str(causal_folder("mistral")), name="mistral")
    config = backbone.model.config
    config.sliding_window = 40
    forward = backbone.model.forward

    def odd(input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Any = None, **more: Any) -> Any:
        if position_ids is not None:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            else:
                visible = visible_within(position_ids)[:, None]
                attention_mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        return forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **more)

    backbone.model.forward = odd
    if is_refused:
        with pytest.raises(InputError, match="does not keep samples of one row apart"):
            backbone.check_packing(longest)
    else:
        backbone.check_packing(longest)
        assert backbone._apart_by == "mask"


def test_padding_is_a_sample_of_its_own() -> None:
    visible = visible_within(torch.tensor([[0, 1, 2, 0, 1, 0, 1]]))[0]
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1],
    ]  # fmt: skip

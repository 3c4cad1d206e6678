"""Adapters beside what they leave alone: copies of the base that PEFT saves, experts, and our own outputs as inputs."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from often import often
from safetensors.torch import load_file, save_file

from fusionlab.__main__ import main
from fusionlab.runs.loading import load_weights

TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 16}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 6}
ADAPTER = "adapter_model.safetensors"


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **more))


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def gpt2() -> Any:
    config = hf.GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return hf.GPT2LMHeadModel(config)


def bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**TEXT))


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1))


def qwen2() -> Any:
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**TEXT, **EXPERTS, shared_expert_intermediate_size=6))


def qwen3() -> Any:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=4))


def olmoe() -> Any:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**TEXT, num_experts=2, num_experts_per_tok=1))


def adapt(make: Callable[[], Any], targets: list[str], folder: Path, seed: int = 1, **saving: Any) -> Path:
    """A base, and an adapter over it as PEFT saves it."""
    torch.manual_seed(0)
    make().save_pretrained(folder / "base")
    model = make().from_pretrained(folder / "base")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(folder / f"a{seed}", **saving)
    return folder / f"a{seed}"


def fuse(folder: Path, *finetuned: Path, output: str = "out", base: str = "base", flags: tuple[str, ...] = ()) -> int:
    inputs = [part for number, path in enumerate(finetuned) for part in (f"--finetuned.t{number}", str(path))]
    arguments = ["fuse", "--base", str(folder / base), *inputs, "--output", str(folder / output), "--rule", "average"]
    codes = [main([*arguments, *flags, *dry]) for dry in (["--dry_run"], [])]
    assert codes[0] == codes[1]
    return codes[0]


COPIES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "a head": (llama, ["q_proj", "lm_head"]),
    "an embedding": (llama, ["q_proj", "embed_tokens"]),
    "both": (llama, ["lm_head", "embed_tokens"]),
    "a tied head": (tied, ["q_proj", "lm_head"]),
    "a decoder": (bert, ["query", "decoder"]),
    "asked for": (llama, ["q_proj"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", COPIES)
def test_copies_of_the_base_beside_an_adapter(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, targets = COPIES[case]
    plain = adapt(make, targets, tmp_path, save_embedding_layers=False)
    copied = adapt(make, targets, tmp_path / "copied", save_embedding_layers=True)
    state = load_file(copied / ADAPTER)
    beside = {name: value.to(dtype) for name, value in state.items() if ".lora_" not in name}
    assert beside
    save_file(state | beside, copied / ADAPTER, metadata={"format": "pt"})
    assert fuse(tmp_path, plain, output="plain") == fuse(tmp_path, copied, output="with") == 0
    with_copies, without = (load_file(tmp_path / name / ADAPTER) for name in ("with", "plain"))
    assert with_copies.keys() == without.keys()
    assert all(torch.equal(with_copies[name], value) for name, value in without.items())


def test_copies_that_were_trained_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = adapt(llama, ["q_proj", "lm_head"], tmp_path, save_embedding_layers=True)
    state = load_file(path / ADAPTER)
    name = next(name for name in state if ".lora_" not in name)
    for changed in (state[name] + 0.01, torch.zeros(16, 8), torch.ones(3, 3)):
        save_file(state | {name: changed}, path / ADAPTER, metadata={"format": "pt"})
        assert fuse(tmp_path, path) == 2
        told = capsys.readouterr().err
        assert re.search("whole weights", told), told
        assert "lm_head" in told


def test_copies_are_left_out_for_a_model_in_memory(tmp_path: Path) -> None:
    path = adapt(llama, ["q_proj", "lm_head"], tmp_path, save_embedding_layers=True)
    loaded = load_weights(path, llama().from_pretrained(tmp_path / "base")).weights
    assert "lm_head" in loaded.factors


EXPERT_MODELS = {"mixtral": mixtral, "qwen2": qwen2, "qwen3": qwen3, "olmoe": olmoe}


@pytest.mark.parametrize("flags", [(), ("--save", "weights"), ("--rule", "tsv_m"), ("--rule", "ties")], ids=str)
@pytest.mark.parametrize("stored", ["apart", "fused"])
@pytest.mark.parametrize("case", EXPERT_MODELS)
def test_experts_that_an_adapter_leaves_alone(case: str, stored: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Whether the base's files have them one by one, as transformers writes them, or as one, as it holds them."""
    path = adapt(EXPERT_MODELS[case], ["q_proj", "o_proj"], tmp_path)
    names = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert any(".experts.0." in name for name in names)
    if stored == "fused":
        state = EXPERT_MODELS[case]().from_pretrained(tmp_path / "base").state_dict()
        assert not any(".experts.0." in name for name in state)
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "base" / "model.safetensors")
    assert fuse(tmp_path, path, flags=flags) == 0
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert record["tensors"]["fused"] == 4
    if (tmp_path / "out" / "model.safetensors").exists():
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
        assert before.keys() == after.keys()
        assert sum(not torch.equal(before[name], after[name]) for name in before) == 4


OUTPUTS: dict[str, tuple[str, ...]] = {
    "an adapter": (),
    "of a rank": ("--rank", "3"),
    "of a larger rank": ("--rank", "9"),
    "in core space": ("--rule", "tsv_m"),
    "weights": ("--save", "weights"),
    "weights in bfloat16": ("--save", "weights", "--dtype", "bfloat16"),
    "weights in small shards": ("--save", "weights", "--max_shard_size", "500"),
    "ties": ("--rule", "ties", "--rule.density", "0.5"),
}


MODELS = {"llama": llama, "tied": tied, "gpt2": gpt2, "mixtral": mixtral}


@pytest.mark.parametrize("name", often(MODELS, "tied", "gpt2"))
@pytest.mark.parametrize("kind", OUTPUTS)
def test_our_output_is_an_input(kind: str, name: str, tmp_path: Path) -> None:
    """Alone, beside another, and, where it is a whole model, as the base."""
    make = MODELS[name]
    targets = ["attn.c_proj"] if make is gpt2 else ["q_proj", "v_proj"]
    first = adapt(make, targets, tmp_path)
    second = adapt(make, targets, tmp_path, seed=2)
    assert fuse(tmp_path, first, second, flags=OUTPUTS[kind]) == 0
    out = tmp_path / "out"
    assert fuse(tmp_path, out, output="again") == 0
    assert fuse(tmp_path, out, first, output="beside", flags=OUTPUTS[kind]) == 0
    norms = [json.loads((tmp_path / name / "fusion.json").read_text())["norms"] for name in ("again", "beside")]
    assert norms[0]["t0"] > 0
    assert norms[0]["t0"] == pytest.approx(norms[1]["t0"], rel=1e-6)
    if not (out / ADAPTER).exists():
        assert fuse(tmp_path, first, base="out", output="over", flags=("--allow_other_base",)) == 0

"""The layout of a weight is that of its layer in the base, whatever one flag for the whole adapter says.

Adapters are PEFT's, over models of the libraries' own classes; the oracle is what PEFT adds to each layer, and the
network that PEFT runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusionlab import adapters
from fusionlab.__main__ import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16, "tie_word_embeddings": False}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def gpt2(**more: Any) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | more))


def openai() -> Any:
    config = transformers.OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    config.tie_word_embeddings = False
    return transformers.OpenAIGPTLMHeadModel(config)


def decision() -> Any:
    config = {"n_layer": 1, "n_head": 2, "state_dim": 3, "act_dim": 2, "hidden_size": 16, "max_ep_len": 8}
    return transformers.DecisionTransformerModel(transformers.DecisionTransformerConfig(**config))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))


def vit() -> Any:
    sizes = {key: TEXT[key] for key in TEXT if key != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


def wav2vec2() -> Any:
    sizes = TEXT | {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    )


class Parts(nn.Module):
    """Layers without an architecture that names them: a model of torch's own classes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = nn.Linear(6, 8), nn.Linear(8, 8)
        self.embedding = nn.Embedding(12, 8)
        self.line, self.plane, self.space = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, (2, 3)), nn.Conv3d(2, 4, 2)
        self.point, self.grouped = nn.Conv2d(3, 4, 1), nn.Conv1d(4, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)


CASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "GPT-2, Conv1D and Linear": (gpt2, ["attn.c_proj", "lm_head"]),
    "GPT-2, Linear wrapped first": (gpt2, ["lm_head", "attn.c_attn", "mlp.c_fc", "mlp.c_proj"]),
    "GPT-2, Conv1D alone, square": (gpt2, ["attn.c_proj"]),
    "GPT-2, with its embeddings": (gpt2, ["wte", "wpe", "attn.c_proj", "lm_head"]),
    "OpenAI GPT": (openai, ["attn.c_proj", "attn.c_attn", "lm_head"]),
    "decision transformer": (decision, ["attn.c_proj", "c_fc", "embed_state", "predict_return"]),
    "llama, with its embedding": (llama, ["q_proj", "up_proj", "embed_tokens"]),
    "vit, with its convolution": (vit, ["q_proj", "projection"]),
    "wav2vec2, convolutions of sound": (wav2vec2, ["conv_layers.1.conv", "q_proj"]),
    "torch, linear and embedding": (Parts, ["linear", "square", "embedding"]),
    "torch, convolutions": (Parts, ["line", "plane", "space", "point"]),
    "torch, attention": (Parts, ["attention", "square"]),
}


def save_base(model: Any, folder: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def wrapped(model: Any, targets: list[str], seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **more)
    return peft.get_peft_model(model, config).eval()


def save_adapter(base: Path, make: Callable[[], Any], targets: list[str], seed: int, folder: Path) -> dict[str, Tensor]:
    """As PEFT saves it; returns what PEFT adds to each stored weight."""
    model = loaded(base, make)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = wrapped(model, targets, seed)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    merged = tuned.merge_and_unload().state_dict()
    return {name: merged[name] - value for name, value in before.items() if not torch.equal(merged[name], value)}


def loaded(folder: Path, make: Callable[[], Any]) -> Any:
    model = make()
    if hasattr(model, "from_pretrained"):
        return type(model).from_pretrained(folder)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def run(base: Path, finetuned: dict[str, Path], output: Path, *flags: str) -> dict[str, Any]:
    inputs = [part for task, path in finetuned.items() for part in (f"--finetuned.{task}", str(path))]
    assert main(["fuse", "--base", str(base), *inputs, "--output", str(output), *flags]) == 0
    return json.loads((output / "fusion.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_fused_weights_are_the_sum_of_what_peft_adds(case: str, tmp_path: Path) -> None:
    make, targets = CASES[case]
    torch.manual_seed(0)
    base = save_base(make(), tmp_path / "base")
    updates = {task: save_adapter(base, make, targets, seed, tmp_path / task) for seed, task in enumerate("ab", 1)}
    record = run(
        base, {task: tmp_path / task for task in "ab"}, tmp_path / "out", "--rule", "average", "--save", "weights"
    )
    before, after = loaded(base, make).state_dict(), loaded(tmp_path / "out", make).state_dict()
    assert updates["a"].keys() == updates["b"].keys() != set()
    for name, value in before.items():
        update = sum(updates[task][name] / 2 for task in "ab") if name in updates["a"] else torch.zeros(())
        torch.testing.assert_close(after[name], value + update, rtol=0, atol=2e-6)
    norm = math.sqrt(sum(update.double().square().sum().item() for update in updates["a"].values()))
    assert record["norms"]["a"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("rule", [("average",), ("average", "--rank", "3")], ids=" ".join)
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_the_fused_adapter_as_that_sum(case: str, rule: tuple[str, ...], tmp_path: Path) -> None:
    """Of whatever kind a layer is; cut to a rank it is what the best approximation of each layer's update adds."""
    make, targets = CASES[case]
    if "attention" in targets:
        rule = rule[:1]  # one rank serves the parts of fused attention
    torch.manual_seed(0)
    base = save_base(make(), tmp_path / "base")
    updates = {task: save_adapter(base, make, targets, seed, tmp_path / task) for seed, task in enumerate("ab", 1)}
    record = run(base, {task: tmp_path / task for task in "ab"}, tmp_path / "out", "--rule", *rule)
    before = loaded(base, make).state_dict()
    merged = peft.PeftModel.from_pretrained(loaded(base, make), tmp_path / "out").merge_and_unload().state_dict()
    for name, value in before.items():
        update = sum(updates[task][name] / 2 for task in "ab") if name in updates["a"] else torch.zeros(())
        error = (merged[name] - value - update).norm() / update.norm().clamp_min(1)
        assert error <= (record["truncation_error"] * 2 + 1e-6 if "truncation_error" in record else 2e-6), name
    again = run(base, {"fused": tmp_path / "out"}, tmp_path / "again", "--rule", "average", "--save", "weights")
    assert again["norms"]["fused"] > 0
    after = loaded(tmp_path / "again", make).state_dict()
    for name in before:
        torch.testing.assert_close(after[name], merged[name], rtol=0, atol=4e-6)


def test_logits_of_gpt2_are_those_of_peft(tmp_path: Path) -> None:
    """The example of the fault: one adapter over Conv1D and Linear layers, whose one flag is wrong for one of them."""
    torch.manual_seed(0)
    base = save_base(gpt2(), tmp_path / "base")
    tuned = wrapped(gpt2().from_pretrained(base), ["attn.c_proj", "lm_head"], 1)
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = tuned(tokens).logits
        for flags in (("--save", "weights"), ("--save", "adapter")):
            output = tmp_path / flags[1]
            run(base, {"a": tmp_path / "a"}, output, "--rule", "average", *flags)
            model = gpt2().from_pretrained(base if flags[1] == "adapter" else output)
            model = peft.PeftModel.from_pretrained(model, output) if flags[1] == "adapter" else model
            torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=1e-5, atol=1e-5)


CUSTOM = """
raise RuntimeError("code that came with a checkpoint was run")
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

class Block(nn.Module):
    def __init__(self, config):
        self.mix = {maker}(config.n_embd, config.n_embd)

class OwnModel(PreTrainedModel):
    def __init__(self, config):
        self.h = nn.ModuleList([Block(config) for _ in range(2)])
"""


@pytest.mark.parametrize(("maker", "is_transposed"), [("Conv1D", True), ("nn.Linear", False)])
def test_custom_code_tells_the_layout(maker: str, is_transposed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "modeling_own.OwnModel"}}
    (tmp_path / "base").mkdir()
    save_file({"h.0.mix.weight": torch.zeros(6, 6)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "modeling_own.py").write_text(CUSTOM.format(maker=maker))
    lora_a, lora_b = torch.randn(2, 6), torch.randn(6, 2)
    adapters.save_adapter(tmp_path / "a", adapters.Adapter({"h.0.mix": adapters.Factors(lora_a, lora_b, 2.0)}))
    run(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", "--rule", "average", "--save", "weights")
    found = load_file(tmp_path / "out" / "model.safetensors")["h.0.mix.weight"]
    torch.testing.assert_close(found, (lora_b @ lora_a).T if is_transposed else lora_b @ lora_a)


REFUSED: dict[str, tuple[Callable[[], Any], list[str], dict[str, Any], str]] = {
    "a square layer that may be Conv1D, without an architecture": (
        gpt2, ["attn.c_proj"], {"config": False}, r"h\.0\.attn\.c_proj\.weight \(16, 16\) transposed.*is not known",
    ),
    "a convolution in groups": (Parts, ["grouped"], {}, "grouped in .*a convolution in groups"),
    "an adapter of the other orientation": (llama, ["up_proj"], {"turned": True}, r"up_proj\.weight: shape"),
    "bare parameters": (Parts, ["linear"], {"target_parameters": ["square.weight"]}, "target_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused_by_name(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, targets, how, message = REFUSED[case]
    torch.manual_seed(0)
    base = save_base(make(), tmp_path / "base")
    more = {key: value for key, value in how.items() if key == "target_parameters"}
    wrapped(loaded(base, make), targets, 1, **more).save_pretrained(tmp_path / "a")
    if not how.get("config", True):
        (base / "config.json").write_text("{}")
    if how.get("turned"):
        path = tmp_path / "a" / "adapter_model.safetensors"
        turned = {"lora_A": "lora_B", "lora_B": "lora_A"}
        state = {
            name.replace(part, turned[part]): value.T.contiguous()
            for name, value in load_file(path).items()
            for part in turned
            if part in name
        }
        save_file(state, path)
    capsys.readouterr()
    flags = ["--base", str(base), "--finetuned.a", str(tmp_path / "a"), "--output", str(tmp_path / "out"), "--dry_run"]
    assert main(["fuse", *flags]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert re.search(message, error), error


LEFT_OUT: dict[str, Callable[[str, Tensor], tuple[str, Tensor]]] = {
    "narrower": lambda name, value: (name, value[..., :-1] if "lora_A" in name else value),
    "wider": lambda name, value: (name, torch.cat([value, value]) if "lora_B" in name else value),
    "turned": lambda name, value: (
        name.replace("lora_A", "X").replace("lora_B", "lora_A").replace("X", "lora_B"),
        value.T,
    ),
    "deeper": lambda name, value: (name.replace("layers.1", "layers.7"), value),
    "elsewhere": lambda name, value: (name.replace("layers.1.mlp.up_proj", "layers.1.cross.up_proj"), value),
}


@pytest.mark.parametrize("flags", [("average",), ("tsv_m",), ("ties",), ("average", "--save", "weights")], ids=" ".join)
@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_does_not_fit_is_refused_by_name_or_left_to_the_base(
    case: str, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer of one adapter: the advised ``mismatched_tensors: base`` takes it from the base, and fuses the rest."""
    torch.manual_seed(0)
    base = save_base(llama(), tmp_path / "base")
    updates = {
        task: save_adapter(base, llama, ["q_proj", "up_proj"], seed, tmp_path / task)
        for seed, task in enumerate("ab", 1)
    }
    path = tmp_path / "b" / "adapter_model.safetensors"
    state = dict(
        LEFT_OUT[case](name, value) if "layers.1.mlp" in name else (name, value)
        for name, value in load_file(path).items()
    )
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    inputs = [part for task in "ab" for part in (f"--finetuned.{task}", str(tmp_path / task))]
    arguments = ["fuse", "--base", str(base), *inputs, "--output", str(tmp_path / "out"), "--rule", *flags]
    capsys.readouterr()
    told = []
    for more in ([], ["--dry_run"]):
        assert main([*arguments, *more]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert re.search(r"'b' does not fit the base.*up_proj\.weight.*mismatched_tensors: base", told[0])
    assert main([*arguments, "--mismatched_tensors", "base", "--dry_run"]) == 0
    assert main([*arguments, "--mismatched_tensors", "base"]) == 0
    before, after = loaded(base, llama).state_dict(), None
    if (tmp_path / "out" / "adapter_config.json").is_file():
        after = peft.PeftModel.from_pretrained(loaded(base, llama), tmp_path / "out").merge_and_unload().state_dict()
    after = after or loaded(tmp_path / "out", llama).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = set(updates["a"])
    if case not in ("deeper", "elsewhere"):  # those layers are adapted by the other one alone, which fits
        expected -= {name for name in expected if "layers.1.mlp" in name}
    assert changed == expected

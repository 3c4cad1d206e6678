"""Equal bytes are no tie: two names are one tensor where the architecture ties them, and nowhere else.

Models are transformers' own classes, tiny, saved by them; adapters are PEFT's. The oracle is the model itself with the
adapters' updates added to the layers that they sit on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionlab import rules
from fusionlab.__main__ import main
from fusionlab.engine import fuse
from fusionlab.tensors.architecture import Architecture

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
LLAMA = TEXT | {"num_key_value_heads": 1}
IMAGE = {key: TEXT[key] for key in TEXT if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | more))


def gpt2(**more: Any) -> Any:
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | more))


def gemma() -> Any:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**LLAMA, head_dim=8))


def t5(**more: Any) -> Any:
    config = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**config | more, decoder_start_token_id=0, pad_token_id=0)
    )


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, max_position_embeddings=16))


def llava() -> Any:
    text, vision = LLAMA | {"model_type": "llama"}, IMAGE | {"model_type": "clip_vision_model", "projection_dim": 16}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=39, tie_word_embeddings=False
    )
    return transformers.LlavaForConditionalGeneration(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=3))


def save(model: Any, folder: Path, *, both: tuple[str, ...] = (), pickled: bool = False) -> Path:
    """As transformers writes it, and with the names ``both`` of tied tensors beside the ones it keeps."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = load_file(file) | {name: model.state_dict()[name].clone() for name in both}
    if pickled:
        file.unlink()
        torch.save(dict(model.state_dict()), folder / "pytorch_model.bin")  # shares memory where the model does
    else:
        save_file(state, file, metadata={"format": "pt"})
    return folder


def adapter(base: Path, model_class: Any, folder: Path, targets: list[str] | str, seed: int) -> dict[str, Tensor]:
    """Save a PEFT adapter with a B that is not zero; returns its updates by the names of the weights."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model_class.from_pretrained(base), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)}
    return {
        f"{name.removeprefix('base_model.model.')}.weight": part.get_delta_weight("default").detach()
        for name, part in layers.items()
    }


def run(base: Path, finetuned: dict[str, Path], output: Path, *flags: str) -> dict[str, Any]:
    inputs = [part for task, path in finetuned.items() for part in (f"--finetuned.{task}", str(path))]
    assert main(["fuse", "--base", str(base), *inputs, "--output", str(output), *flags]) == 0
    return json.loads((output / "fusion.json").read_text())


SUM = ("--rule", "task_arithmetic", "--rule.scaling_coefficient", "1.0")


def equal_head(model: Any, head: str, embed: str) -> Any:
    """Not tied, and equal: as a model whose head started from the embedding."""
    with torch.no_grad():
        model.get_parameter(head).copy_(model.get_parameter(embed))
    return model


def grown(model: Any, first: str, second: str) -> Any:
    """An up-scaled base: one block is a copy of another."""
    model.get_submodule(second).load_state_dict(model.get_submodule(first).state_dict())
    return model


def zeroed(model: Any, *names: str) -> Any:
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    return model


def targets(*endings: str) -> str:
    return rf".*\.?({'|'.join(ending.replace('.', chr(92) + '.') for ending in endings)})$"


UNTIED: dict[str, tuple[Callable[[], Any], str]] = {
    "llama, by default": (lambda: equal_head(llama(), "lm_head.weight", "model.embed_tokens.weight"), "lm_head"),
    "gpt2, as it says": (
        lambda: equal_head(gpt2(tie_word_embeddings=False), "lm_head.weight", "transformer.wte.weight"),
        "lm_head",
    ),
    "llava, nested": (
        lambda: equal_head(llava(), "lm_head.weight", "model.language_model.embed_tokens.weight"),
        "lm_head",
    ),
    "llama, layer 1 is layer 0": (lambda: grown(llama(), "model.layers.0", "model.layers.1"), "layers.0.mlp.up_proj"),
    "gpt2, layer 1 is layer 0": (lambda: grown(gpt2(), "transformer.h.0", "transformer.h.1"), "h.0.attn.c_attn"),
    "vit, layer 1 is layer 0": (lambda: grown(vit(), "vit.layers.0", "vit.layers.1"), "layers.1.mlp.fc1"),
    "llama, new projections start at zero": (
        lambda: zeroed(llama(), "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        "layers.1.mlp.down_proj",
    ),
    "t5, encoder equals decoder": (
        lambda: grown(t5(), "encoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.0.SelfAttention"),
        "decoder.block.1.layer.0.SelfAttention.v",
    ),
}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case", UNTIED)
def test_equal_tensors_change_apart(case: str, pickled: bool, tmp_path: Path) -> None:
    """An adapter on one of two equal tensors leaves the other one as it is, to the bit."""
    make, target = UNTIED[case]
    torch.manual_seed(0)
    model = make()
    base = save(model, tmp_path / "base", pickled=pickled)
    update = adapter(base, type(model), tmp_path / "a", targets(target), 1)
    assert len(update) == 1
    record = run(base, {"a": tmp_path / "a"}, tmp_path / "out", *SUM, "--save", "weights")
    assert not set(update) & {*record["tensors"]["tied"], *record["tensors"]["tied"].values()}
    before, after = model.state_dict(), type(model).from_pretrained(tmp_path / "out").state_dict()
    for name, value in before.items():
        expected = value + update[name].to(value).view_as(value) if name in update else value
        tolerance = 1e-6 if name in update else 0.0
        torch.testing.assert_close(after[name], expected, rtol=0, atol=tolerance)


def test_memory_that_a_pickle_shares_is_no_tie(tmp_path: Path) -> None:
    """An up-scaled base whose layers were copied by reference, as ``torch.save`` keeps it."""
    torch.manual_seed(0)
    model = llama()
    save(model, tmp_path / "base", pickled=True)
    state = torch.load(tmp_path / "base" / "pytorch_model.bin", weights_only=True)
    state |= {name.replace("layers.0.", "layers.1."): value for name, value in state.items() if "layers.0." in name}
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    adapter(tmp_path / "base", type(model), tmp_path / "a", targets("layers.0.mlp.up_proj"), 1)
    run(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", *SUM, "--save", "weights")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], state["model.layers.0.mlp.up_proj.weight"])


TIED: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "llama, as it says": (lambda: llama(tie_word_embeddings=True), ("lm_head.weight",), "model.embed_tokens.weight"),
    "gemma, by default": (gemma, ("lm_head.weight",), "model.embed_tokens.weight"),
    "gpt2, by default": (gpt2, ("lm_head.weight",), "transformer.wte.weight"),
    "bert, with a bias": (
        bert,
        ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
        "bert.embeddings.word_embeddings.weight",
    ),
    "t5, in three places": (
        lambda: t5(tie_word_embeddings=True),
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        "shared.weight",
    ),
}


@pytest.mark.parametrize("stored", ["once", "under all names", "bin"])
@pytest.mark.parametrize("case", TIED)
def test_tied_tensors_are_fused_once(case: str, stored: str, tmp_path: Path) -> None:
    """Whatever the files hold of them: norms count them once, and the output is tied again when it is loaded."""
    make, names, source = TIED[case]
    torch.manual_seed(0)
    models = {"base": make(), "a": make()}
    how = {"both": names if stored == "under all names" else (), "pickled": stored == "bin"}
    for name, model in models.items():
        save(model, tmp_path / name, **(how if name == "base" else {}))
    record = run(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", "--rule", "average")
    pairs = zip(*(dict(model.named_parameters()).items() for model in models.values()), strict=True)
    expected = sum((new - old).double().square().sum() for (_, old), (_, new) in pairs) ** 0.5
    assert record["norms"]["a"] == pytest.approx(expected.item(), rel=1e-12)
    assert (source in record["tensors"]["tied"].values()) == (stored != "once")
    loaded = type(models["base"]).from_pretrained(tmp_path / "out")
    after, expected_state = loaded.state_dict(), models["a"].state_dict()
    for name in names:
        tied_to = source if name.endswith("weight") else name
        assert torch.equal(after[name], after[tied_to])
        torch.testing.assert_close(after[name], expected_state[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["both names", "bin", "one name"])
@pytest.mark.parametrize("case", ["llama, as it says", "gpt2, by default", "gemma, by default"])
def test_an_adapter_on_a_tied_head_fuses_into_an_adapter_and_into_weights(case: str, kind: str, tmp_path: Path) -> None:
    """It acts on the head alone, as PEFT runs it, so that in full weights the two are tensors of their own."""
    make, names, source = TIED[case]
    torch.manual_seed(0)
    model = make().eval()
    base = save(model, tmp_path / "base", both=names if kind == "both names" else (), pickled=kind == "bin")
    for seed, task in enumerate("ab"):
        with pytest.warns(UserWarning, match="tie_word_embeddings=True|tied"):
            adapter(base, type(model), tmp_path / task, targets("lm_head", "layers.0.mlp.up_proj"), seed)
    inputs = {task: tmp_path / task for task in "ab"}
    run(base, inputs, tmp_path / "adapter", "--rule", "average")
    record = run(base, inputs, tmp_path / "weights", "--rule", "average", "--save", "weights")
    assert "lm_head.weight" not in record["tensors"]["tied"]
    tokens = torch.arange(12).view(2, 6)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True|tied"):
        fused = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "adapter").eval()
    loaded = type(model).from_pretrained(tmp_path / "weights").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, fused(tokens).logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(loaded.state_dict()[source], model.state_dict()[source])
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["tie_word_embeddings"] is False


def test_present_and_different_are_two_whatever_the_configuration_says(tmp_path: Path) -> None:
    """flan-T5 has a head of its own, and its class reads a tie out of every configuration."""
    torch.manual_seed(0)
    models = {}
    for name in ("base", "a"):
        models[name] = t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu")
        models[name].lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
        save(models[name], tmp_path / name)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "base").tie_word_embeddings
    run(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", *SUM)
    fused = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("lm_head.weight", "shared.weight"):
        torch.testing.assert_close(fused[name], models["a"].state_dict()[name], rtol=0, atol=1e-6)


def test_a_head_that_one_model_has_apart_is_fused_apart(tmp_path: Path) -> None:
    """The base and b leave it to the tie, a trained it: the base's and b's embedding stand for it there."""
    torch.manual_seed(0)
    models = {name: llama(tie_word_embeddings=True) for name in ("base", "a", "b")}
    models["a"].lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
    for name, model in models.items():
        save(model, tmp_path / name)
    record = run(tmp_path / "base", {task: tmp_path / task for task in "ab"}, tmp_path / "out", "--rule", "average")
    assert any("lm_head.weight changes apart" in note for note in record["notes"])
    loaded = llama().from_pretrained(tmp_path / "out").state_dict()
    states = {name: model.state_dict() for name, model in models.items()}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        mean = (states["a"][name] + states["b"][name]) / 2
        torch.testing.assert_close(loaded[name], mean, rtol=0, atol=1e-6)


CUSTOM = """
raise RuntimeError("code that came with a checkpoint was run")
import torch.nn as nn
from transformers import PreTrainedModel

class OwnModel(PreTrainedModel):
    def __init__(self, config):
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Embedding(config.vocab_size, config.hidden_size)

{inner}

class OwnForCausalLM(PreTrainedModel):
    base_model_prefix = "model"
    _tied_weights_keys = {keys}

    def __init__(self, config):
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

{outer}
"""
OWN_CONFIG = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=8, tie_word_embeddings={default}, **kwargs):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
"""
RETURNS = "    def get_input_embeddings(self):\n        return self.{}\n"
CODE: dict[str, tuple[str, str, str, bool, dict[str, Any], bool]] = {
    "a list, as in transformers 4": ('["lm_head.weight"]', "", RETURNS.format("model.wte"), True, {}, True),
    "a list of patterns, the inner model says": (r'[r"lm_head\.\w+"]', RETURNS.format("wte"), "", True, {}, True),
    "a list, nobody says": ('["lm_head.weight"]', "", "", True, {}, True),
    "a dict, as in transformers 5": ('{"lm_head.weight": "model.wte.weight"}', "", "", True, {}, True),
    "its configuration unties by default": ('["lm_head.weight"]', "", RETURNS.format("model.wte"), False, {}, False),
    "config.json unties": (
        '["lm_head.weight"]', "", RETURNS.format("model.wte"), True, {"tie_word_embeddings": False}, False,
    ),
    "no keys": ("None", "", RETURNS.format("model.wte"), True, {}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CODE)
def test_custom_code_is_read_and_not_run(case: str, tmp_path: Path) -> None:
    keys, inner, outer, default, more, is_tied = CODE[case]
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map, **more}
    torch.manual_seed(0)
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        embedding = torch.randn(8, 4)
        state = {"model.wte.weight": embedding, "lm_head.weight": embedding.clone(), "model.w": torch.randn(4, 4)}
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "modeling_own.py").write_text(CUSTOM.format(keys=keys, inner=inner, outer=outer))
        (tmp_path / name / "configuration_own.py").write_text(OWN_CONFIG.format(default=default))
    record = run(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", "--rule", "average")
    assert record["tensors"]["tied"] == ({"lm_head.weight": "model.wte.weight"} if is_tied else {})
    assert not any("equal tensors" in note for note in record["notes"])


@pytest.mark.parametrize(
    "config", [{}, {"architectures": ["NobodyKnowsForCausalLM"]}, {"model_type": "llama"}], ids=str
)
def test_without_a_known_architecture_equal_tensors_are_two_and_named(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save(equal_head(llama(), "lm_head.weight", "model.embed_tokens.weight"), tmp_path / "base")
    update = adapter(base, transformers.LlamaForCausalLM, tmp_path / "a", ["lm_head"], 1)
    (base / "config.json").write_text(json.dumps(config))
    record = run(base, {"a": tmp_path / "a"}, tmp_path / "out", *SUM, "--save", "weights")
    assert record["tensors"]["tied"] == {}
    notes = [note for note in record["notes"] if "lm_head.weight and model.embed_tokens.weight" in note]
    assert len(notes) == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"] + update["lm_head.weight"])


def test_patterns_are_expanded_as_transformers_does(tmp_path: Path) -> None:
    """The heads of a detector's layers are one, by a regular expression."""
    small = {"d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 3}
    config = transformers.DFineConfig(**small, encoder_attention_heads=2, decoder_attention_heads=2)
    config.tie_word_embeddings, config.architectures = True, ["DFineForObjectDetection"]
    with torch.device("meta"):
        model = transformers.DFineForObjectDetection(config)
    expected = model.get_expanded_tied_weights_keys(all_submodels=True)
    architecture = Architecture(tmp_path, json.loads(config.to_json_string()))
    found = architecture.may_be_tied([name for name, _ in model.named_parameters(remove_duplicate=False)])
    assert expected
    assert {name: tie.source for name, tie in found.items() if tie.allowed()} == expected


def test_states_in_memory_are_tied_by_the_memory_that_all_share() -> None:
    weight = torch.ones(2, 2)
    base = {"embed": weight, "head": weight}
    one = {"embed": weight + 1}
    both = fuse(rules.TaskArithmetic(1.0), base, finetuned={"a": {"embed": one["embed"], "head": one["embed"]}})
    assert torch.equal(both.state["head"], one["embed"])
    assert both.norms["a"] == 2.0  # counted once
    apart = fuse(rules.TaskArithmetic(1.0), base, finetuned={"a": {"embed": weight + 1, "head": weight + 2}})
    assert torch.equal(apart.state["head"], weight + 2)
    head = fuse(rules.TaskArithmetic(1.0), base, {"a": {"head": weight}})
    assert torch.equal(head.state["embed"], weight)
    assert torch.equal(head.state["head"], weight + 1)


@pytest.mark.slow
def test_no_model_class_is_imported_to_find_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("base", "a"):
        save(llama(tie_word_embeddings=True), tmp_path / name, both=("lm_head.weight",))
    code = (
        "import sys; from fusionlab.__main__ import main; assert main(sys.argv[1:]) == 0; "
        "found = {'transformers.modeling_utils', 'transformers.models.llama.modeling_llama'} & set(sys.modules); "
        "assert not found, found"
    )
    arguments = ["fuse", "--base", tmp_path / "base", "--finetuned.a", tmp_path / "a", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["tensors"]["tied"]

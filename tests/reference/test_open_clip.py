"""open_clip behind the CLIP interface: the features, adapters and files of open_clip, transformers and stock PEFT."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from oracles import merge_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from fusionlab import adapters
from fusionlab.adapters.fused_attention import (
    SplitAttention,
    split_names,
    split_state,
    stored_state,
    stored_task_vector,
)
from fusionlab.backbones import load_backbone
from fusionlab.backbones import open_clip as room
from fusionlab.backbones.clip import ClipBackbone
from fusionlab.backbones.open_clip import OpenClipBackbone, is_open_clip
from fusionlab.errors import InputError

# PEFT asks transformers for a property under its old name, and before 0.21 for the vocabulary of models without a name
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
NORMALISATION = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
TEXTS = ["a photo of a cat", "stripes", "A sign: 30 km/h."]
ATTENTION = "visual.transformer.resblocks.0.attn"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny open_clip model as ``local-dir:`` has it."""
    path = tmp_path / "model"
    path.mkdir()
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    model = open_clip.CLIP(**config)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": NORMALISATION}))
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


def stock(folder: Path) -> nn.Module:
    return open_clip.create_model(f"local-dir:{folder}").eval()


def pixels() -> Tensor:
    mean, std = (torch.tensor(NORMALISATION[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (IMAGES.float() / 255 - mean) / std


def transformers_names() -> dict[str, str]:
    """open_clip's parameter names of a resblock, of a tower and of the rest, as transformers calls them."""
    block = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    block |= {"attn.out_proj": "self_attn.out_proj"}
    block |= {f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"}
    names = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    for kind in ("weight", "bias"):
        names[f"ln_final.{kind}"] = f"text_model.final_layer_norm.{kind}"
        names[f"visual.ln_pre.{kind}"] = f"vision_model.pre_layrnorm.{kind}"
        names[f"visual.ln_post.{kind}"] = f"vision_model.post_layernorm.{kind}"
        for tower, theirs in (("", "text_model"), ("visual.", "vision_model")):
            for layer in range(2):
                for mine, name in block.items():
                    full = f"{tower}transformer.resblocks.{layer}.{mine}.{kind}"
                    names[full] = f"{theirs}.encoder.layers.{layer}.{name}.{kind}"
    return names


def transformers_backbone(model: nn.Module) -> ClipBackbone:
    """transformers' CLIP of the same shape with the weights of a stock open_clip ``model``."""
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": 49408, "max_position_embeddings": 16}
    vision = tower | {"image_size": 32, "patch_size": 16}
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    state = split_state(model.state_dict(), attentions)
    renamed = {name: state.pop(mine) for mine, name in transformers_names().items()}
    renamed |= {
        "visual_projection.weight": state.pop("visual.proj").T,
        "text_projection.weight": state.pop("text_projection").T,
    }
    assert not state.keys() - {"attn_mask"}
    theirs.load_state_dict(renamed | {n: v for n, v in theirs.state_dict().items() if n.endswith("position_ids")})
    mean, std = NORMALISATION["mean"], NORMALISATION["std"]
    return ClipBackbone(theirs, None, name="transformers", mean=mean, std=std)


def perturb(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def trained(backbone: OpenClipBackbone, **arguments: object) -> adapters.Adapter:
    """An adapter with random values, active in the backbone as ``task``."""
    targets = arguments.pop("target_modules", backbone.default_target_modules)
    adapters.inject(backbone.model, ["task"], target_modules=targets, scope=backbone.scope, **arguments)
    perturb(adapters.trainable_parameters(backbone.model, "task"))
    adapters.activate(backbone.model, "task")
    return adapters.extract(backbone.model, "task")


def test_features_are_open_clip_s_and_transformers_own(folder: Path) -> None:
    backbone, model = OpenClipBackbone.load(f"local-dir:{folder}", name="mine"), stock(folder)
    assert (backbone.image_size, backbone.scope, backbone.default_target_modules) == (
        32,
        "visual",
        ("q_proj", "v_proj"),
    )
    assert len(split_names(backbone.model)) == 2
    images, texts = backbone.image_features(IMAGES), backbone.text_features(TEXTS)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    torch.testing.assert_close(images, model.encode_image(pixels()), rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, model.encode_text(tokens, normalize=True), rtol=0, atol=1e-6)
    theirs = transformers_backbone(model)
    # 1e-5: another attention kernel and another order of sums
    torch.testing.assert_close(images, theirs.image_features(IMAGES), rtol=0, atol=1e-5)
    output = theirs.model(input_ids=tokens, pixel_values=pixels())
    torch.testing.assert_close(texts, output.text_embeds, rtol=0, atol=1e-5)
    logits = backbone.logit_scale * nn.functional.normalize(images, dim=-1) @ texts.T
    torch.testing.assert_close(logits, output.logits_per_image, rtol=0, atol=1e-4)
    head = backbone.zero_shot_head(["cat", "dog"], ["a {}", "the {}"])
    assert head.shape == (2, 16)
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(2))


def test_one_adapter_does_the_same_in_open_clip_and_in_transformers(folder: Path) -> None:
    backbone = OpenClipBackbone.load(str(folder), name="mine")
    pretrained = backbone.image_features(IMAGES)
    adapter = trained(backbone, rank=2)
    theirs, names = transformers_backbone(stock(folder)), transformers_names()
    renamed = {names[f"{module}.weight"].removesuffix(".weight"): f for module, f in adapter.factors.items()}
    same = adapters.Adapter(renamed)
    with adapters.added(theirs.model, same):
        features = theirs.image_features(IMAGES)
    torch.testing.assert_close(backbone.image_features(IMAGES), features, rtol=0, atol=1e-5)
    assert (features - pretrained).abs().max() > 1e-2
    assert adapters.inner_product(adapter, adapter) == pytest.approx(adapters.inner_product(same, same), rel=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 2, "lora_alpha": 3},
        {"rank": 2, "lora_alpha": 3, "method": "l_lora"},
        {"rank": 3, "target_modules": ["k_proj", "out_proj"]},
        {"rank": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc"]},
        {"rank": 2, "target_modules": ["c_proj"]},
    ],
)
def test_stock_peft_on_stock_open_clip_reads_the_block_adapter(
    folder: Path, tmp_path: Path, arguments: dict[str, object]
) -> None:
    backbone = OpenClipBackbone.load(str(folder), name="mine")
    pretrained = backbone.image_features(IMAGES)
    adapter = trained(backbone, **arguments)
    features = backbone.image_features(IMAGES)
    change = (features - pretrained).abs().max().item()
    assert change > 1e-2
    adapters.save_adapter(tmp_path / "adapter", adapter)

    peft_model = PeftModel.from_pretrained(stock(folder), tmp_path / "adapter").eval()
    # PEFT adds the product to the weight before the layer runs: rounding, far below what the adapter changes
    torch.testing.assert_close(peft_model.encode_image(pixels()), features, rtol=0, atol=1e-3 * change)

    back = adapters.load_adapter(tmp_path / "adapter")
    assert (back.method, back.fused_attention) == (adapter.method, adapter.fused_attention)
    assert set(back.factors) == set(adapter.factors)
    for module, factors in adapter.factors.items():
        assert torch.equal(back.factors[module].lora_a, factors.lora_a)
        assert torch.equal(back.factors[module].lora_b, factors.lora_b)
        assert back.factors[module].scaling == factors.scaling


def test_the_block_adapter_has_rank_2r_and_twice_the_alpha(folder: Path, tmp_path: Path) -> None:
    adapter = trained(OpenClipBackbone.load(str(folder), name="mine"), rank=2, lora_alpha=3)
    adapters.save_adapter(tmp_path, adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["target_modules"] == [f"visual.transformer.resblocks.{layer}.attn" for layer in range(2)]


def test_ranks_and_scalings_of_q_v_and_out_may_differ(folder: Path, tmp_path: Path) -> None:
    adapter = trained(
        OpenClipBackbone.load(str(folder), name="mine"), rank=2, target_modules=["q_proj", "v_proj", "out_proj"]
    )
    factors = dict(adapter.factors)
    wide = factors[f"{ATTENTION}.v_proj"]
    stretched = replace(wide, lora_a=torch.cat([wide.lora_a] * 3), lora_b=torch.cat([wide.lora_b] * 3, dim=1))
    factors[f"{ATTENTION}.v_proj"] = replace(stretched, use_rslora=True, lora_alpha=0.5)
    factors[f"{ATTENTION}.out_proj"] = replace(factors[f"{ATTENTION}.out_proj"], lora_alpha=1)
    adapter = replace(adapter, factors=factors)
    adapters.save_adapter(tmp_path, adapter)
    back = adapters.load_adapter(tmp_path)
    for module in adapter.factors:
        torch.testing.assert_close(back.delta_weight(module), adapter.delta_weight(module))
    peft_model = PeftModel.from_pretrained(stock(folder), tmp_path).eval()
    backbone = OpenClipBackbone.load(str(folder), name="again")
    with adapters.added(backbone.model, adapter):
        torch.testing.assert_close(
            peft_model.encode_image(pixels()), backbone.image_features(IMAGES), rtol=0, atol=1e-5
        )


def test_adapters_that_stock_peft_trained_on_fused_attention_load(folder: Path, tmp_path: Path) -> None:
    targets = r"visual\.transformer.*\.attn"
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=targets, rank_pattern={r".*\.1\.attn": 2})
    peft_model = get_peft_model(stock(folder), config).eval()
    perturb([parameter for name, parameter in peft_model.named_parameters() if ".lora_" in name])
    peft_model.save_pretrained(tmp_path)
    adapter = adapters.load_adapter(tmp_path)
    assert adapter.ranks[f"{ATTENTION}.k_proj"] == 3
    backbone = OpenClipBackbone.load(str(folder), name="mine")
    with adapters.added(backbone.model, adapter):
        torch.testing.assert_close(
            backbone.image_features(IMAGES), peft_model.encode_image(pixels()), rtol=0, atol=1e-5
        )


def test_fused_adapters_keep_the_layout_and_the_rank(folder: Path, tmp_path: Path) -> None:
    first = trained(OpenClipBackbone.load(str(folder), name="mine"), method="l_lora", rank=2)
    second = {m: replace(f, lora_b=f.lora_b.flip(0)) for m, f in first.factors.items()}
    both = {"x": first, "y": replace(first, factors=second)}
    fused = adapters.combine(both, {"*": {"x": 0.3, "y": 0.6}})
    assert (set(fused.ranks.values()), fused.fused_attention) == ({2}, first.fused_attention)
    halves = {
        f"{number}": replace(
            first, fused_attention=(name,), factors={m: f for m, f in first.factors.items() if name in m}
        )
        for number, name in enumerate(first.fused_attention)
    }
    for scaling in (1.0, 0.5):
        union = adapters.combine(halves, {"*": dict.fromkeys(halves, scaling)})
        assert union.fused_attention == first.fused_attention
    adapters.save_adapter(tmp_path, fused)
    peft_model = PeftModel.from_pretrained(stock(folder), tmp_path).eval()
    backbone = OpenClipBackbone.load(str(folder), name="mine")
    with adapters.added(backbone.model, fused):
        torch.testing.assert_close(
            peft_model.encode_image(pixels()), backbone.image_features(IMAGES), rtol=0, atol=1e-5
        )


def test_weights_go_back_to_the_stock_names(folder: Path, tmp_path: Path) -> None:
    backbone, model = OpenClipBackbone.load(str(folder), name="mine"), stock(folder)
    attentions = split_names(backbone.model)
    stored = stored_state(adapters.base_state(backbone.model), attentions)
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
    again = split_state(stored, attentions)
    assert all(torch.equal(again[name], value) for name, value in adapters.base_state(backbone.model).items())

    adapter = trained(backbone, rank=2, target_modules=["q_proj", "v_proj", "c_fc"])
    merged_state = merge_adapter(adapters.base_state(backbone.model), adapter)
    task_vector = stored_task_vector(adapter)
    assert f"{ATTENTION}.in_proj_weight" in task_vector
    for name, value in stored_state(merged_state, attentions).items():
        torch.testing.assert_close(value, stored[name] + task_vector.get(name, torch.zeros(())))

    for module in adapter.factors:
        weight = adapters.adapted_weight(model.state_dict().__getitem__, adapter, module)
        assert torch.equal(weight, adapters.base_state(backbone.model)[f"{module}.weight"])

    backbone.save_files(tmp_path)
    save_file(stored_state(merged_state, attentions), tmp_path / "model.safetensors")
    features = backbone.image_features(IMAGES)
    torch.testing.assert_close(stock(tmp_path).encode_image(pixels()), features, rtol=0, atol=1e-5)
    reloaded = OpenClipBackbone.load(str(tmp_path), name="again")
    torch.testing.assert_close(reloaded.image_features(IMAGES), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(reloaded.text_features(TEXTS), backbone.text_features(TEXTS))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_split_attention_is_the_fused_one_in_value_and_gradient(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).double()
    split = SplitAttention(attention)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    length = 5 if batch_first else 3
    for mask in (None, torch.randn(length, length, dtype=torch.float64), torch.ones(length, length).triu(1).bool()):
        expected = attention(x, x.flip(2), x.exp(), need_weights=False, attn_mask=mask)[0]
        got = split(x, x.flip(2), x.exp(), need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_architecture_and_local_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", CONFIG)
    backbone = OpenClipBackbone.load(f"tiny-test:{folder / 'open_clip_model.safetensors'}", name="mine")
    expected = stock(folder).encode_text(open_clip.get_tokenizer("tiny-test")(TEXTS), normalize=True)
    torch.testing.assert_close(backbone.text_features(TEXTS), expected, rtol=0, atol=1e-6)


def test_a_forced_activation_goes_into_the_saved_configuration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {key: value for key, value in CONFIG.items() if key != "quick_gelu"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", plain)
    monkeypatch.setattr(room, "_activation", lambda architecture, pretrained: {"force_quick_gelu": True})
    backbone = OpenClipBackbone.load(f"tiny-test:{folder / 'open_clip_model.safetensors'}", name="mine")
    texts = OpenClipBackbone.load(str(folder), name="x").text_features(TEXTS)
    torch.testing.assert_close(backbone.text_features(TEXTS), texts)
    backbone.save_files(tmp_path)
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is True


def test_a_tag_is_loaded_with_the_activation_it_was_trained_with() -> None:
    assert room._activation("ViT-B-32", "openai") == {"force_quick_gelu": True}
    assert room._activation("ViT-B-32-quickgelu", "openai") == {}
    assert room._activation("ViT-B-32", "laion2b_s34b_b79k") == {}
    assert room._activation("ViT-B-32", "/some/file.pt") == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-B-23:openai", "unknown open_clip architecture 'ViT-B-23' in 'ViT-B-23:openai'; did you mean 'ViT-B-32'"),
        ("ViT-B-32:openia", "'openia' is neither a pretrained tag of ViT-B-32 nor a file; did you mean 'openai'"),
        ("ViT-B-32:", "'' is neither a pretrained tag of ViT-B-32 nor a file"),
        ("local-dir:/nowhere", "no open_clip_config.json in '/nowhere'"),
    ],
)
def test_models_that_are_not_there_are_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        OpenClipBackbone.load(source, name=source)


def test_a_folder_without_weights_is_refused_rather_than_random(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"could not be loaded: Required pretrained weights"):
        OpenClipBackbone.load(str(folder), name="mine")
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"could not be loaded: .*model_cfg"):
        OpenClipBackbone.load(str(folder), name="mine")


def test_towers_that_cannot_be_adapted_are_refused() -> None:
    config = copy.deepcopy(CONFIG)
    oblong = open_clip.CLIP(**config | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": (32, 16)}})
    open_clip.model.set_model_preprocess_cfg(oblong, NORMALISATION)
    with pytest.raises(InputError, match="images of 32 x 16 pixels"):
        OpenClipBackbone(oblong, None, name="oblong", config={})
    resnet = open_clip.CLIP(**config | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}})
    open_clip.model.set_model_preprocess_cfg(resnet, NORMALISATION)
    with pytest.raises(InputError, match="'resnet' has no attention that can be adapted"):
        OpenClipBackbone(resnet, None, name="resnet", config={})


def test_names_that_ask_for_open_clip(folder: Path, tmp_path: Path) -> None:
    assert isinstance(load_backbone(str(folder)), OpenClipBackbone)
    with pytest.raises(InputError, match="runs in float32, got dtype 'bfloat16'"):
        load_backbone(str(folder), dtype="bfloat16")
    asking = ["local-dir:x", "hf-hub:laion/CLIP", "ViT-B-32:openai", str(folder)]
    assert all(is_open_clip(name) for name in asking)
    assert not any(is_open_clip(name) for name in ["tiny-clip", "openai/clip-vit-base-patch32", "./a:b", str(tmp_path)])
    (folder / "config.json").write_text("{}")
    assert not is_open_clip(str(folder))
    assert is_open_clip(f"local-dir:{folder}")

"""``fusionlab.fuse``: in whatever form base and fine-tuned weights are given, the model is that of the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from often import often
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

import fusionlab
from fusionlab import adapters, rules
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors
from fusionlab.errors import InputError
from fusionlab.fusion.base import Base
from fusionlab.fusion.folders import save_finetuned
from fusionlab.linearize import LinearizedState
from fusionlab.modules import ClipModule, T5Module, ViTModule

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASKS = ("first", "second")
DARE = {"class_path": "dare", "init_args": {"rule": {"class_path": "trim", "init_args": {"rule": "average"}}}}
RULES: dict[str, Any] = {
    "dare": DARE,
    "ties": {"class_path": "ties", "init_args": {"density": 0.4}},
    "metagpt": "metagpt",
    "breadcrumbs": "breadcrumbs",
    "slerp": {"class_path": "slerp", "init_args": {"t": 0.3}},
}


def trained(module: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    parameters = module.adaptation.add(list(TASKS))
    for parameter in (each for task in TASKS for each in parameters[task]):
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return {task: module.finetuned(task) for task in TASKS}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("vit")
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


class Model:
    """A backbone, fine-tuned weights in memory and in folders, and what the command makes of the folders."""

    def __init__(self, make: Callable[..., Any], name: str, method: str, root: Path) -> None:
        self.name, self.module, self.root = name, make(name, method=method), root
        self.finetuned = trained(self.module)
        self.folders = {task: root / task for task in TASKS}
        for task, folder in self.folders.items():
            save_finetuned(folder, self.finetuned[task], self.module.backbone, {"method": method})

    @property
    def rules(self) -> dict[str, Any]:
        """All, or a few over the many tensors of a whole model."""
        return (
            RULES if isinstance(self.finetuned["first"], Adapter) else {name: RULES[name] for name in ("ties", "dare")}
        )

    def by_command(self, rule: Any, name: str, **keys: Any) -> dict[str, Tensor]:
        recipe = {"base": self.name, "finetuned": {task: str(folder) for task, folder in self.folders.items()}}
        recipe |= {"rule": rule, "output": str(self.root / name), **keys}
        (self.root / "recipe.yaml").write_text(json.dumps(recipe))
        assert main(["fuse", "--config", str(self.root / "recipe.yaml")]) == 0
        return load_file(next((self.root / name).glob("*model.safetensors")))

    def on_disk(self, fused: Any) -> dict[str, Tensor]:
        """A fused model as its folder has it."""
        if isinstance(fused.weights, Adapter):
            adapters.save_fused_adapter(self.root / "own", fused.weights)
            return load_file(self.root / "own" / "adapter_model.safetensors")
        base = Base.of(self.module)
        return base.layout.to_disk({**base.state, **fused.state})


KINDS = {
    "clip lora": (ClipModule, "tiny-clip", "lora"),
    "clip full": (ClipModule, "tiny-clip", "full"),
    "t5 l_lora": (T5Module, "tied", "l_lora"),
    "t5 full": (T5Module, "untied", "full"),
    "vit lora": (ViTModule, "vit", "lora"),
    "vit full": (ViTModule, "vit", "full"),
}


@pytest.fixture(params=often(KINDS, "clip lora", "t5 full"))
def model(request: pytest.FixtureRequest, vit: str, t5_folder: Callable[[str], Path], tmp_path: Path) -> Model:
    make, name, method = KINDS[request.param]
    own = {"vit": vit} if name == "vit" else {} if name == "tiny-clip" else {name: str(t5_folder(name))}
    return Model(make, own.get(name, name), method, tmp_path)


def test_every_form_of_the_inputs_gives_the_model_of_the_command(model: Model) -> None:
    backbone = model.module.backbone
    forms: dict[str, dict[str, Any]] = {
        "in memory": model.finetuned,
        "loaded": {task: fusionlab.load(folder) for task, folder in model.folders.items()},
        "folders": {task: str(folder) for task, folder in model.folders.items()},
    }
    bases = {"backbone": backbone, "module": model.module, "model": model.module.base_model}
    for name, rule in model.rules.items():
        expected = model.by_command(rule, name)
        for form, finetuned in forms.items():
            fused = model.on_disk(fusionlab.fuse(rule, backbone, finetuned=finetuned))
            assert fused.keys() == expected.keys()
            assert [key for key in fused if not torch.equal(fused[key], expected[key])] == [], (name, form)
    for what, base in bases.items():
        fused = model.on_disk(fusionlab.fuse(rule, base, finetuned=model.finetuned))
        assert all(torch.equal(fused[key], value) for key, value in expected.items()), (name, what)


def test_states_under_their_names_on_disk_give_the_model_of_the_command(model: Model) -> None:
    if isinstance(model.finetuned["first"], Adapter):
        base = Base.of(model.module)
        vectors = {task: base.layout.renamed(dict(adapter.task_vector())) for task, adapter in model.finetuned.items()}
        given: dict[str, Any] = {"task_vectors": vectors}
        state = {name: base.stored[name] for name in base.stored}
    else:
        given = {"finetuned": {task: load_file(path / "model.safetensors") for task, path in model.folders.items()}}
        state = Base.of(model.module).stored
    for name, rule in model.rules.items():
        expected = model.by_command(rule, name, save="weights")
        fused = fusionlab.fuse(rule, state, **given)
        assert list(fused.state) == list(state)
        assert all(torch.equal(fused.state[key], value) for key, value in expected.items()), name


def test_adapters_of_transposed_layers_are_laid_out_by_the_base(tmp_path: Path) -> None:
    """GPT-2's c_proj is square and stored transposed, which PEFT's one flag does not say of every layer."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    sizes = {"attn.c_proj": (32, 32), "mlp.c_fc": (128, 32)}
    for seed, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(seed)
        factors = {
            f"transformer.h.{layer}.{name}": Factors(
                torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator), 2
            )
            for layer in range(2)
            for name, (rows, columns) in sizes.items()
        }
        adapters.save_adapter(tmp_path / task, Adapter(factors))
    recipe = {"base": str(tmp_path / "base"), "finetuned": {task: str(tmp_path / task) for task in TASKS}}
    loaded = {task: fusionlab.load(tmp_path / task) for task in TASKS}
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name in ("ties", "dare"):
        recipe |= {"rule": RULES[name], "output": str(tmp_path / name)}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
        expected = load_file(tmp_path / name / "model.safetensors")
        fused = fusionlab.fuse(RULES[name], gpt2, finetuned=loaded).state
        assert {key for key in expected if not torch.equal(expected[key], base[key])} == set(fused)
        assert all(torch.equal(value, expected[key]) for key, value in fused.items())


def test_adapters_and_full_weights_are_mixed_as_the_command_mixes_them(vit: str, tmp_path: Path) -> None:
    lora, full = (Model(ViTModule, vit, method, tmp_path / method) for method in ("lora", "full"))
    for name, rule in RULES.items():
        recipe = {"base": vit, "finetuned": {"a": str(lora.folders["first"]), "b": str(full.folders["second"])}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"rule": rule, "output": str(tmp_path / name)}))
        assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
        expected = load_file(tmp_path / name / "model.safetensors")
        finetuned = {"a": lora.finetuned["first"], "b": full.finetuned["second"]}
        fused = lora.on_disk(fusionlab.fuse(rule, lora.module, finetuned=finetuned))
        assert all(torch.equal(fused[key], value) for key, value in expected.items()), name


def test_what_cannot_be_fused_is_refused(vit: str, tmp_path: Path) -> None:
    model = Model(ViTModule, vit, "full", tmp_path)
    tangent = {task: LinearizedState(state) for task, state in model.finetuned.items()}
    mixed = {"first": model.finetuned["first"], "second": tangent["second"]}
    with pytest.raises(InputError, match="second act to first order about the base only, first do not"):
        fusionlab.fuse("average", model.module, finetuned=mixed)
    with pytest.raises(InputError, match="no such rule"):
        fusionlab.fuse("avarage", model.module, finetuned=model.finetuned)
    with pytest.raises(InputError, match="are for states that keep their dtypes"):
        fusionlab.fuse("average", model.module, task_vectors={"first": model.finetuned["first"]})
    other = fusionlab.load_backbone("tiny-clip")
    with pytest.raises(InputError, match="not in the base"):
        fusionlab.fuse("average", other, finetuned=model.finetuned)
    lora = Model(ViTModule, vit, "lora", tmp_path / "lora")
    with pytest.raises(InputError, match="modules that the model does not have"):
        fusionlab.fuse("average", other, finetuned=lora.finetuned)
    fused = fusionlab.fuse("average", lora.module, finetuned=lora.finetuned)
    with pytest.raises(InputError, match="is an adapter"):
        assert fused.state
    assert isinstance(fused.rule, rules.Average)


def test_a_scale_of_the_whole_model_is_for_files_only() -> None:
    backbone = fusionlab.load_backbone("tiny-clip")
    name = next(name for name, _ in backbone.model.named_parameters())
    finetuned = {"a": {name: dict(backbone.model.named_parameters())[name].detach() + 1}}
    for scale in (0.9, [0.5, 1.0]):
        rule = {"class_path": "passthrough", "init_args": {"scale": scale}}
        with pytest.raises(InputError, match="scales the whole model"):
            fusionlab.fuse(rule, backbone, finetuned=finetuned)

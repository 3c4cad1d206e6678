"""Every folder of weights has a card that huggingface_hub reads back, and whose code loads what the folder holds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from small_bases import write_small_bases

import fusionlab
from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS
from fusionlab.cards import DataSet, Origin, write_card
from fusionlab.fusion.folders import save_finetuned, save_fused
from fusionlab.runs.loading import load_weights

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASKS = ("digits", "pets")
ROW = {"split": "test", "metric": "accuracy", "num_samples": 400, "stderr": 0.02, "denominator": "own", "rule": None,
       "finetuned_on": None, "data_version": "v1", "search": None, "task_known": False}  # fmt: skip
ROWS = [
    *({**ROW, "model": "pretrained", "task": task, "value": 0.25} for task in TASKS),
    *({**ROW, "model": "finetuned", "finetuned_on": task, "task": task, "value": 0.75} for task in TASKS),
    *({**ROW, "model": "fused", "rule": "average", "task": task, "value": 0.5} for task in TASKS),
    {**ROW, "model": "fused", "rule": "average", "task": "pets", "value": 0.6, "denominator": "full"},
    {**ROW, "model": "fused", "rule": "ties", "task": "pets", "value": 0.1},
]
ORIGIN = Origin("", datasets={"pets": DataSet("timm/oxford-iiit-pet", revision="abc")}, rows=ROWS,
                recipe={"learning_rate": 0.01, "max_steps": 80})  # fmt: skip
FUSED = {"model": "fused", "rule": "average", "fused_tasks": list(TASKS)}
MODULES = {
    "clip": (fusionlab.ClipModule, "tiny-clip"),
    "t5": (fusionlab.T5Module, "tiny-t5"),
    "lm": (fusionlab.CausalModule, "tiny-lm"),
}


def folders_of(root: Path, module: Any) -> dict[str, Path]:
    """A fine-tuned and a fused model of a module, moved at random in place of training."""
    generator = torch.Generator().manual_seed(1)
    parameters = module.adaptation.add(list(TASKS))
    for parameter in (each for task in TASKS for each in parameters[task]):
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    finetuned = {task: module.finetuned(task) for task in TASKS}
    method = {"method": module.method}
    row = {"model": "finetuned", "finetuned_on": "pets"} | method
    save_finetuned(root / "pets", finetuned["pets"], module.backbone, row, origin=ORIGIN)
    fused = fusionlab.fuse("average", module, finetuned=finetuned)
    save_fused(root / "average", fused, module.backbone, FUSED | method, origin=ORIGIN)
    return {"finetuned": root / "pets", "fused": root / "average"}


def card_of(folder: Path) -> ModelCard:
    """The card, after it was seen to come back whole."""
    text = (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    assert str(card) == text
    again = type(card.data)(**yaml.safe_load(card.data.to_yaml()))
    assert again.to_dict() == card.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    return card


def run_code(folder: Path, base: str = "") -> dict[str, Any]:
    """What the card's Python code gives by its names, all of it run in order."""
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        exec(block.replace("FOLDER", str(folder)).replace("BASE", base), found)
    return found


def slow(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


CASES = [("clip", "lora"), ("clip", "tangent"), ("lm", "lora"), slow("clip", "full"), slow("clip", "tangent_lora"),
         slow("t5", "l_lora")]  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_run_s_cards(kind: str, method: str, tmp_path: Path) -> None:
    make, base = MODULES[kind]
    module = make(base, method=method)
    linearized, is_adapter = method.startswith("tangent"), "lora" in method
    for what, folder in folders_of(tmp_path, module).items():
        card = card_of(folder)
        data, told = card.data, card.text
        library = "fusionlab" if linearized else "peft" if is_adapter else "transformers"
        relation = "adapter" if is_adapter else "merge" if what == "fused" else "finetune"
        pipeline = "zero-shot-image-classification" if kind == "clip" else "text-generation"
        assert (data.base_model, data.base_model_relation, data.license) == (base, relation, "apache-2.0")
        assert (data.library_name, data.pipeline_tag, data.datasets) == (library, pipeline, ["timm/oxford-iiit-pet"])
        assert {"fusionlab", method} <= set(data.tags)
        assert ("merge" in data.tags) == (what == "fused")
        results = {each.dataset_name: each for each in data.eval_results}
        values = {"digits": 0.5, "pets": 0.5} if what == "fused" else {"pets": 0.75}
        assert {task: each.metric_value for task, each in results.items()} == values
        pets = results["pets"]
        assert (pets.dataset_type, pets.dataset_revision, pets.dataset_split) == ("timm/oxford-iiit-pet", "abc", "test")
        assert pets.dataset_args["num_samples"] == 400
        assert f"| pets | test | 400 | accuracy | {values['pets']:.4f} ± 0.020 | 0.2500 ± 0.020 | 0.7500" in told
        assert "- learning_rate: 0.01" in told
        assert ("Ratio of the largest norm to the smallest: " in told) == (what == "fused")
        assert ("Read it with fusionlab" in told) == linearized
        assert ("PeftModel" in told) == (is_adapter and not linearized)
        assert ("vllm serve" in told) == (kind == "lm" and is_adapter)
        assert ("from transformers" in told) == (not linearized)


@pytest.mark.parametrize(
    ("kind", "method"), [("clip", "lora"), slow("clip", "full"), slow("t5", "l_lora"), slow("lm", "lora")]
)
@torch.no_grad()
def test_the_code_of_a_card_loads_the_same_function(kind: str, method: str, tmp_path: Path) -> None:
    make, base = MODULES[kind]
    module = make(base, method=method)
    for folder in folders_of(tmp_path, module).values():
        found = run_code(folder)
        loaded = getattr(found["loaded"], "weights", found["loaded"])
        with module.use(loaded):
            ours = outputs(kind, module.backbone.model)
        torch.testing.assert_close(outputs(kind, found["model"].eval()), ours, rtol=1e-4, atol=1e-5)
        with module.use(None):
            assert not torch.allclose(outputs(kind, module.backbone.model), ours, rtol=1e-3, atol=1e-3)


def outputs(kind: str, model: Any) -> torch.Tensor:
    tokens = torch.arange(4, 12)[None]
    if kind == "clip":
        pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        return model.vision_model(pixel_values=pixels).pooler_output
    more = {"decoder_input_ids": tokens} if kind == "t5" else {}
    return model(input_ids=tokens, **more).logits


def test_masks_are_read_by_fusionlab_only(tmp_path: Path) -> None:
    module = fusionlab.ClipModule("tiny-clip", rank=2)
    parameters = module.adaptation.add(list(TASKS))
    generator = torch.Generator().manual_seed(1)
    for parameter in (each for task in TASKS for each in parameters[task]):
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    fused = fusionlab.fuse("emr", module, finetuned={task: module.finetuned(task) for task in TASKS})
    save_fused(tmp_path / "emr", fused, module.backbone, FUSED | {"rule": "emr"}, origin=ORIGIN)
    card = card_of(tmp_path / "emr")
    assert (card.data.library_name, card.data.base_model_relation) == ("fusionlab", "merge")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "the task of an input must be known" in card.text
    assert "from transformers" not in card.text


@pytest.mark.parametrize("method", ["lora", "full"])
@torch.no_grad()
def test_open_clip(method: str, tmp_path: Path) -> None:
    bases = write_small_bases(tmp_path)
    module = fusionlab.ClipModule(str(bases["open_clip"]), method=method, rank=2)
    folder = folders_of(tmp_path, module)["finetuned"]
    card = card_of(folder)
    assert card.data.library_name == ("peft" if method == "lora" else "open_clip")
    assert card.data.base_model is None  # a folder here is nobody else's
    assert str(tmp_path) not in str(card)
    found = run_code(folder, str(bases["open_clip"]))
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with module.use(load_weights(folder, module.base_model).weights):
        ours = module.backbone.model.encode_image(pixels)
    torch.testing.assert_close(found["model"].eval().encode_image(pixels), ours, rtol=1e-4, atol=1e-5)


def test_vit(tmp_path: Path) -> None:
    bases = write_small_bases(tmp_path)
    folder = folders_of(tmp_path, fusionlab.ViTModule(str(bases["vit"]), method="lora", rank=2))["fused"]
    card = card_of(folder)
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "The heads that these scores use" in card.text
    assert type(run_code(folder, str(bases["vit"]))["base"]).__name__ == "ViTModel"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose card says what it is, and two fine-tuned models of it."""
    root = tmp_path_factory.mktemp("models")
    for name in ("base", "a", "b"):
        shutil.copytree(ASSETS / "tiny-t5", root / name)
        (root / name / "README.md").write_text("the base's own text")
    stored = load_file(root / "base" / "model.safetensors")
    for name, change in {"a": 1.0, "b": 0.5}.items():
        moved = {key: value + change if key.endswith("wo.weight") else value for key, value in stored.items()}
        save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
    return root


FUSE = ["fuse", "--finetuned.a", "a", "--finetuned.b", "b", "--rule", "average"]


def test_a_card_of_fuse(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    head = {"license": "other", "license_name": "own-1.0", "license_link": "https://example.org/l", "language": ["en"]}
    (models / "base" / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\nthe base's own text")
    assert main([*FUSE, "--base", str(models / "base"), "--dtype", "bfloat16", "--output", "out"]) == 0
    card = card_of(models / "out")
    assert {key: getattr(card.data, key, None) for key in head} == head
    assert (card.data.base_model, card.data.base_model_relation) == (None, "merge")
    assert "the base's own text" not in card.text
    assert "Ratio of the largest norm to the smallest: 2." in card.text
    record = json.loads((models / "out" / "fusion.json").read_text())["rounding"]
    lost = (record["updated_elements"] - record["survived_elements"]) / record["updated_elements"]
    assert f"{lost:.1%} of the update is lost to rounding" in card.text
    assert str(models) not in str(card)
    assert type(run_code(models / "out")["model"]).__name__ == "T5ForConditionalGeneration"


@pytest.mark.parametrize(
    ("text", "why"),
    [("---\nlicense: [mit\n---\n", "the base's card has no metadata that can be read"),
     ("no head", "the base's card names none")],
)  # fmt: skip
def test_a_base_whose_licence_is_not_known(text: str, why: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    (models / "base" / "README.md").write_text(text)
    output = models / f"out {len(text)}"
    assert main([*FUSE, "--base", "base", "--output", str(output)]) == 0
    card = card_of(output)
    assert card.data.license is None
    assert why in card.text


def test_a_rank_pattern_is_not_served(tmp_path: Path) -> None:
    """vLLM reads r and lora_alpha only, so a card does not say that it serves what has patterns."""
    folder = folders_of(tmp_path, fusionlab.CausalModule("tiny-lm", rank=4))["finetuned"]
    config = json.loads((folder / "adapter_config.json").read_text())
    origin = Origin("tiny-lm", ASSETS / "tiny-lm", "mine")
    assert config["r"] == 4
    write_card(folder, origin)
    assert "--max-lora-rank 8 " in (folder / "README.md").read_text()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 2}}))
    write_card(folder, origin)
    assert "vllm" not in (folder / "README.md").read_text()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 1000}))
    write_card(folder, origin)
    assert "vllm" not in (folder / "README.md").read_text()

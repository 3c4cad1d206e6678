"""ViTModule: transformers' and timm's models, every method, heads outside the fusion, exports in the base's layout."""

import json
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.backbones import TimmBackbone, load_backbone
from fusionlab.modules.applying import applied
from fusionlab.modules.vit import nearest_mean_head
from fusionlab.runs.loading import load_weights
from fusionlab.tensors import save_state

TASKS = ["digits", "signs"]
DATA = ["--model", "ViTModule", "--data.tasks", json.dumps(TASKS), "--data.max_samples", "48"]
DATA += ["--data.eval_batch_size", "24", "--data.batch_size", "8"]
FIT = [
    "fit",
    *DATA,
    "--trainer.max_steps",
    "3",
    "--trainer.enable_progress_bar",
    "false",
    "--fusion.rules",
    "[average, ties]",
]
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3)


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("vit")
    ViTModel(CONFIG).save_pretrained(root / "vit")  # with a pooler, as the checkpoints for transfer have one
    ViTModel(CONFIG, add_pooling_layer=False).save_pretrained(root / "no_pooler")
    ViTForImageClassification(CONFIG).save_pretrained(root / "classifier")
    arguments = {"img_size": 32, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    backbone = TimmBackbone(model, name="timm", model_args=arguments)
    (root / "timm").mkdir()
    backbone.save_files(root / "timm")
    torch.save(model.state_dict(), root / "timm" / "pytorch_model.bin")
    CONFIG.save_pretrained(root / "config")
    names = {name: str(root / name) for name in ("vit", "no_pooler", "classifier")}
    return {**names, "timm": f"timm:{root / 'timm'}", "config": f"config:{root / 'config'}"}


@pytest.fixture(scope="module")
def runs(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    for kind, method in (("vit", "lora"), ("classifier", "full"), ("no_pooler", "tangent_lora"), ("timm", "l_lora")):
        folder = made[kind, method] = tmp_path_factory.mktemp("runs") / kind
        argv = [*FIT, "--model.backbone", bases[kind], "--model.method", method]
        assert main([*argv, "--trainer.default_root_dir", str(folder)]) == 0
    return made


def images(size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)


def test_every_run_has_heads_and_rows(runs: dict[tuple[str, str], Path]) -> None:
    for (_, method), folder in runs.items():
        rows = rows_of(folder / "results.json")
        assert {(row["model"], row["rule"], row["task"]) for row in rows} == {
            (*model, task)
            for model in (("pretrained", None), ("finetuned", None), ("fused", "average"), ("fused", "ties"))
            for task in TASKS
        }
        assert {row["method"] for row in rows} == {method}
        assert {path.name for path in (folder / "heads").iterdir()} == set(TASKS)
        with safe_open(folder / "heads" / "digits" / "model.safetensors", "pt") as file:
            assert json.loads(file.metadata()["class_names"]) == DIGITS
            assert file.get_slice("weight").get_shape() == [10, 192 if "timm" in str(folder) else 32]


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_test_command_takes_the_runs_heads(
    runs: dict[tuple[str, str], Path], bases: dict[str, str], tmp_path: Path
) -> None:
    for number, ((kind, method), folder) in enumerate(runs.items()):
        rule = ("average", "ties")[number % 2]
        argv = ["test", *DATA, "--model.backbone", bases[kind], "--model.weights", str(folder / "fused" / rule)]
        assert main([*argv, "--output", str(tmp_path / f"{kind}.json")]) == 0
        scored = {row["task"]: row for row in rows_of(tmp_path / f"{kind}.json")}
        for row in rows_of(folder / "results.json"):
            if row["rule"] == rule:
                assert scored[row["task"]]["value"] == row["value"], (kind, method)


def test_exports_are_in_the_bases_own_layout(runs: dict[tuple[str, str], Path], bases: dict[str, str]) -> None:
    with safe_open(Path(bases["classifier"]) / "model.safetensors", "pt") as base:
        full = runs["classifier", "full"]
        for folder in (full / "finetuned" / "signs", full / "fused" / "ties"):
            with safe_open(folder / "model.safetensors", "pt") as file:
                names = set(base.keys())
                assert set(file.keys()) == names
                changed = {name for name in names if not torch.equal(base.get_tensor(name), file.get_tensor(name))}
            assert all(name.startswith("vit.") for name in changed)
            # the bias of the keys shifts all scores of a query alike
            assert all(name.startswith("classifier.") or name.endswith("key.bias") for name in names - changed)
            model = ViTForImageClassification.from_pretrained(folder).eval()
            backbone = load_backbone(bases["classifier"])
            pixels = (images() / 255 - backbone.mean) / backbone.std
            with torch.no_grad(), applied(backbone, load_weights(folder, backbone.model).weights) as application:
                ours = application(lambda backbone=backbone: backbone.image_features(images()))
                torch.testing.assert_close(ours, model.vit(pixels).last_hidden_state[:, 0], rtol=1e-5, atol=1e-6)


def test_adapters_load_in_stock_peft(runs: dict[tuple[str, str], Path], bases: dict[str, str]) -> None:
    backbone = load_backbone(bases["vit"])
    for folder in ("adapters/signs", "fused/average"):
        path = runs["vit", "lora"] / folder
        model = PeftModel.from_pretrained(ViTModel.from_pretrained(bases["vit"]), path).eval()
        pixels = (images() / 255 - backbone.mean) / backbone.std
        with torch.no_grad(), adapters.added(backbone.model, adapters.load_adapter(path)):
            theirs = model(pixel_values=pixels).last_hidden_state[:, 0]
            torch.testing.assert_close(backbone.image_features(images()), theirs, rtol=1e-5, atol=1e-6)


def test_timm_exports_load_in_timm(runs: dict[tuple[str, str], Path], bases: dict[str, str]) -> None:
    folder = runs["timm", "l_lora"] / "fused" / "ties"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    backbone = load_backbone(bases["timm"])
    with torch.no_grad(), applied(backbone, load_weights(folder, backbone.model).weights) as application:
        ours = application(lambda: backbone.image_features(images()))
        theirs = model((images() / 255 - backbone.mean) / backbone.std)
        assert (ours - load_backbone(bases["timm"]).image_features(images())).abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_heads_start_at_class_means_and_train() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(5, 8, generator=generator)
    labels = torch.arange(200) % 5
    features = means[labels] + torch.randn(200, 8, generator=generator)
    weight, bias = nearest_mean_head(features, labels, 6)
    logits = features @ weight.T + bias
    centers = torch.stack([features[labels == label].mean(0) for label in range(5)])  # the sixth has no samples
    distances = (features[:, None] - centers).square().sum(-1)
    assert torch.equal(logits.argmax(1), distances.argmin(1))
    # scaled alike for all samples, up to a term that the classes share
    scale = (logits[:, 0] - logits[:, 1]) / (distances[:, 1] - distances[:, 0])
    torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-3, atol=1e-4)


def test_predict_and_config(bases: dict[str, str], runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    one, two = load_backbone(bases["config"]), load_backbone(bases["config"])
    assert torch.equal(one.image_features(images()), two.image_features(images()))
    Image.new("RGB", (40, 50), "red").save(tmp_path / "a.png")
    argv = ["predict", "--model", "ViTModule", "--model.backbone", bases["vit"], "--data.tasks", "[digits]"]
    argv += [
        "--model.weights",
        str(runs["vit", "lora"] / "adapters" / "digits"),
        "--data.images",
        str(tmp_path / "a.png"),
    ]
    assert main([*argv, "--output", str(tmp_path / "labels.csv"), "--trainer.default_root_dir", str(tmp_path)]) == 0
    header, line = (tmp_path / "labels.csv").read_text().splitlines()
    assert header == "path,task,label,probability"
    assert line.split(",")[2] in DIGITS


def test_bad_input(
    bases: dict[str, str], runs: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--model.weights", str(runs["vit", "lora"] / "fused" / "average")]
    test = ["test", "--model", "ViTModule", "--model.backbone", bases["vit"], "--data.max_samples", "8"]
    cases = [
        ([*test, "--data.tasks", "[textures]", *weights], "no head for task 'textures'"),
        ([*test, "--data.tasks", "[signs]"], "give --model.heads"),
        (["fit", "--model", "ViTModule", "--data.tasks", "[signs]"], "ViTModule needs --model.backbone"),
        (["fit", "--model", "ViTModule", "--model.backbone", "tiny-clip"], "is a CLIPModel; give a ViT"),
        (["fit", "--model", "ViTModule", "--model.backbone", "timm:vit_tiny_patch16_225"], "did you mean 'vit_tiny"),
        (["fit", "--model", "ViTModule", "--model.backbone", "config:nowhere"], "no configuration 'nowhere'"),
    ]
    for argv, message in cases:
        assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2, argv
        assert message in capsys.readouterr().err
    (tmp_path / "heads" / "signs").mkdir(parents=True)
    state = {"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}
    save_state(tmp_path / "heads" / "signs", state, {"class_names": json.dumps(["a", "b"])})
    argv = [*test, "--data.tasks", "[signs]", *weights, "--model.heads", str(tmp_path / "heads")]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert "is for the classes a, b; task 'signs' has" in capsys.readouterr().err

"""The whole job on a tiny open_clip model: the run folder in open_clip's own formats, scored alike by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fusionlab import adapters, rules
from fusionlab.__main__ import main
from fusionlab.backbones import load_backbone
from fusionlab.engine import fuse
from fusionlab.modules.applying import applied
from fusionlab.runs.loading import load_weights

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASKS = ["digits", "signs"]
DATA = ["--data.tasks", json.dumps(TASKS), "--data.max_samples", "48", "--data.eval_batch_size", "32"]
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("open_clip") / "model"
    path.mkdir()
    torch.manual_seed(0)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**json.loads(json.dumps(CONFIG))).state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    rules = {"average": "average", "ties": "ties"}
    argv = ["fit", *DATA, "--model.backbone", str(model), "--model.dropout", "0.1", "--trainer.max_steps", "4"]
    argv += ["--fusion.rules", json.dumps(rules), "--trainer.enable_progress_bar", "false"]
    assert main([*argv, "--trainer.default_root_dir", str(root)]) == 0
    return root


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.mark.parametrize("rule", ["average", "ties"])
def test_fused_folders_score_as_in_the_run(model: Path, run: Path, tmp_path: Path, rule: str) -> None:
    argv = ["test", *DATA, "--model.backbone", str(model), "--model.weights", str(run / "fused" / rule)]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    scored = {row["task"]: row["value"] for row in rows_of(tmp_path)}
    assert scored == {row["task"]: row["value"] for row in rows_of(run) if row["rule"] == rule}


def test_a_fused_model_is_a_folder_of_open_clip(model: Path, run: Path) -> None:
    fused = open_clip.create_model(f"local-dir:{run / 'fused' / 'ties'}", require_pretrained=True)
    base = load_file(model / "open_clip_model.safetensors")
    assert fused.state_dict().keys() == base.keys()
    changed = {name for name, value in fused.state_dict().items() if not torch.equal(value, base[name])}
    assert changed == {f"visual.transformer.resblocks.{layer}.attn.in_proj_weight" for layer in range(2)}
    for name in changed:
        key = slice(32, 64)  # the rows of k, which was not adapted
        assert torch.equal(fused.state_dict()[name][key], base[name][key])


def test_adapters_are_those_of_stock_peft_on_stock_open_clip(model: Path, run: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    backbone = load_backbone(str(model))
    pixels = (images / 255 - backbone.mean) / backbone.std
    with torch.no_grad():
        pretrained = backbone.image_features(images)
        for folder in (*(run / "adapters" / task for task in TASKS), run / "fused" / "average"):
            stock = open_clip.create_model(f"local-dir:{model}", require_pretrained=True)
            features = PeftModel.from_pretrained(stock, folder).eval().encode_image(pixels)
            assert (features - pretrained).abs().max() > 1e-4
            with adapters.added(backbone.model, adapters.load_adapter(folder)):
                torch.testing.assert_close(features, backbone.image_features(images), rtol=0, atol=1e-5)


def test_a_base_with_other_weights_is_refused(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "open_clip_config.json").write_text((model / "open_clip_config.json").read_text())
    state = load_file(model / "open_clip_model.safetensors")
    save_file({name: value * 1.01 for name, value in state.items()}, other / "open_clip_model.safetensors")
    argv = ["test", *DATA, "--model.backbone", str(other), "--model.weights", str(run / "fused" / "average")]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "out")]) == 2
    assert "was made for another base" in capsys.readouterr().err


def offline_fuse(model: Path, run: Path, output: Path, rule: str) -> Path:
    finetuned = {task: str(run / "adapters" / task) for task in TASKS}
    recipe = ["fuse", "--base", str(model), "--finetuned", json.dumps(finetuned), "--rule", rule]
    assert main([*recipe, "--output", str(output)]) == 0
    return output


def test_offline_fuse_by_a_linear_rule_gives_the_adapter_of_the_run(model: Path, run: Path, tmp_path: Path) -> None:
    folders = offline_fuse(model, run, tmp_path / "fused", "average"), run / "fused" / "average"
    offline, in_run = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert offline.keys() == in_run.keys()
    for name, value in offline.items():
        torch.testing.assert_close(value, in_run[name])
    hashes = [json.loads((folder / "fusion.json").read_text())["base_hash"] for folder in folders]
    assert hashes[0] == hashes[1]


def test_offline_fuse_by_other_rules_sees_the_matrices_that_were_adapted(
    model: Path, run: Path, tmp_path: Path
) -> None:
    """q, k and v are one matrix on disk, of which adapters change q and v, each a matrix of its own."""
    offline = load_file(offline_fuse(model, run, tmp_path / "fused", "ties") / "model.safetensors")
    base = load_file(model / "open_clip_model.safetensors")
    loaded = {task: adapters.load_adapter(run / "adapters" / task) for task in TASKS}
    task_vectors = {task: dict(adapter.task_vector()) for task, adapter in loaded.items()}
    attentions = loaded["digits"].fused_attention
    apart = adapters.split_state(base, attentions)
    expected = fuse(rules.Ties(), {name: apart[name] for name in task_vectors["digits"]}, task_vectors).state
    expected = adapters.stored_state(apart | expected, attentions)
    assert offline.keys() == base.keys() == expected.keys()
    for name, value in offline.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def full_runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that train all weights of the image tower."""
    folders = {method: tmp_path_factory.mktemp("runs") / method for method in ("full", "tangent")}
    for method, folder in folders.items():
        argv = ["fit", *DATA, "--model.backbone", str(model), "--model.method", method, "--trainer.max_steps", "4"]
        argv += ["--model.learning_rate", "0.003", "--fusion.rules", "[average, ties]"]
        argv += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(folder)]
        assert main(argv) == 0
    return folders


@pytest.mark.parametrize("method", ["full", "tangent"])
@pytest.mark.parametrize("folder", ["finetuned/signs", "fused/average", "fused/ties"])
def test_all_weights_score_as_in_the_run(
    model: Path, full_runs: dict[str, Path], tmp_path: Path, method: str, folder: str
) -> None:
    argv = ["test", *DATA, "--model.backbone", str(model), "--model.weights", str(full_runs[method] / folder)]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    scored = {row["task"]: row["value"] for row in rows_of(tmp_path)}
    rows = [row for row in rows_of(full_runs[method]) if Path(folder).name in (row["rule"], row["finetuned_on"])]
    assert rows
    assert {row["task"]: row["value"] for row in rows} == {row["task"]: scored[row["task"]] for row in rows}


def test_a_full_model_is_a_folder_of_open_clip(model: Path, full_runs: dict[str, Path]) -> None:
    base = load_file(model / "open_clip_model.safetensors")
    states = {}
    for name in ("finetuned/digits", "finetuned/signs", "fused/average"):
        stock = open_clip.create_model(f"local-dir:{full_runs['full'] / name}", require_pretrained=True)
        states[name] = stock.state_dict()
        changed = {key for key, value in states[name].items() if not torch.equal(value, base[key])}
        assert states[name].keys() == base.keys()
        assert changed
        assert all(key.startswith("visual.") for key in changed)
        assert "visual.transformer.resblocks.0.attn.in_proj_weight" in changed
    for key, value in states["fused/average"].items():
        torch.testing.assert_close(value, (states["finetuned/digits"][key] + states["finetuned/signs"][key]) / 2)


def test_the_average_of_tangents_is_the_mean_of_their_features(model: Path, full_runs: dict[str, Path]) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("finetuned/digits", "finetuned/signs", "fused/average"):
        backbone = load_backbone(str(model))
        weights = load_weights(full_runs["tangent"] / name, backbone.model).weights
        with torch.no_grad(), applied(backbone, weights) as application:
            found[name] = application(lambda of=backbone: of.image_features(images))
    with torch.no_grad():
        base = backbone.image_features(images)
    assert all((features - base).abs().max() > 1e-2 for features in found.values())
    mean = (found["finetuned/digits"] + found["finetuned/signs"]) / 2
    torch.testing.assert_close(found["fused/average"], mean, rtol=1e-4, atol=1e-5)

"""Bases in 16 bits: rules are scored from float32 updates, saved is what was scored, and rounding is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from often import often
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration, ViTConfig, ViTModel
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

import fusionlab
from fusionlab import rules
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, base_state
from fusionlab.adapters.weights import state_of
from fusionlab.backbones import ASSETS
from fusionlab.fusion.making import fuse_weights
from fusionlab.linearize import tensors_replaced
from fusionlab.modules import ClipModule, T5Module
from fusionlab.modules.beside import beside_base
from fusionlab.rules.matrix_rule import has_core

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASKS = ("first", "second")
DENSE = {
    "ties": rules.Ties(density=0.5),
    "dare": rules.Dare(rules.Metagpt(), 0.5),
    "trim": rules.Trim(rules.Average(), 0.5),
    "breadcrumbs": rules.Breadcrumbs(keep=0.5),
    "slerp": rules.Slerp(0.3),
    "tsv_m": rules.TsvM(),
    "iso_c": rules.IsoC(),
    "knots": rules.Knots(),
}


def moved(module: Any, size: float = 2e-3) -> dict[str, Any]:
    """What training could have left: every trained tensor moved by a few thousandths of its size."""
    generator = torch.Generator().manual_seed(1)
    module.add_adapters(list(TASKS))
    for parameter in (each for task in TASKS for each in module.task_parameters[task]):
        scale = size * (parameter.float().std().nan_to_num(0.0) + 0.1)
        parameter.data.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return {task: module.finetuned(task) for task in TASKS}


@pytest.fixture
def make(t5_folder: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """A module of a kind and method whose base is in 16 bits."""

    def build(kind: str, method: str) -> Any:
        if kind.startswith("t5"):
            return T5Module(str(t5_folder(kind.removeprefix("t5-"))), method=method, dtype="bfloat16")
        return ClipModule("tiny-clip", method=method).to(torch.float16 if kind == "clip-float16" else torch.bfloat16)

    return build


@pytest.mark.parametrize(
    ("kind", "method"),
    often(
        [
            ("t5-tied", "lora"), ("t5-tied", "full"), ("t5-untied", "l_lora"), ("clip", "lora"),
            ("clip-float16", "full"), ("clip", "tangent"),
        ],
        "t5-tied-full", "clip-tangent",
    ),
)  # fmt: skip
def test_the_update_of_every_rule_is_that_of_a_float32_base(kind: str, method: str, make: Callable) -> None:
    module = make(kind, method)
    finetuned = moved(module)
    base = base_state(module.base_model)
    widened = {name: value.float() if value.is_floating_point() else value for name, value in base.items()}
    linear = {"average": rules.Average(), "metagpt": rules.Metagpt()}
    whole = method in ("full", "tangent")  # of which singular values take seconds
    for name, rule in {**DENSE, **linear}.items():
        if whole and rule.granularity == "tensor":
            continue
        fused = fuse_weights(rule, module, finetuned).weights
        expected = fuse_weights(rule, widened, finetuned).weights
        if isinstance(fused, Adapter):
            assert name in linear or has_core(rule)
            fused, expected = dict(fused.task_vector()), dict(expected.task_vector())
        fused, expected = state_of(fused), state_of(expected)
        assert fused.keys() == expected.keys()
        assert any((value != base[each].float()).any() for each, value in fused.items()), name
        for each, value in fused.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[each]), (name, each)


class _Projection(nn.Module):
    """A product with a bare parameter, as open_clip's image tower ends in one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(64, 48) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[None], x[None], x[None], need_weights=False)[0][0]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 48),
    "linear without bias": lambda: nn.Linear(64, 48, bias=False),
    "addmm": lambda: Conv1D(48, 64),
    "product": _Projection,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 4, stride=4), nn.Flatten()),
    "norm": lambda: nn.LayerNorm(64),
    "t5 norm": lambda: T5LayerNorm(64),
    "attention": _Attention,
}
IS_LINEAR = ("linear", "linear without bias", "addmm", "product", "convolution")


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 base", "autocast"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_adds_the_update_unrounded(kind: str, autocast: bool) -> None:
    """Against the layer in float32; of what is linear also the update that its outputs tell, by least squares."""
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    for parameter in layer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        parameter.data.copy_(parameter.data.bfloat16())
    values = {name: p.detach() * (1 + 2e-3 * torch.randn_like(p)) for name, p in layer.named_parameters()}
    x = torch.randn(8192, 64).bfloat16() if kind != "attention" else torch.randn(64, 64).bfloat16()
    with torch.no_grad():
        base = layer(x.float())
        with tensors_replaced(layer, values):
            expected = layer(x.float())
        if not autocast:
            layer.bfloat16()
        own = dict(layer.named_parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            inputs = x.float() if autocast else x
            plain = layer(inputs)
            with tensors_replaced(layer, values), beside_base(own, values):
                assert all(each.dtype == own[name].dtype for name, each in layer.named_parameters())
                output = layer(inputs)
            rounded = {name: value.bfloat16().to(own[name].dtype) for name, value in values.items()}
            with tensors_replaced(layer, rounded):
                lossy = layer(inputs)
    assert output.dtype == plain.dtype
    scale = expected.abs().max()
    assert (output.float() - expected).abs().max() < 2**-7 * scale
    if kind in IS_LINEAR:
        design = torch.cat([x.float(), torch.ones(len(x), 1)], dim=1)

        def update(of: Tensor) -> Tensor:
            return torch.linalg.lstsq(design, of.float()).solution

        truth = update(expected - base)
        found, lost = (update(each.float() - plain.float()) for each in (output, lossy))
        assert (found - truth).norm() < 0.25 * truth.norm()
        assert (lost - truth).norm() > 0.5 * truth.norm()


def rows_of(folder: Path, rule: str, name: str = "results.json") -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((folder / name).read_text())["rows"]
    return {(row["task"], row["metric"]): row for row in rows if row["rule"] == rule}


RULES = {
    "average": "average",
    "ties": {"class_path": "ties", "init_args": {"density": 0.5}},
    "dare": {"class_path": "dare", "init_args": {"rule": "metagpt"}},
}
T5 = ["--model", "T5Module", "--model.dtype", "bfloat16", "--data", "TextTasks"]
T5 += ["--data.tasks", "[sentiment, entailment]"]
CLIP = ["--data.tasks", "[digits, signs]", "--trainer.precision"]
CASES = {
    "t5 lora": [*T5, "--model.method", "lora"],
    "t5 full": [*T5, "--model.method", "full"],
    "clip full": [*CLIP, "bf16-true", "--model.method", "full"],
    "clip lora": [*CLIP, "bf16-true", "--model.method", "lora"],
    "clip mixed": [*CLIP, "bf16-mixed", "--model.method", "full"],
    "vit l_lora": [*CLIP, "bf16-true", "--model", "ViTModule", "--model.method", "l_lora"],
}
MODELS = {"t5": "tiny-t5", "cl": "tiny-clip"}


@pytest.mark.parametrize("case", often(CASES, "t5 lora"))
def test_fit_and_test_agree_and_rounding_has_rows_of_its_own(
    case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = [*CASES[case], "--data.max_samples", "64", "--data.eval_batch_size", "32", "--data.batch_size", "8"]
    if case.startswith("vit"):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
        flags += ["--model.backbone", str(tmp_path / "vit")]
    run = tmp_path / "run"
    argv = ["fit", *flags, "--trainer.max_steps", "4", "--trainer.enable_progress_bar", "false"]
    argv += ["--fusion.rules", json.dumps(RULES), "--fusion.dtype", "bfloat16", "--model.learning_rate", "0.003"]
    assert main([*argv, "--trainer.default_root_dir", str(run)]) == 0
    for rule in ("ties", "ties-bfloat16", "dare", "average-bfloat16"):
        folder = run / "fused" / rule
        stored = load_file(folder / "model.safetensors")
        dtype = torch.bfloat16 if rule.endswith("bfloat16") else torch.float32
        assert {value.dtype for value in stored.values()} == {dtype}
        if "mixed" not in case:  # whose base is in float32, as its configuration says
            assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        argv = ["test", *flags, "--model.weights", str(folder), "--output", str(tmp_path / f"{rule}.json")]
        assert main(argv) == 0
        scored, in_run = rows_of(tmp_path, rule, f"{rule}.json"), rows_of(run, rule)
        assert {key: row["value"] for key, row in scored.items()} == {key: row["value"] for key, row in in_run.items()}
        record = json.loads((folder / "fusion.json").read_text())
        for row in in_run.values():
            assert ("rounding" in row) == rule.endswith("bfloat16")
            if "rounding" in row:
                shares = {key: value for key, value in row["rounding"].items() if key != "dtype"}
                assert shares == record["rounded_shares"]
                assert sum(shares.values()) == pytest.approx(1)
    base = load_file((tmp_path / "vit" if case.startswith("vit") else ASSETS / MODELS[case[:2]]) / "model.safetensors")
    check_shares(run, base if "mixed" in case else {name: value.bfloat16().float() for name, value in base.items()})
    text = (run / "results.md").read_text()
    assert "`ties-bfloat16`: kept" in text


def check_shares(run: Path, base: dict[str, Tensor]) -> None:
    """The shares of TIES, from the files: the float32 model, the rounded one, and the base that both add to."""
    wanted, stored = (load_file(run / "fused" / name / "model.safetensors") for name in ("ties", "ties-bfloat16"))
    record = json.loads((run / "fused" / "ties-bfloat16" / "fusion.json").read_text())
    assert stored.keys() == wanted.keys() == base.keys()
    counts = {"kept": 0, "changed": 0, "lost": 0}
    for name, value in wanted.items():
        assert torch.equal(value.bfloat16(), stored[name])
        updated, same = value != base[name], stored[name] == base[name].bfloat16()
        exact = stored[name].float() == value
        counts["lost"] += int((updated & same).sum())
        counts["kept"] += int((updated & ~same & exact).sum())
        counts["changed"] += int((updated & ~same & ~exact).sum())
    assert record["rounding"]["updated_elements"] == sum(counts.values()) > 0
    assert record["rounded_shares"] == {name: count / sum(counts.values()) for name, count in counts.items()}


def test_a_folder_of_a_16_bit_run_loads_with_from_pretrained(make: Callable, tmp_path: Path) -> None:
    module = make("t5-untied", "lora")
    fused = fuse_weights(rules.Ties(), module, moved(module))
    fusionlab.fusion.folders.save_fused(tmp_path / "fused", fused, module.backbone, {})
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "fused")
    state = loaded.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    for name, value in base_state(module.base_model).items():
        assert torch.equal(state[name], fused.state.get(name, value.float()))


def test_rounding_is_refused_where_it_moves_the_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fit", "--data.tasks", "[digits, signs]", "--data.max_samples", "16", "--model.method", "tangent"]
    argv += ["--fusion.dtype", "bfloat16", "--trainer.default_root_dir", str(tmp_path / "run")]
    assert main(argv) == 2
    assert "fusion.dtype bfloat16: models of method 'tangent'" in capsys.readouterr().err

"""Tangents under bf16-mixed: small updates survive, and every way of computing one model gives the same.

The Jacobian products run in bfloat16, so an update is known to about 2^-7; its task vector, the sum with the value and
the head's product are float32. Updates are scaled to a share of the outputs' size, down to a thousandth, far below
what bfloat16 resolves of the outputs themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusionlab
from fusionlab.adapters import Adapter
from fusionlab.adapters.weights import Weights, state_of
from fusionlab.backbones import ViTBackbone
from fusionlab.evaluation import TangentOutputs
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.folders import save_finetuned
from fusionlab.linearize import linearized_call
from fusionlab.modules.applying import as_linearized
from fusionlab.runs.loading import load_weights

RATIOS = (0.1, 0.01, 0.001)
CELLS = [(model, method) for model in ("clip", "vit", "t5", "open_clip") for method in ("tangent_lora", "tangent")]
OTHER = {"a": 0.3, "b": 0.7}


@contextmanager
def precision(bfloat16: bool) -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        yield


def relative(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / scale.double().norm())


class Case:
    """A module with two tasks, trained by hand, and something to run it on."""

    def __init__(self, model: str, method: str) -> None:
        torch.manual_seed(0)
        self.module: Any = {"clip": _clip, "vit": _vit, "t5": _t5, "open_clip": _open_clip}[model](method)
        self.module.eval()
        self.module.add_adapters_for(["a", "b"])
        self.call, self.batch = _inputs(model, self.module)
        self.start = {task: [p.detach().clone() for p in self.module.task_parameters[task]] for task in "ab"}
        generator = torch.Generator().manual_seed(1)
        self.step = {
            task: [
                (0.02 if not p.any() else 0.1 * float(p.float().std().nan_to_num(0.0)))
                * torch.randn(p.shape, generator=generator)
                for p in self.start[task]
            ]
            for task in "ab"
        }
        self.scale(1.0)
        with precision(False):
            self.module.activate(None)
            self.base = self.module.output(self.call)
            size = max(self.moved(task).norm() / self.base.norm() for task in "ab")
        self.unit = 1 / float(size)
        # what bfloat16 makes of the Jacobian itself: T5 does not scale its attention scores, which it rounds to tenths
        self.of_bfloat16 = 0.15 if model == "t5" else 3e-2

    def scale(self, factor: float) -> None:
        """Let both tasks be this far from the base."""
        with torch.no_grad():
            for task in "ab":
                for p, start, step in zip(
                    self.module.task_parameters[task], self.start[task], self.step[task], strict=True
                ):
                    p.copy_(start + factor * step)

    def moved(self, task: str) -> Tensor:
        """J τ in float32."""
        with precision(False), self.module.use(task):
            return self.module.output(self.call) - self.base

    def run(self, weights: Any, bfloat16: bool = True) -> Tensor:
        with precision(bfloat16), self.module.use(weights):
            return self.module.output(self.call)

    def logits(self, weights: Any, bfloat16: bool = True) -> Tensor:
        with precision(bfloat16), self.module.use(weights):
            return self.module.scored_classes("a", self.batch)[0]

    def finetuned(self) -> dict[str, Weights]:
        return {task: self.module.finetuned(task) for task in "ab"}


def _clip(method: str) -> Any:
    module = fusionlab.ClipModule("tiny-clip", method=method, rank=4)
    module.heads["a"] = torch.nn.functional.normalize(torch.randn(5, module.backbone.model.config.projection_dim))
    return _ready(module)


def _open_clip(method: str) -> Any:
    import open_clip

    from fusionlab.backbones import OpenClipBackbone

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config)
    model.visual.preprocess_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3}
    backbone = OpenClipBackbone(model, _Files(), name="tiny", config={"model_cfg": config})
    module = fusionlab.ClipModule(backbone, method=method, rank=4)
    module.heads["a"] = torch.nn.functional.normalize(torch.randn(5, 16))
    return _ready(module)


class _Files:
    """In the place of a tokenizer, which nothing here needs."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def _vit(method: str) -> Any:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone = ViTBackbone(ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)), name="tiny")
    module = fusionlab.ViTModule(backbone, method=method, rank=4)
    module.add_head("a", 5)
    torch.nn.init.normal_(module.head("a").weight)
    return _ready(module)


def _t5(method: str) -> Any:
    return _ready(fusionlab.T5Module("tiny-t5", method=method, rank=4))


def _ready(module: Any) -> Any:
    def add(tasks: list[str]) -> None:
        module.task_parameters = module.adaptation.add(tasks)

    module.add_adapters_for = add
    return module


def _inputs(model: str, module: Any) -> tuple[Any, dict[str, Any]]:
    if model == "t5":
        backbone = module.backbone
        tokens = backbone.tokenizer(["a good film", "bad"], padding=True, return_tensors="pt")
        module.answers["a"] = backbone.answers(["positive", "negative"], "a")
        inputs = {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "target": torch.tensor([0, 1]),
        }
        labels = torch.tensor([[5, 6, 1], [7, 1, -100]])
        return partial(backbone.logits, tokens.input_ids, tokens.attention_mask, labels), inputs
    size = module.backbone.image_size
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8)
    return partial(module.backbone.image_features, images), {"images": images, "labels": torch.zeros(6).long()}


@pytest.fixture(scope="module", params=CELLS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.mark.parametrize("ratio", RATIOS)
def test_ways_of_computing_one_model(case: Case, ratio: float, tmp_path: Path) -> None:
    """In the run, from its folder, and as a sum of tangents; against the update in float32."""
    case.scale(ratio * case.unit)
    moved, finetuned = case.moved("a"), case.finetuned()
    direct, base = case.run("a"), case.run(case.module.linear_outputs(finetuned).at({}))
    assert direct.dtype == torch.float32
    row = {"model": "finetuned", "finetuned_on": "a", "method": case.module.method}
    save_finetuned(tmp_path / "a", finetuned["a"], case.module.backbone, row)
    loaded = load_weights(tmp_path / "a", case.module.base_model).weights
    assert relative(case.run(loaded), direct, moved) < 1e-3
    summed = case.run(case.module.linear_outputs(finetuned).at({"a": 1.0}))
    assert relative(summed, direct, moved) < 2e-2
    assert relative(direct - base, moved, moved) < case.of_bfloat16
    outputs = case.module.linear_outputs(finetuned)
    with precision(False):
        assert relative(case.run(outputs.at({"a": 1.0}), False), case.run("a", False), moved) < 1e-4


@pytest.mark.parametrize("ratio", RATIOS)
def test_logits(case: Case, ratio: float) -> None:
    """What the head makes of them: no rounding to bfloat16 after the sum."""
    case.scale(ratio * case.unit)
    finetuned = case.finetuned()
    outputs = case.module.linear_outputs(finetuned)
    with precision(False):
        base = case.logits(None, False)
        moved = case.logits("a", False) - base
    outputs.forget()
    start = case.logits(outputs.at({}))
    direct = case.logits("a")
    assert direct.dtype == torch.float32
    assert relative(direct - start, moved, moved) < 4e-2
    outputs.forget()
    assert relative(case.logits(outputs.at({"a": 1.0})), direct, moved) < 2e-2
    outputs.forget()
    both = case.logits(outputs.at(OTHER)) - start
    with precision(False):
        outputs.forget()
        expected = case.logits(outputs.at(OTHER), False) - base
    assert relative(both, expected, expected) < 4e-2


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_was_trained_otherwise_is_linearized_in_the_same_precision(case: Case, ratio: float) -> None:
    """Post-hoc linearization of an adapter, and of the same weights written out, which differ from the base little."""
    case.scale(ratio * case.unit)
    moved, weights = case.moved("a"), case.finetuned()["a"]
    if isinstance(weights, Adapter):
        from fusionlab.adapters import base_state

        base = base_state(case.module.base_model)
        written = {name: base[name].double() + value.double() for name, value in weights.task_vector().items()}
        state = as_linearized({name: value.float() for name, value in written.items()})
        assert relative(case.run(state), case.run("a"), moved) < 2e-2 + 1e-6 / ratio  # float32 weights have an ulp
    else:
        state = as_linearized(dict(state_of(weights)))
        assert relative(case.run(state), case.run("a"), moved) < 1e-3


@pytest.mark.parametrize("ratio", RATIOS)
def test_parts_of_the_sweep(ratio: float) -> None:
    """What the sweep's shortcut keeps of each task vector, against the logits of each by itself."""
    case = Case("clip", "tangent_lora")
    case.scale(ratio * case.unit)
    finetuned = case.finetuned()
    data: Any = _Data(case.batch)
    with precision(True):
        of_run = Finetuned(dict(case.module.base_model.state_dict()), finetuned)
        shortcut = TangentOutputs(_Mixed(case.module), data, of_run)
        base, first, second = shortcut._parts("a", "test")[0]
    features = case.run("a")
    expected = features.float() @ case.module.heads["a"].T - base
    assert relative(first, expected, expected) < 2e-2
    moved = case.moved("b") @ case.module.heads["a"].T
    assert relative(second, moved, moved) < 3e-2


class _Data:
    def __init__(self, batch: dict[str, Any]) -> None:
        self.tasks, self.batch = {"a": None}, batch | {"mask": torch.ones(6).bool()}

    def eval_batches(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        return [self.batch]


class _Mixed:
    """The module under a trainer with bf16-mixed."""

    def __init__(self, module: Any) -> None:
        self.__dict__["module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def evaluation_context(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("point_dtype", [torch.float32, torch.bfloat16])
def test_the_tangent_is_formed_from_the_unrounded_point(point_dtype: torch.dtype) -> None:
    """τ = φ − φ₀ in float32, whatever the point is computed in, for weights far closer than bfloat16 resolves."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 3, bias=False).to(point_dtype)
    inputs = torch.randn(5, 64)
    point = {"weight": layer.weight.detach()}
    for size in (1e-2, 1e-4, 1e-6):
        tau = size * torch.randn(3, 64)
        phi = {"weight": point["weight"].float() + tau}
        with precision(True):
            output = (
                linearized_call(lambda: layer(inputs.to(torch.bfloat16)), layer, phi, point, dtype=torch.bfloat16)
                - layer(inputs.to(torch.bfloat16)).float()
            )
        expected = inputs @ (phi["weight"] - point["weight"].float()).T
        assert relative(output, expected, expected) < 1e-2

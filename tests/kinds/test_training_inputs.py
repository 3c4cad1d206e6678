"""Searches that look at training inputs, on every kind of model: which layers they know, and what these read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_bases import write_small_bases
from torch import Tensor, nn

from fusionlab.adapters import Adapter, base_state
from fusionlab.backbones.layout import Layout
from fusionlab.errors import InputError
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.linearize import LinearizedState
from fusionlab.search import Fisher, Regmean, RegmeanPlusPlus, Search, ValidationProblem, check_data
from fusionlab.search.layers import LinearLayers
from fusionlab.search.training import TrainingRuns
from fusionlab.search.workbench import Workbench, workbench

IMAGES, TEXTS = ["digits", "signs"], ["sentiment", "similarity"]
BACKBONES = ["tiny-clip", "open_clip", "vit", "tiny-t5"]
MODULES = {"vit": "ViTModule", "tiny-t5": "T5Module"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Module and data of a backbone, made when they are first asked for."""
    own = {name: str(path) for name, path in write_small_bases(tmp_path_factory.mktemp("bases")).items()}
    made: dict[str, Workbench] = {}

    def of(backbone: str) -> Workbench:
        if backbone not in made:
            texts = backbone == "tiny-t5"
            module = {"class_path": MODULES.get(backbone, "ClipModule")}
            data: dict[str, Any] = {"tasks": TEXTS if texts else IMAGES, "max_samples": 12}
            module["init_args"] = {"backbone": own.get(backbone, backbone)}  # type: ignore[assignment]
            config = {"model": module, "data": {"class_path": "TextTasks" if texts else "ImageTasks"}}
            config["data"]["init_args"] = data  # type: ignore[assignment]
            made[backbone] = workbench(config)
        return made[backbone]

    return of


def trained(bench: Workbench, method: str) -> dict[str, Any]:
    """Weights as if trained, by task."""
    generator = torch.Generator().manual_seed(1)

    def moved(value: Tensor) -> Tensor:
        return value.detach() + 0.02 * torch.randn(value.shape, generator=generator)

    if method == "full":
        scopes = tuple(f"{scope}." if scope else "" for scope in bench.module.backbone.full_scopes)
        own = {name: value for name, value in bench.base.items() if name.startswith(scopes)}
        floats = {name: value for name, value in own.items() if value.is_floating_point()}
        return {task: {name: moved(value) for name, value in floats.items()} for task in bench.data.tasks}
    arguments = {"backbone": bench.module.backbone.name, "method": method, "rank": 2}
    own = type(bench.module)(**arguments)
    for parameters in own.adaptation.add(list(bench.data.tasks)).values():
        for parameter in parameters:
            parameter.data = moved(parameter)
    return {task: own.finetuned(task) for task in bench.data.tasks}


def problem_of(bench: Workbench, weights: dict[str, Any]) -> ValidationProblem:
    finetuned = Finetuned(bench.module, weights)
    return ValidationProblem(tuple(weights), finetuned, bench.module, bench.data, lambda rules: [])


def multiplied(backbone: str, method: str, bench: Workbench) -> set[str]:
    """The weights on disk of the linear layers that are fused, by what each kind of model has."""
    layout = Layout.of(bench.module.base_model)
    if method != "full":
        found = trained(bench, method)[next(iter(bench.data.tasks))]
        assert isinstance(found, Adapter)
        return set(layout.renamed({f"{name}.weight": name for name in found.factors}))
    own = bench.module.backbone.full_scopes
    parts = bench.module.base_model.named_modules()
    names = {f"{name}.weight" for name, part in parts if isinstance(part, nn.Linear) and name.startswith(tuple(own))}
    if backbone == "open_clip":
        attentions = [f"visual.transformer.resblocks.{number}.attn" for number in range(2)]
        names -= {f"{name}.{part}_proj.weight" for name in attentions for part in "qkv"}
        names |= {f"{name}.in_proj_weight" for name in attentions}
    names -= {"lm_head.weight"} if backbone == "tiny-t5" else set()  # which the embeddings have too
    return set(layout.renamed(dict.fromkeys(names)))


CELLS = [
    pytest.param(backbone, method, marks=[] if (backbone, method) in {("open_clip", "full")} else [pytest.mark.slow])
    for backbone in BACKBONES
    for method in ("full", "lora", "l_lora")
]


@pytest.mark.parametrize(("backbone", "method"), CELLS)
def test_every_linear_layer_is_known_and_the_model_is_made(backbone: str, method: str, bench: Any) -> None:
    kind = bench(backbone)
    weights, expected = trained(kind, method), multiplied(backbone, method, kind)
    problem = problem_of(kind, weights)
    searches: list[Search] = [Regmean(num_samples=3), RegmeanPlusPlus(num_samples=2)]
    for search in searches:
        found = search.search(problem)
        assert set(found.rule.layers) == expected  # type: ignore[attr-defined]
        assert {len(of) for layer in found.rule.layers.values() for of in layer.grams.values()} == {1}  # type: ignore[attr-defined]
        finetuned = Finetuned(kind.module, weights)
        model = finetuned.make(finetuned.plan(found.rule, finetuned.tasks))
        assert isinstance(model, dict)
        state = base_state(kind.module.base_model) | model
        assert all(value.isfinite().all() for value in state.values())
        one = {next(iter(weights)): next(iter(weights.values()))}
        finetuned, only = Finetuned(kind.module, one), search.search(problem_of(kind, one))
        own = kind.base | finetuned.moved(kind.base, finetuned.task_vector(next(iter(one))))  # type: ignore[operator]
        for name, value in finetuned.make(finetuned.plan(only.rule, finetuned.tasks)).items():  # type: ignore[union-attr]
            torch.testing.assert_close(value, own[name], rtol=0, atol=1e-6)


def test_text_is_read_without_padding(bench: Any) -> None:
    kind = bench("tiny-t5")
    weights = trained(kind, "full")
    finetuned = Finetuned(kind.module, weights)
    runs, task, seen = TrainingRuns(finetuned, kind.module, kind.data), "sentiment", []
    run_inputs = kind.module.run_inputs
    kind.module.run_inputs = lambda task, batch: (seen.append(batch["index"]), run_inputs(task, batch))
    grams = runs.expert_grams(task, 8)
    del kind.module.run_inputs
    assert [len(index) for index in seen] == [1] * 8
    batch = kind.data.splits[task]["train"].batch(torch.cat(seen))
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    name = "encoder.block.1.layer.0.SelfAttention.q"
    read: list[Tensor] = []
    layer = kind.module.base_model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad(), kind.module.use(weights[task]):
        kind.module.eval()
        kind.module.run_inputs(task, batch)
    handle.remove()
    rows = read[0][mask].double()
    expected = rows.T @ rows / len(rows)
    torch.testing.assert_close(grams[f"{name}.weight"][0], expected, rtol=1e-4, atol=1e-6)
    padded = read[0].double().flatten(0, 1)
    assert not torch.allclose(padded.T @ padded / len(padded), expected, rtol=1e-2)


class Ties(nn.Module):
    """An embedding and its output layer with one weight; two layers with another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight, self.second.weight = self.embed.weight, self.first.weight


def test_tied_weights_are_one_unit_and_embeddings_none() -> None:
    model = Ties()
    units = {"embed.weight", "first.weight", "first.bias", "second.bias"}
    layers = LinearLayers(model, Layout(), units)
    assert set(layers.units) == {"first.weight"}
    inputs = [torch.randn(4, 3), torch.randn(2, 3)]
    with layers.reading(units) as reading:
        for layer, rows in zip((model.first, model.second), inputs, strict=True):
            layer(rows)
    rows = torch.cat(inputs).double()
    torch.testing.assert_close(reading.grams(layers, units)["first.weight"][0], rows.T @ rows / 6)
    with layers.reading(units) as reading:
        model.first(torch.full((1, 3), float("nan")))
    with pytest.raises(InputError, match=r"first\.weight reads NaN or Inf while a fine-tuned model runs"):
        reading.grams(layers, units)


def test_what_is_found_of_experts_is_found_once(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = bench("open_clip")
    weights = trained(kind, "lora")
    runs = TrainingRuns(Finetuned(kind.module, weights), kind.module, kind.data)
    ran: list[str] = []
    own = kind.module.logits
    monkeypatch.setattr(kind.module, "logits", lambda task, images: (ran.append(task), own(task, images))[1])
    for tasks in (IMAGES, IMAGES[:1], IMAGES[::-1]):
        for search, count in ((Regmean(num_samples=3), 1), (Fisher(num_samples=3), 3)):
            finetuned = Finetuned(kind.module, weights)
            problem = ValidationProblem(tuple(tasks), finetuned, kind.module, kind.data, lambda rules: [], runs)
            found = search.search(problem)
            assert (found.num_samples, found.passes) == (3 * len(tasks), 1.0)
            assert [ran.count(task) for task in IMAGES] == ([count] * 2 if tasks == IMAGES else [0, 0])
            ran.clear()


def test_what_acts_to_first_order_is_refused(bench: Any) -> None:
    kind = bench("tiny-clip")
    states = {task: LinearizedState(state) for task, state in trained(kind, "full").items()}
    with pytest.raises(InputError, match="act to first order about the base only"):
        Regmean().search(problem_of(kind, states))
    for method in ("tangent_lora", "tangent"):
        with pytest.raises(InputError, match=f"rules r: models of method {method} act to first order"):
            check_data({"r": Fisher()}, kind.data, ["lora", method])
    check_data({"r": Fisher()}, kind.data, ["lora", "l_lora", "full"])


def test_factor_space_is_refused(bench: Any) -> None:
    kind = bench("tiny-clip")
    finetuned = Finetuned(kind.module, trained(kind, "l_lora"), "factor")
    problem = ValidationProblem(tuple(IMAGES), finetuned, kind.module, kind.data, lambda rules: [])
    with pytest.raises(InputError, match="factor space needs a weighted sum"):
        Regmean().search(problem)

"""A name is not a tensor: tied and shared tensors, modules used twice, buffers, values overwritten in place.

Many candidates scored in one pass must give the outputs of each by itself, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusionlab
from fusionlab import rules
from fusionlab.adapters import Adapter, Factors, base_state
from fusionlab.adapters.weights import Weights
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.data import TextTasks
from fusionlab.errors import InputError
from fusionlab.evaluation import Candidate, linear_tasks, score_candidates, tangent_shortcut
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.linearize import LinearizedState, linearized_call, tensors_replaced
from fusionlab.modules.images import ImageClassifier

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Backbone(nn.Module):
    """Any network of 4-vectors, where fusionlab expects a backbone."""

    scope, full_scopes, default_target_modules, name = "", ("",), ("in_layer",), "network"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()


class Module(ImageClassifier):
    """Keeps the outputs that it is scored by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(Backbone(model), learning_rate=1e-3)
        self.seen: list[Tensor] = []

    def prepare_tasks(self, tasks: dict[str, Any]) -> None:
        """Nothing to prepare."""

    def logits(self, task: str, images: Tensor) -> Tensor:
        return self.output(lambda: self.base_model(images))

    def score(self, task: str, batch: dict[str, Any], metrics: Any) -> None:
        self.seen.append(self.logits(task, batch["images"]).clone())
        metrics.update(lowest_argmax(self.seen[-1]), batch["labels"], batch["mask"])


class Samples(list):
    data_version = "v"


class Data:
    """Two batches of 4-vectors in four classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(8, 3, 4, generator=generator)
        labels, mask = torch.arange(8) % 4, torch.ones(8, dtype=torch.bool)
        self.batches = [
            {"images": images[part], "labels": labels[part], "mask": mask[part]} for part in (slice(4), slice(4, 8))
        ]
        self.tasks = {"task": None}
        self.splits = {"task": {"test": Samples(range(8))}}

    def eval_batches(self, task: str, split: str, **_: Any) -> list[dict[str, Any]]:
        return self.batches


# networks, each with a trap


class Network(nn.Module):
    """Mean over tokens at the end, so that labels are ``(batch,)``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).mean(1)


class TiedPair(Network):
    """Two layers of one matrix, with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.in_layer, self.middle, self.out_layer = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out_layer.weight = self.in_layer.weight

    def tokens(self, x: Tensor) -> Tensor:
        return self.out_layer(self.middle(self.in_layer(x).tanh()).tanh())


class TiedBehindAFrozenStart(TiedPair):
    """As before; what comes first is in no candidate, so that the tied layer meets equal inputs."""

    def tokens(self, x: Tensor) -> Tensor:
        return self.in_layer(self.out_layer(self.middle(x).tanh()).tanh())


class OnlyTheSecondNameIsALayer(Network):
    """A matrix of the network itself, which a layer has too: its first name belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(4))
        self.middle, self.in_layer = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.in_layer.weight = self.table

    def tokens(self, x: Tensor) -> Tensor:
        return self.in_layer(self.middle(x)) @ self.table


class OneModuleTwice(Network):
    """One layer object under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.in_layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.in_layer

    def tokens(self, x: Tensor) -> Tensor:
        return self.in_layer(self.again(self.in_layer(self.middle(x)).tanh()).tanh())


class Buffers(Network):
    """Running means that differ between candidates, in two norms that share one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.in_layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.second.running_mean = self.first.running_mean

    def tokens(self, x: Tensor) -> Tensor:
        return self.second(self.in_layer(self.second(self.middle(x)) + self.first(x)))


class InPlace(Network):
    """Frozen layers whose outputs are overwritten by what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.act, self.in_layer = nn.Linear(4, 4), nn.Hardswish(inplace=True), nn.Linear(4, 4)

    def tokens(self, x: Tensor) -> Tensor:
        hidden = self.act(self.middle(x))
        hidden += x
        hidden *= 3
        return self.in_layer(hidden)


class InputOverwritten(Network):
    """The input of a frozen layer is overwritten after the layer has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.in_layer = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def tokens(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        after = self.middle(hidden)
        hidden.zero_()
        return self.in_layer(after + self.middle(hidden))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each
    for each in (
        TiedPair,
        TiedBehindAFrozenStart,
        OnlyTheSecondNameIsALayer,
        OneModuleTwice,
        Buffers,
        InPlace,
        InputOverwritten,
    )
}
TRAINED = ("in_layer.weight", "table", "first.running_mean")


def module_of(name: str) -> Module:
    torch.manual_seed(3)
    return Module(NETWORKS[name]())


def states_of(module: Any, names: Any, count: int = 3) -> list[Weights]:
    """As if trained: the tensors of these names moved at random, in each state by another amount."""
    base, generator = base_state(module.base_model), torch.Generator().manual_seed(1)
    chosen = {name: base[name] for name in names if name in base}
    assert chosen
    return [
        {name: value + 0.5 * torch.randn(value.shape, generator=generator) for name, value in chosen.items()}
        for _ in range(count)
    ]


def together(module: Any, data: Any, weights: list[Weights | None], tasks: tuple[str, ...]) -> list[list[Tensor]]:
    """The outputs of each model, by batch, from one pass."""
    module.seen.clear()
    candidates = {str(number): Candidate(each, tasks, {}) for number, each in enumerate(weights)}
    score_candidates(module, data, candidates, "test")
    return [module.seen[number :: len(weights)] for number in range(len(weights))]


def apart(module: Any, data: Any, weights: list[Weights | None], tasks: tuple[str, ...]) -> list[list[Tensor]]:
    found = []
    for each in weights:
        module.seen.clear()
        with module.use(each):
            fusionlab.evaluate(module, data, tasks, "test")
        found.append(list(module.seen))
    return found


def assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for each, of in zip(found, expected, strict=True):
        assert len(each) == len(of) > 1
        for one, other in zip(each, of, strict=True):
            assert torch.equal(one, other)
    assert len({tuple(of[0].flatten().tolist()) for of in expected}) == len(expected)


@pytest.mark.parametrize("kinds", ["weights", "with the pretrained", "with adapters", "with linearized"])
@pytest.mark.parametrize("name", NETWORKS)
def test_candidates_in_one_pass_are_each_by_itself(name: str, kinds: str) -> None:
    module, data = module_of(name), Data()
    weights: list[Weights | None] = [*states_of(module, TRAINED)]
    if kinds == "with the pretrained":
        weights = [None, *weights]
    elif kinds == "with adapters":
        factors = {"in_layer": Factors(torch.randn(1, 4), torch.randn(4, 1), 1.0)}
        weights = [weights[0], Adapter(factors), *weights[1:]]
    elif kinds == "with linearized":
        layers = [each for each in states_of(module, TRAINED) if isinstance(each, Mapping)]
        moved = [{key: value for key, value in each.items() if "running" not in key} for each in layers]
        weights = [weights[0], *(LinearizedState(each) for each in moved), weights[1]]
    before = {key: value.clone() for key, value in base_state(module.base_model).items()}
    assert_equal(together(module, data, weights, ("task",)), apart(module, data, weights, ("task",)))
    after = base_state(module.base_model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any("forward" in vars(part) for part in module.base_model.modules())


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_candidates_of_a_t5_in_one_pass_are_each_by_itself(
    kind: str, t5_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fusionlab.T5Module(str(t5_folder(kind)))
    data = text_data(module, tmp_path)
    module.seen = []
    score, log_likelihoods = module.score, module.log_likelihoods

    def kept(task: str, batch: dict[str, Any]) -> Tensor:
        module.seen.append(log_likelihoods(task, batch))
        return module.seen[-1]

    monkeypatch.setattr(module, "log_likelihoods", kept)
    base = base_state(module.base_model)
    of_embedding = states_of(module, ("shared.weight",))
    everything = states_of(module, base, 2)
    weights: list[Weights | None] = [None, *of_embedding, *everything]
    tasks = ("sentiment",)
    assert_equal(together(module, data, weights, tasks), apart(module, data, weights, tasks))
    assert score is not None


@pytest.mark.parametrize("rule", [rules.Average(), rules.TaskArithmetic(0.3), rules.Ties(), rules.Metagpt("tensor")])
def test_fused_t5_models_in_one_pass_are_each_by_itself(
    rule: Any, t5_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fusionlab.T5Module(str(t5_folder("tied")))
    data = text_data(module, tmp_path)
    module.seen = []
    log_likelihoods = module.log_likelihoods

    def kept(task: str, batch: dict[str, Any]) -> Tensor:
        module.seen.append(log_likelihoods(task, batch))
        return module.seen[-1]

    monkeypatch.setattr(module, "log_likelihoods", kept)
    base = base_state(module.base_model)
    states = dict(zip("abc", states_of(module, base), strict=True))
    finetuned = Finetuned(base, states)
    plans = [finetuned.plan(rule, tasks) for tasks in ("ab", "ac", "abc")]
    weights: list[Weights | None] = [finetuned.make(plan) for plan in plans]
    assert_equal(together(module, data, weights, ("sentiment",)), apart(module, data, weights, ("sentiment",)))


def text_data(module: Any, cache: Path) -> Any:
    data = TextTasks(["sentiment"], max_samples=24, eval_batch_size=12, cache_dir=str(cache))
    monkeypatched = type("Attached", (), {"lightning_module": module})()
    data.trainer = monkeypatched
    data.setup()
    module.prepare_tasks(data.tasks)
    return data


# the frozen work is still shared


def test_frozen_layers_before_the_first_change_run_once_a_batch() -> None:
    module, data = module_of("TiedPair"), Data()
    calls: list[str] = []
    for name in ("in_layer", "middle"):
        layer = getattr(module.base_model, name)
        layer.forward = lambda x, layer=layer, name=name: calls.append(name) or F.linear(x, layer.weight, layer.bias)
    weights = states_of(module, ("middle.weight",))
    together(module, data, weights, ("task",))
    assert calls == ["in_layer", "middle", "middle", "middle"] * 2
    assert "forward" in vars(module.base_model.in_layer)  # what was there before is there again


# the other places that replace by name


def test_a_tensor_is_replaced_by_any_of_its_names() -> None:
    module = TiedPair()
    value, x = torch.full((4, 4), 0.25), torch.randn(2, 3, 4)
    outputs = []
    for name in ("in_layer.weight", "out_layer.weight"):
        with tensors_replaced(module, {name: value}):
            assert module.in_layer.weight is module.out_layer.weight is value
            outputs.append(module(x))
    assert torch.equal(*outputs)
    with tensors_replaced(module, {"in_layer.weight": value, "out_layer.weight": value}):
        assert torch.equal(module(x), outputs[0])
    with (
        pytest.raises(InputError, match=r"in_layer\.weight and out_layer\.weight are one tensor"),
        tensors_replaced(module, {"in_layer.weight": value, "out_layer.weight": value + 1}),
    ):
        pass
    assert not torch.equal(module.in_layer.weight, value)


@pytest.mark.parametrize("name", ["in_layer.weight", "out_layer.weight"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_linearized_parameter_may_go_by_any_of_its_names(name: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    module, x = TiedPair().requires_grad_(False), torch.randn(2, 3, 4)
    point, moved = module.in_layer.weight, module.in_layer.weight + 0.1 * torch.randn(4, 4)
    cast = x if dtype is None else x.to(dtype)
    found = linearized_call(lambda: module(cast), module, {name: moved}, {name: point}, dtype=dtype)
    both = torch.func.jvp(
        lambda weight: torch.func.functional_call(
            module, {"in_layer.weight": weight, "out_layer.weight": weight}, (x,)
        ),
        (point,),
        (moved - point,),
    )
    torch.testing.assert_close(found.float(), both[0] + both[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "names", [("in_layer.weight",), ("out_layer.weight",), ("in_layer.weight", "out_layer.weight")]
)
def test_weights_may_have_any_name_of_a_tied_tensor(names: tuple[str, ...]) -> None:
    module, data = module_of("TiedPair"), Data()
    value = torch.full((4, 4), 0.25)
    expected = apart(module, data, [{"in_layer.weight": value}], ("task",))
    weights: list[Weights | None] = [dict.fromkeys(names, value)]
    for way in (apart, together):
        assert torch.equal(way(module, data, weights, ("task",))[0][1], expected[0][1])
    [[linear, _]] = apart(module, data, [LinearizedState({"in_layer.weight": value})], ("task",))
    [[found, _]] = apart(module, data, [LinearizedState(dict.fromkeys(names, value))], ("task",))
    assert torch.equal(found, linear)


def test_two_values_for_one_tensor_are_refused() -> None:
    module = module_of("TiedPair")
    weights = {"in_layer.weight": torch.zeros(4, 4), "out_layer.weight": torch.ones(4, 4)}
    with pytest.raises(InputError, match=r"in_layer\.weight and out_layer\.weight are one tensor"), module.use(weights):
        pass


@pytest.mark.parametrize("layers", [("in_layer",), ("out_layer",), ("in_layer", "middle"), ("middle",)])
def test_a_tangent_adapter_on_a_tied_layer_is_no_change_of_the_tensor(layers: tuple[str, ...]) -> None:
    module, data = module_of("TiedPair"), Data()
    generator = torch.Generator().manual_seed(2)

    def adapter() -> Adapter:
        shapes = ((1, 4), (4, 1))
        pairs = {layer: [torch.randn(shape, generator=generator) for shape in shapes] for layer in layers}
        return Adapter({layer: Factors(*pair, 1.0) for layer, pair in pairs.items()}, method="tangent_lora")

    finetuned = {"x": adapter(), "y": adapter()}
    assert module.acts_linearly(finetuned) is (layers == ("middle",))
    assert (tangent_shortcut(module, data, Finetuned(base_state(module.base_model), finetuned)) is None) is (
        layers != ("middle",)
    )
    if layers != ("middle",):
        assert linear_tasks(module, ["task"], finetuned) == ()
        with pytest.raises(InputError, match=f"changes {layers[0]} only, whose weight other parts"):
            module.linear_outputs(finetuned)

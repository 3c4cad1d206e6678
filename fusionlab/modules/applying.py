"""How weights act on a backbone for a while: as adapters, in place of the base's, or to first order about the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fusionlab import adapters
from fusionlab.adapters import Adapter
from fusionlab.adapters.injection import adapter_name
from fusionlab.adapters.routed import FusedWeights, RoutedWeights, routed
from fusionlab.adapters.weights import Weights, state_of
from fusionlab.backbones import CausalBackbone, KnownBackbone, T5Backbone
from fusionlab.contracts import Application
from fusionlab.distributed.sharding import gathered
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.linearize import (
    LinearizedState,
    autocast_dtype,
    linearized_call,
    refuse_checkpointing,
    tangent_outputs,
    tensors_replaced,
    wide,
)
from fusionlab.modules.beside import BesideBase, beside_base
from fusionlab.tensors.state import State

PREFIX = "model."  # of the base model's parameters in their backbone


def plain(call: Callable[[], Tensor]) -> Tensor:
    """The output as the model gives it."""
    return call()


@dataclass(frozen=True)
class Replaced:
    """The output with other tensors in place of the base's, which train as ordinary weights do.

    Where nothing trains, autocast does not round their update off.

    Args:
        backbone: the backbone.
        tensors: by name in the backbone, in its dtypes.
    """

    backbone: nn.Module
    tensors: Mapping[str, Tensor]

    def __call__(self, call: Callable[[], Tensor]) -> Tensor:
        """Run ``call`` with the tensors."""
        own, tensors = tensors_of(self.backbone), gathered(self.tensors)
        if torch.is_grad_enabled():
            refuse_checkpointing(self.backbone)
            with tensors_replaced(self.backbone, tensors):
                return call()
        with tensors_replaced(self.backbone, tensors):
            return Unrounded(own, tensors)(call)


@dataclass(frozen=True)
class Unrounded:
    """The output of a backbone with other tensors in place of its own, whose update autocast does not round off.

    Args:
        own: the backbone's tensors by name.
        values: what is in their place.
    """

    own: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def __call__(self, call: Callable[[], Tensor]) -> Tensor:
        """Run ``call``."""
        if not self.values or autocast_dtype(self.values) is None:
            return call()
        with self._beside_base:
            return call()

    @cached_property
    def _beside_base(self) -> BesideBase:
        return beside_base(self.own, self.values)


@dataclass(frozen=True)
class Linearized:
    """The output to first order in some parameters; under autocast all of it in autocast's dtype.

    Args:
        backbone: the backbone.
        parameters: φ by name in the backbone.
        point: φ₀ by the same names.
        dropout_modules: ends of names of modules whose dropout stays on.
    """

    backbone: nn.Module
    parameters: Mapping[str, Tensor]
    point: Mapping[str, Tensor]
    dropout_modules: tuple[str, ...] = ()

    def __call__(self, call: Callable[[], Tensor]) -> Tensor:
        """Run ``call`` on dual numbers."""
        return linearized_call(
            call,
            self.backbone,
            self.parameters,
            self.point,
            dtype=autocast_dtype(self.parameters),
            dropout_modules=self.dropout_modules,
        )


def linearized_adapter(backbone: KnownBackbone, task: str) -> Linearized:
    """The adapter ``task``, which must be active, to first order about its start: A as it is and B₀ = 0."""
    name = adapter_name(task)
    own = backbone.named_parameters()
    parameters = {key: parameter for key, parameter in own if key.endswith(f".lora_B.{name}.weight")}
    point = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    return Linearized(backbone, parameters, point, (f"lora_dropout.{name}",))


def as_linearized(weights: Weights) -> Adapter | LinearizedState:
    """The same task vector, acting to first order about the base: post-hoc linearization of what was trained otherwise.

    Args:
        weights: an adapter, of whatever method, or a full model's state.
    """
    if isinstance(weights, LinearizedState):
        return weights
    return replace(weights, method="tangent_lora") if isinstance(weights, Adapter) else LinearizedState(weights)


class LinearOutputs:
    """What a backbone gives for any weighted sum of linearized task vectors, from one run of it: f + Σ λ_t J τ_t.

    The outputs that the module asks for while it scores one batch are computed once and kept, in the order of asking,
    until :meth:`forget`. No gradient.

    Args:
        backbone: with no adapter active while it runs.
        task_vectors: by task and by name in the backbone.
    """

    def __init__(self, backbone: nn.Module, task_vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
        own = dict(backbone.named_parameters())
        every = dict.fromkeys(name for task_vector in task_vectors.values() for name in task_vector)
        moved = [
            name for name in every if any(vector[name].any() for vector in task_vectors.values() if name in vector)
        ]
        if buffers := [name for name in moved if name not in own]:
            raise InputError(f"a linearized model moves parameters only, and the weights change {name_list(buffers)}")
        names = moved or [name for name in every if name in own]
        self.backbone, self.point = backbone, {name: own[name].detach() for name in names}
        self.task_vectors = {
            task: {name: task_vector.get(name, torch.zeros_like(self.point[name])) for name in names}
            for task, task_vector in task_vectors.items()
        }
        self.known: list[tuple[Tensor, dict[str, Tensor]]] = []

    def forget(self) -> None:
        """Another batch follows."""
        self.known = []

    def parts(self, call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """``(f, {task: J τ})`` of what ``call`` computes by the backbone."""
        dtype = autocast_dtype(self.point)
        return tangent_outputs(call, self.backbone, self.point, self.task_vectors, dtype=dtype)

    def at(self, coefficients: Mapping[str, float]) -> Application:
        """How the weights with these coefficients by task act while one batch is scored."""
        position = 0

        def application(call: Callable[[], Tensor]) -> Tensor:
            nonlocal position
            if position == len(self.known):
                self.known.append(self.parts(call))
            base, outputs = self.known[position]
            position += 1
            return base + sum(value * outputs[task] for task, value in coefficients.items() if value)

        return application


@contextmanager
def applied(backbone: KnownBackbone, weights: FusedWeights) -> Iterator[Application]:
    """How ``weights`` act on ``backbone`` within the block; afterwards everything is as before, bit for bit.

    Args:
        backbone: with ``model``, whose parameter names the weights have.
        weights: an adapter, values that replace the base's or act to first order about them, or such with routers.

    Raises:
        InputError: a name or shape that the base does not have.
    """
    if isinstance(weights, RoutedWeights):
        samples = backbone.sample_tokens if isinstance(backbone, T5Backbone | CausalBackbone) else None
        with applied(backbone, weights.rest) as application, routed(backbone.model, weights, samples):
            yield application
        return
    if isinstance(weights, Adapter):
        linearized = weights.method == "tangent_lora"
        with adapters.added(backbone.model, replace(as_linearized(weights), method="lora") if linearized else weights):
            yield linearized_adapter(backbone, "added") if linearized else plain
        return
    with adapters.activated(backbone.model, None):
        if isinstance(weights, LinearizedState):
            values = _by_backbone_name(backbone, weights.state)
            own = tensors_of(backbone)
            changed = {name: value for name, value in values.items() if not _equal(value, own[name])}
            point = {name: own[name].detach() for name in changed}
            yield Linearized(backbone, changed, point) if changed else plain
            return
        own, values = tensors_of(backbone), on_backbone(backbone, weights)
        if all(value.dtype == own[name].dtype for name, value in values.items()):
            with tensors_replaced(backbone, values):
                yield Unrounded(own, values)
        else:
            with tensors_replaced(backbone, values), beside_base(own, values):
                yield plain


def task_vector_on_backbone(backbone: KnownBackbone, weights: Weights) -> dict[str, Tensor]:
    """τ by name in ``backbone``, on its device, in float32 or wider; an adapter's is written out.

    Raises:
        InputError: a name or shape that the base does not have, or an adapter on one of the layers of a tied tensor.
    """
    if isinstance(weights, Adapter):
        if tied := adapters.modules_of_tied_tensors(backbone.model, weights.factors):
            raise InputError(
                f"the adapter changes {name_list(tied)} only, whose weight other parts of the model have too: it is no "
                f"change of that tensor"
            )
        return {name: wide(value) for name, value in _by_backbone_name(backbone, weights.task_vector()).items()}
    own = tensors_of(backbone)
    values = _by_backbone_name(backbone, state_of(weights))
    return {name: wide(value) - wide(own[name].detach()) for name, value in values.items()}


def on_backbone(backbone: KnownBackbone, state: State) -> dict[str, Tensor]:
    """Base values by their names in ``backbone``, on its device, in its dtype; in float32 where that would round them.

    Raises:
        InputError: a name or shape that the base does not have.
    """
    own = tensors_of(backbone)
    return {
        name: value.float() if _is_rounded(value, own[name].dtype) else value.to(own[name].dtype)
        for name, value in _by_backbone_name(backbone, state).items()
    }


def tensors_of(backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's parameters and buffers by name."""
    return {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}


def _is_rounded(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype of 16 bits does not hold the values as they are."""
    narrower = dtype.is_floating_point and dtype.itemsize < min(4, value.dtype.itemsize)
    return narrower and not torch.equal(value.to(dtype).float(), value.float())


def _equal(first: Tensor, second: Tensor) -> bool:  # not what a gradient is asked of
    dtype = torch.promote_types(first.dtype, second.dtype)
    return not first.requires_grad and torch.equal(first.to(dtype), second.to(dtype))


def _by_backbone_name(backbone: KnownBackbone, state: State) -> dict[str, Tensor]:
    """As :func:`on_backbone`, with the values as they are."""
    actual = names_in_backbone(backbone)
    own = tensors_of(backbone)
    values: dict[str, Tensor] = {}
    for name, value in adapters.under_first_names(backbone.model, state).items():
        if name not in actual:
            raise InputError(f"the weights have {name!r}, the base does not; {did_you_mean(name, actual)}")
        tensor = own[actual[name]]
        if tensor.shape != value.shape:
            raise InputError(f"{name}: the weights have shape {tuple(value.shape)}, the base has {tuple(tensor.shape)}")
        values[actual[name]] = value.to(tensor.device)
    return values


def names_in_backbone(backbone: KnownBackbone) -> dict[str, str]:
    """The name in ``backbone`` of each tensor of its base model, by the name it had before any adapter was put in."""
    tensors = (*backbone.model.named_parameters(), *backbone.model.named_buffers())
    return {name.replace(".base_layer.", "."): PREFIX + name for name, _ in tensors if ".lora_" not in name}

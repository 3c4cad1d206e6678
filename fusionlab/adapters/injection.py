"""Adapters inside a model: PEFT's LoRA layers, one adapter per task on one frozen base, switched in microseconds.

PEFT does the injection and the forward. Its own switch (``set_adapter``) turns ``requires_grad`` of the other adapters
off, so :func:`activate` sets the layers' active adapter alone, and every task stays trainable throughout.
"""

from __future__ import annotations

import re
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusionlab.adapters.factors import METHODS, Adapter, Factors, Layout, Method, hash_initial
from fusionlab.adapters.fused_attention import split_names
from fusionlab.adapters.grouped import Draws, Group, bind
from fusionlab.adapters.starts import initial_lora_a
from fusionlab.adapters.targets import base_layer, check_fits, layer_shape, match_targets
from fusionlab.errors import InputError, did_you_mean, name_list

_ATTRIBUTE = "_fusionlab_adapters"


@dataclass(frozen=True)
class InjectionReport:
    """What :func:`inject` did: the adapted layers by name, how many, the hash of A₀ and the trainable parameters."""

    module_names: tuple[str, ...]
    a0_hash: str
    num_trainable: int

    @property
    def num_adapted_layers(self) -> int:
        return len(self.module_names)


@dataclass
class _Injected:
    """What a model carries: PEFT's tuner, its layers by base module name, and what each adapter is."""

    tuner: LoraModel | None = None
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)  # as they were when they were put in
    trained: set[str] = field(default_factory=set)
    active: str | Group | None = None

    def of(self, task: str) -> dict[str, LoraLayer]:
        """The layers that have an adapter for ``task``."""
        if task not in self.adapters:
            raise InputError(f"the model has no adapter {task!r}; {did_you_mean(task, self.adapters)}")
        return {module: self.layers[module] for module in self.adapters[task].factors}


def inject(
    model: nn.Module,
    tasks: Sequence[str],
    *,
    method: Method = "lora",
    rank: int = 16,
    lora_alpha: float = 32,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    scope: str = "",
    seed: int = 0,
    base_model_name: str = "",
    task_type: str | None = None,
) -> InjectionReport:
    """Put one trainable adapter per task into ``model``, in place, all started from one A₀; freeze everything else.

    A₀ of a layer is Kaiming-uniform (a = √5, PEFT's default) from a generator seeded by (seed, layer name), and B₀ is
    zero. A is frozen where the method is linearized, as its gradient is exactly zero there. No adapter is active
    afterwards.

    Args:
        model: the whole base model; its parameter names become the adapter's.
        tasks: names of the adapters.
        method: ``lora``, ``l_lora`` or ``tangent_lora``.
        rank: r, at least 1.
        lora_alpha: the adapter is scaled by ``lora_alpha / rank``.
        dropout: dropout on the adapter's input in training, 0..1.
        target_modules: linear layers by full name or by the end of it; every one must match.
        scope: adapt below this submodule only, such as ``vision_model``.
        seed: seed of A₀.
        base_model_name: hub id or path of the base, written into exported adapters.
        task_type: what PEFT calls the model's kind, such as ``CAUSAL_LM``, written into them too.

    Raises:
        InputError: a target name or the scope matches nothing, a task is there already, or a value is out of range.
    """
    _check_values(tasks, method, rank, lora_alpha, dropout)
    modules = match_targets(model, target_modules, scope)
    injected = _injected(model, create=True)
    taken = [task for task in tasks if task in injected.adapters]
    if taken:
        raise InputError(f"the model already has adapters named {name_list(taken)}; give other names")
    factors = _start(model, modules, rank, lora_alpha, seed)
    a0_hash = hash_initial({name: (of_layer.lora_a, None) for name, of_layer in factors.items()})
    split = tuple(name for name in split_names(model) if any(module.startswith(f"{name}.") for module in modules))
    config = {"lora_dropout": dropout} | ({} if task_type is None else {"task_type": task_type})
    start = Adapter(factors, method, base_model_name, a0_hash, seed, fused_attention=split, config=config)
    trained = {id(parameter) for task in injected.trained for parameter in trainable_parameters(model, task)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for task in tasks:
        _put(model, injected, task, start, dropout)
        injected.trained.add(task)
        for layer in injected.of(task).values():
            layer.lora_A[adapter_name(task)].weight.requires_grad_(method == "lora")
            layer.lora_B[adapter_name(task)].weight.requires_grad_(True)
    activate(model, None)
    num_trainable = sum(parameter.numel() for task in tasks for parameter in trainable_parameters(model, task))
    return InjectionReport(tuple(modules), a0_hash, num_trainable)


def _start(model: nn.Module, modules: Sequence[str], rank: int, lora_alpha: float, seed: int) -> dict[str, Factors]:
    """A₀ and B₀ = 0 of each layer."""
    factors = {}
    for name in modules:
        linear = base_layer(model.get_submodule(name))
        rows, columns = layer_shape(linear)
        lora_a0 = initial_lora_a(name, rank, columns, seed)
        layout: Layout = "transposed" if isinstance(linear, Conv1D) else "linear"
        factors[name] = Factors(lora_a0, torch.zeros(rows, rank), lora_alpha, lora_a0=lora_a0, layout=layout)
    return factors


def add(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Put a finished adapter into ``model`` as ``name``, frozen and not active; gradients of others are untouched.

    Raises:
        InputError: ``name`` is taken, or the model lacks a module that the adapter adapts, or its shape differs.
    """
    if adapter.method == "tangent_lora":
        raise InputError("a tangent_lora adapter acts under the linearized forward only; it cannot be added to a model")
    check_fits(model, adapter)
    injected = _injected(model, create=True)
    if name in injected.adapters:
        raise InputError(f"the model already has an adapter {name!r}; remove it first or give another name")
    _put(model, injected, name, adapter, dropout=0.0)


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out of ``model``; where it was active, none is afterwards.

    Raises:
        InputError: the model has no adapter ``name``.
    """
    injected = _injected(model)
    layers = injected.of(name)
    before = injected.active
    activate(model, None)
    for layer in layers.values():
        layer.delete_adapter(adapter_name(name))
    assert injected.tuner is not None
    del injected.adapters[name], injected.tuner.peft_config[adapter_name(name)]
    injected.trained.discard(name)
    activate(model, None if before == name else before)


@contextmanager
def added(model: nn.Module, adapter: Adapter, name: str = "added") -> Iterator[None]:
    """Within the block ``adapter`` is in the model and active; afterwards it is gone and the one before is active."""
    before = active(model)
    add(model, name, adapter)
    try:
        activate(model, name)
        yield
    finally:
        remove(model, name)
        activate(model, before)


def activate(model: nn.Module, task: str | Group | None) -> None:
    """Make ``task``'s adapter the one that acts; None is the pretrained model. Changes no ``requires_grad``.

    Under a group each row of a batch meets its own task's adapter.

    Raises:
        InputError: the model has no adapter ``task``.
    """
    injected = getattr(model, _ATTRIBUTE, None)
    if injected is None and task is None:
        return
    injected = _injected(model)
    if isinstance(task, str) and task not in injected.adapters:
        injected.of(task)
    names = [adapter_name(task)] if isinstance(task, str) else []
    group = task if isinstance(task, Group) else None
    for layer in injected.layers.values():
        layer._active_adapter = names
        bind(layer, group)
    injected.active = task


def active(model: nn.Module) -> str | Group | None:
    """The task whose adapter acts, or a group of them; None for the pretrained model."""
    injected = getattr(model, _ATTRIBUTE, None)
    return None if injected is None else injected.active


def group_of(sizes: Mapping[str, int], seeds: Sequence[int], device: torch.device) -> Group:
    """Trained tasks as one batch.

    Args:
        sizes: samples of each task, before rows are filled in.
        seeds: each task draws as a generator on ``device`` does that is seeded so.
        device: where the model is.
    """
    names = tuple(map(adapter_name, sizes))
    return Group(tuple(sizes), names, Draws.seeded(seeds, tuple(sizes.values()), device))


@contextmanager
def activated(model: nn.Module, task: str | Group | None) -> Iterator[None]:
    """Within the block ``task``'s adapter acts; afterwards the one before does."""
    before = active(model)
    activate(model, task)
    try:
        yield
    finally:
        activate(model, before)


def trainable_parameters(model: nn.Module, task: str) -> list[nn.Parameter]:
    """The parameters that training ``task`` updates, in layer order: A and B, or B alone where A is frozen."""
    parameters = []
    for layer in _injected(model).of(task).values():
        pair = layer.lora_A[adapter_name(task)].weight, layer.lora_B[adapter_name(task)].weight
        parameters += [parameter for parameter in pair if parameter.requires_grad]
    return parameters


def extract(model: nn.Module, task: str) -> Adapter:
    """A copy on the CPU of the task's current adapter.

    Raises:
        InputError: the model has no adapter ``task``.
    """
    injected = _injected(model)
    layers, start = injected.of(task), injected.adapters[task]
    if task not in injected.trained:
        return start
    factors = {}
    for module, layer in layers.items():
        lora_a, lora_b = (
            part[adapter_name(task)].weight.detach().cpu().clone() for part in (layer.lora_A, layer.lora_B)
        )
        factors[module] = replace(start.factors[module], lora_a=lora_a, lora_b=lora_b)
    return replace(start, factors=factors)


def adapter_name(task: str) -> str:
    """The name PEFT sees: no dots (they part module names) and no name that a module already has, such as ``train``.

    Example:
        >>> adapter_name("sun397.v2")
        'task-sun397%2Ev2'
    """
    return "task-" + urllib.parse.quote(task, safe="").replace(".", "%2E")


def _put(model: nn.Module, injected: _Injected, task: str, adapter: Adapter, dropout: float) -> None:
    """Inject ``adapter`` as ``task`` through PEFT and fill in its values; every ``requires_grad`` stays as it was."""
    name = adapter_name(task)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    exact = {module: f"^{re.escape(module)}" for module in adapter.factors}
    config = LoraConfig(
        target_modules="|".join(re.escape(module) for module in adapter.factors),
        rank_pattern={exact[module]: factors.rank for module, factors in adapter.factors.items()},
        lora_dropout=dropout,
        init_lora_weights=False,
    )
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):  # the placeholders' random values must not move the caller's generator
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # a layer says itself how it stores W
        if injected.tuner is None:
            injected.tuner = LoraModel(model, config, name)
        else:
            injected.tuner.peft_config[name] = config
            injected.tuner.inject_adapter(model, name)
    for module, factors in adapter.factors.items():
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer), f"{module} was not adapted"
        injected.layers[module] = layer
        _fill(
            layer,
            name,
            *adapter.terms(module, torch.promote_types(factors.lora_a.dtype, torch.float32)),
            factors.scaling,
        )
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)
    injected.adapters[task] = adapter
    activate(model, injected.active)


def _fill(layer: LoraLayer, name: str, left: Tensor, right: Tensor, scaling: float) -> None:
    """Set one layer's factors and scaling, frozen, on the layer's device, in float32 or wider."""
    base = layer.get_base_layer()
    dtype = torch.promote_types(base.weight.dtype, torch.float32)
    for part, value in ((layer.lora_A, right), (layer.lora_B, left)):
        part[name].weight = nn.Parameter(value.to(base.weight.device, dtype, copy=True), requires_grad=False)
    layer.lora_dropout[name].train(base.training)
    rank = right.shape[0]
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = rank, scaling * rank, scaling


def _injected(model: nn.Module, create: bool = False) -> _Injected:
    injected = getattr(model, _ATTRIBUTE, None)
    if injected is None and create:
        if hasattr(model, "peft_config"):
            raise InputError("the model already carries PEFT adapters of its own; unload them, or load the base again")
        injected = _Injected()
        setattr(model, _ATTRIBUTE, injected)
    if injected is None:
        raise InputError("the model has no adapters; inject or add one first")
    return injected


def _check_values(tasks: Sequence[str], method: str, rank: int, lora_alpha: float, dropout: float) -> None:
    if not tasks or len(set(tasks)) != len(tasks):
        raise InputError(f"tasks must be at least one name, each once, got {name_list(tasks) or 'none'}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; {did_you_mean(method, METHODS)}")
    if rank < 1 or lora_alpha <= 0:
        raise InputError(f"rank must be at least 1 and lora_alpha positive, got rank {rank}, lora_alpha {lora_alpha}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must lie in 0..1, got {dropout}")

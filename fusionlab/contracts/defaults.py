"""What modules and data of any package need not say themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from fusionlab.adapters import Adapter, InjectionReport, base_tensors
from fusionlab.adapters.routed import FusedWeights, RoutedWeights
from fusionlab.adapters.weights import Weights
from fusionlab.contracts.protocols import Application, Batch, Data, LinearOutputs, Module, Row
from fusionlab.errors import InputError
from fusionlab.linearize import LinearizedState, tensors_replaced
from fusionlab.samplers import exact_batches

Value = TypeVar("Value")


@dataclass(frozen=True)
class Network:
    """The backbone that a plain network is.

    Args:
        name: what tables call it.
        model: the network.
        settings: what decides its outputs beside weights and samples.
    """

    name: str
    model: nn.Module
    settings: Mapping[str, Any] = field(default_factory=dict)

    def save_files(self, folder: Path) -> None:
        """Nothing: the weights are all there is."""


class _Unsaid(Generic[Value]):
    """What is read from elsewhere until a module says otherwise by an attribute of its own.

    Args:
        read: of the module.
    """

    def __init__(self, read: Callable[[object], Value]) -> None:
        self._read = read

    def __get__(self, given: object, owner: type | None = None) -> Value:
        return self._read(given)


class _Plugin(Protocol):
    """What a trainer of Lightning computes in."""

    @property
    def precision(self) -> str: ...

    def val_step_context(self) -> AbstractContextManager[Any]: ...


class _Trainer(Protocol):
    @property
    def precision_plugin(self) -> _Plugin: ...


@runtime_checkable
class _Attached(Protocol):
    """What Lightning attaches a trainer to."""

    _trainer: _Trainer | None


def _plugin(given: object) -> _Plugin | None:
    trainer = given._trainer if isinstance(given, _Attached) else None
    return None if trainer is None else trainer.precision_plugin


def _seed(given: object) -> int:
    """The last one that Lightning seeded everything by; the commands' default where nothing was."""
    return int(os.environ.get("PL_GLOBAL_SEED", 42))


def _precision(given: object) -> str:
    plugin = _plugin(given)
    return "32-true" if plugin is None else str(plugin.precision)


class ModuleDefaults:
    """What a module need not say: one that is trained as it is, has nothing beside its weights, and no classes."""

    method: str = "full"
    seed = _Unsaid(_seed)
    """That of everything, ``seed_everything``."""
    precision = _Unsaid(_precision)
    """What the attached trainer computes in; float32 without one."""
    adapted_base_hash: str | None = None
    rows: Sequence[Row] = ()
    pads: bool = True
    active: str | None = None
    """The task whose weights act; :meth:`Module.activate` sets it."""

    @property
    def injection(self) -> InjectionReport | None:
        """No adapters."""
        return None

    @property
    def resolved(self) -> Mapping[str, Any]:
        """Nothing depends on others."""
        return {}

    def check_trained_on(self, checkpoint: Mapping[str, Any], tasks: Sequence[str], where: str) -> None:
        """Nothing is known of it."""

    def export(self, root: Path, tasks: list[str]) -> None:
        """Nothing lies beside."""

    @property
    def base_model(self: Module) -> nn.Module:
        """The backbone's network."""
        return self.backbone.model

    def prepare_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Nothing to prepare."""

    def read_run(self, folders: Sequence[Path], tasks: Mapping[str, Any]) -> str:
        """Nothing to read."""
        return ""

    @contextmanager
    def use(self: _Module, weights: str | FusedWeights | Application | None) -> Iterator[None]:
        """A task's, the base's, or weights by name in the base's place.

        Raises:
            InputError: an adapter, weights that act to first order, or such of which every sample has its own.
        """
        before, task, state = self.active, None, {}
        if weights is None or isinstance(weights, str):
            task = weights
        elif isinstance(weights, Adapter | LinearizedState | RoutedWeights) or callable(weights):
            raise InputError(f"{type(self).__name__} is scored under whole weights, got a {type(weights).__name__}")
        else:
            own = base_tensors(self.base_model)
            dtypes = {name: own[name].dtype for name in weights if name in own}
            state = {name: value.to(self.device, dtypes.get(name)) for name, value in weights.items()}
        self.activate(task)
        try:
            with tensors_replaced(self.base_model, state):
                yield
        finally:
            self.activate(before)

    def scored_classes(self, task: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """None.

        Raises:
            InputError: always.
        """
        raise InputError(f"{type(self).__name__} scores no classes for task {task!r}")

    def run_inputs(self: Module, task: str, batch: Batch) -> None:
        """Predict, as for a score that nobody reads."""
        mask = torch.ones(len(batch["index"]), dtype=torch.bool, device=self.device)
        self.score(task, {**batch, "mask": mask}, self.metrics(task))

    def primary_metric(self, task: str) -> str | None:
        """The first of the task's metrics."""
        return None

    def scoring_settings(self: Module, task: str) -> Mapping[str, Any]:
        """The precision, the network's settings and the names of the metrics."""
        return {
            "precision": self.precision,
            "backbone": self.backbone.settings,
            "metrics": list(self.metrics(task)),
        }

    def ranking_settings(self, task: str) -> Mapping[str, Any]:
        """Nothing more."""
        return {}

    def evaluation_context(self) -> AbstractContextManager[Any]:
        """The precision of the attached trainer, if there is one."""
        plugin = _plugin(self)
        return nullcontext() if plugin is None else plugin.val_step_context()

    def acts_linearly(self, finetuned: Mapping[str, Weights]) -> bool:
        """No."""
        return False

    def linear_outputs(self, finetuned: Mapping[str, Weights]) -> LinearOutputs:
        """None.

        Raises:
            InputError: always.
        """
        raise InputError(f"{type(self).__name__} does not run networks to first order")


class _Module(Module, Protocol):
    active: str | None


class DataDefaults:
    """What a data module need not say: all its tasks are trained, and evaluated in batches of constant shape."""

    training_tasks: list[str] | None = None

    @property
    def task_names(self: Data) -> Sequence[str]:
        """The tasks, which are known from the beginning.

        Raises:
            InputError: they are made in ``setup``, which has not run.
        """
        if "tasks" not in dir(self):
            name = type(self).__name__
            raise InputError(f"{name} makes its tasks in setup, and their names are needed before: give it task_names")
        return list(self.tasks)

    def eval_batches(self: Data, task: str, split: str, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """This rank's evaluation batches of a task, each with a bool ``"mask"`` that is False on padding."""
        return exact_batches(self.splits[task][split], self.eval_batch_size, rank=rank, world_size=world_size)

    def num_eval_batches(self: Data, task: str, split: str) -> int:
        """Number of evaluation batches of a task, over all ranks."""
        return -(-len(self.splits[task][split]) // self.eval_batch_size)

    def shown_samples(self, task: str) -> list[str]:
        """None."""
        return []

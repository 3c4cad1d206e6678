"""What modules and data of any package need not say themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusionlab.adapters import Adapter, InjectionReport
from fusionlab.adapters.routed import FusedWeights, RoutedWeights
from fusionlab.adapters.weights import Weights
from fusionlab.contracts.protocols import Application, Batch, Data, LinearOutputs, Module, Row
from fusionlab.errors import InputError
from fusionlab.linearize import LinearizedState, tensors_replaced
from fusionlab.samplers import exact_batches


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


class ModuleDefaults:
    """What a module need not say: one that is trained as it is, has nothing beside its weights, and no classes."""

    method: str = "full"
    seed: int = 42
    precision: str = "32-true"
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
            state = {name: value.to(self.device) for name, value in weights.items()}
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

    def scoring_settings(self: Module, task: str) -> Mapping[str, Any]:
        """The network's settings and the names of the metrics."""
        return {"backbone": self.backbone.settings, "metrics": list(self.metrics(task))}

    def ranking_settings(self, task: str) -> Mapping[str, Any]:
        """Nothing more."""
        return {}

    def evaluation_context(self) -> AbstractContextManager[Any]:
        """As the network computes."""
        return nullcontext()

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
        """The tasks, which are known from the beginning."""
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

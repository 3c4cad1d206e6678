"""What a search is, what it may look at, and what it tells of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fusionlab.errors import InputError, did_you_mean
from fusionlab.rules import AnyRule, Rule, from_config
from fusionlab.rules import to_config as rule_config
from fusionlab.rules.config import _arguments as checked_arguments
from fusionlab.rules.routed import RoutedMlps
from fusionlab.search.layers import Block, Grams
from fusionlab.search.mlps import Mlp
from fusionlab.tensors.state import State

Batch = dict[str, Any]


class Training(Protocol):
    """What the fine-tuned models, and others by their task vectors, do on unlabelled training inputs."""

    def units(self, tasks: Sequence[str] | None = None) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the tensors that the models of some tasks, by default of all, have changed, by name on disk."""

    def task_vector(self, task: str) -> dict[str, Tensor]:
        """τ by unit, on the CPU."""

    def linear_units(self, tasks: Sequence[str]) -> list[str]:
        """Those of the units that linear layers multiply, and nothing else."""

    def is_transposed(self, unit: str) -> bool:
        """Whether the weight of a linear layer is stored ``(in, out)``."""

    def blocks(self, tasks: Sequence[str]) -> list[Block]:
        """The parts of the network with linear layers, in the order in which an input meets them."""

    def expert_grams(self, task: str, limit: int) -> Grams:
        """Σ x xᵀ / number of x of what linear layers read in the task's own model, by unit."""

    def grams(self, task: str, task_vector: State, limit: int, units: Collection[str]) -> Grams:
        """The same of some units, in a model on the task's inputs."""

    def expert_squared_gradients(self, task: str, limit: int, seed: int) -> dict[str, Tensor]:
        """The mean of (∂ log p(y|x)/∂θ)², y drawn from p(y|x), in the task's own model, by unit."""

    def mlps(self, tasks: Sequence[str] | None = None) -> Mapping[str, Mlp]:
        """The MLPs that the models of some tasks, by default of all, have changed, by name in memory."""

    def routed(self, rule: RoutedMlps, split: str) -> AbstractContextManager[Callable[[str, int, int], Tensor]]:
        """Within the block the rule's model acts; gives the classes' scores for a task's inputs, by step and number."""

    def num_samples(self, tasks: Sequence[str], limit: int, split: str = "train") -> int:
        """Inputs of the tasks, of each one ``limit`` at most."""

    @property
    def device(self) -> torch.device:
        """Where models run."""

    @property
    def num_tasks(self) -> int:
        """Of all models."""

    @property
    def num_elements(self) -> int:
        """Of all units."""

    @property
    def gram_bytes(self) -> int:
        """Of the Gram matrices of all layers and tasks."""


class Problem(Protocol):
    """The fine-tuned models to fuse, and the data a search may look at: validation splits, and training inputs."""

    tasks: tuple[str, ...]

    @property
    def training(self) -> Training:
        """The models on unlabelled training inputs."""

    @property
    def at_once(self) -> bool:
        """Whether many models are scored at about the cost of one: they act linearly, on all of the tasks."""

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        """Mean validation score over the tasks of the model that each rule fuses; higher is better."""

    def scores_by_task(self, rules: Sequence[AnyRule]) -> list[dict[str, float]]:
        """Validation scores by task of the weights that each rule gives; higher is better."""

    def losses(self, rules: Sequence[Rule], num_samples: int) -> list[float]:
        """Mean over the tasks of the loss on each one's first ``num_samples`` labelled validation samples."""

    def inputs(self, task: str, step: int, batch_size: int, split_name: str = "validation") -> Batch:
        """A batch of a task's samples; only its inputs may be used."""

    def task_vectors(self) -> dict[str, State]:
        """τ by task and base name."""

    def logits(self, task: str, batch: Batch, task_vector: State) -> Tensor:
        """Scores of the classes, ``(batch, classes)``, by the base moved by ``task_vector``; differentiable."""

    def num_samples(self, limit: int | None = None, split: str = "validation") -> int:
        """Samples of all tasks, of each one ``limit`` at most."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        rule: with all its coefficients.
        scores: what was tried and what it scored, by coefficient or step.
        num_samples: samples that it looked at, each counted once.
        num_labels: labels that it looked at.
        passes: how often a fused model was run over those samples, in all.
        split: ``test`` where it looked at inputs of the test splits, as published results do; else None.
    """

    rule: AnyRule
    scores: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_labels: int = 0
    passes: float = 0.0
    split: str | None = None

    @property
    def looked_at(self) -> dict[str, Any]:
        """What it looked at and what that scored, as ``fusion.json`` tells it."""
        return {**self.figures, "scores": self.scores}

    @property
    def figures(self) -> dict[str, Any]:
        """What it looked at, as rows tell it."""
        told = {"num_samples": self.num_samples, "num_labels": self.num_labels, "passes": self.passes}
        return told if self.split is None else {**told, "split": self.split}


@runtime_checkable
class Search(Protocol):
    """A frozen dataclass of settings."""

    looks_at: ClassVar[str]
    """What of the split it looks at."""

    @property
    def split(self) -> str:
        """``validation`` or ``train``; ``test`` where published results are followed that look there."""

    needs_classes: ClassVar[bool]
    """Whether it looks at probabilities of classes, or of label words."""
    gives: ClassVar[type | None]
    """The class of the rule that it gives; None where that is an argument."""

    def search(self, problem: Problem) -> Found:
        """Look at the problem's data and choose."""

    def expected_rows(self, num_samples: int) -> float:
        """About how many of a task's samples it runs through models, of ``num_samples``; a gradient counts as two."""

    def expected_points(self, at_once: bool) -> float:
        """About how many models it looks at, or compares, that a sweep keeps the scores of.

        Args:
            at_once: whether many models cost as one.
        """


@runtime_checkable
class Running(Search, Protocol):
    """A search that runs models over inputs of its split, and holds what it finds of them."""

    def bytes_needed(self, training: Training) -> int:
        """Bytes that it takes beside the models."""


def is_search(config: Any) -> bool:
    """Whether ``config``, a name or a mapping with ``class_path``, names a search rather than a rule."""
    name = config.get("class_path") if isinstance(config, Mapping) else config
    return isinstance(name, str) and _name(name) in known_searches()


def known_searches() -> dict[str, type[Search]]:
    """Every search by its name in a config."""
    from fusionlab import search

    exported: tuple[type[Search], ...] = (
        search.Adamerging,
        search.Fisher,
        search.Lorahub,
        search.MetagptMultiplier,
        search.Regmean,
        search.RegmeanPlusPlus,
        search.Validated,
        search.ValidatedMasks,
        search.Wemoe,
    )
    return {_name(item.__name__): item for item in exported}


def rule_or_search(config: str | Mapping[str, Any]) -> AnyRule | Search:
    """What a rule's name or mapping in a configuration gives: a rule, or a search; one for TALL without thresholds.

    Raises:
        InputError: no such rule, or an argument that it does not have or refuses.
    """
    from fusionlab import search

    return search_from_config(config) if is_search(config) else search.completing(from_config(config))


def search_from_config(config: str | Mapping[str, Any]) -> Search:
    """The search that ``config`` names, as rules are named.

    Raises:
        InputError: no such search, or an argument that it does not have or refuses.
    """
    content = {"class_path": config} if isinstance(config, str) else dict(config)
    known, name = known_searches(), _name(str(content.get("class_path")))
    if name not in known:
        raise InputError(f"search {content.get('class_path')!r}: no such search; {did_you_mean(name, known)}")
    return known[name](**checked_arguments(known[name], content.get("init_args") or {}))


def to_config(search: Search) -> dict[str, Any]:
    """The configuration that gives ``search`` again."""
    values = {item.name: getattr(search, item.name) for item in fields(search)}  # type: ignore[arg-type]
    init_args = {name: rule_config(value) if isinstance(value, Rule) else value for name, value in values.items()}
    return {"class_path": _name(type(search).__name__), "init_args": init_args}


def _name(class_path: str) -> str:
    name = class_path.rpartition(".")[2]
    return (
        name if name.islower() else re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower().replace("ada_merging", "adamerging")
    )

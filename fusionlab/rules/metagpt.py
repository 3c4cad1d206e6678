"""MetaGPT: coefficients from the norms of the task vectors, without data or search."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fusionlab.blocks.sums import squared_norms
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled

_BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.)")


@dataclass(frozen=True)
class Metagpt:
    """θ₀ + Σ λ_t τ_t with λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖², over the model, a layer or a tensor.

    Squared norms are float64. A layer is all parameters with the same name up to the first number
    (``model.layers.3``); the parameters outside any are one more layer.

    Args:
        scope: what one set of norms is taken over.
        multiplier: a factor on every λ_t; without it they sum to 1.

    Raises:
        InputError: an unknown scope, or (when fusing, scope model) all task vectors are zero. In the other scopes a
            layer or tensor whose task vectors are all zero keeps the base.

    Example:
        >>> norms = {"squared_norm/a": {"w": (9.0,)}, "squared_norm/b": {"w": (1.0,)}}
        >>> Metagpt().coefficients("w", ("a", "b"), Statistics(names=("w",), sums=norms))
        {'a': 0.9, 'b': 0.1}

    Source: MetaGPT: merging large language models using model exclusive task arithmetic, arXiv 2406.11385, eq. 16.
    """

    scope: Literal["model", "layer", "tensor"] = "model"
    multiplier: float = 1.0

    granularity: ClassVar[Granularity] = "elementwise"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = (("squared_norm",),)
    measures_untransformed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scope not in ("model", "layer", "tensor"):
            raise InputError(f"metagpt.scope: expected model, layer or tensor, got {self.scope!r}.")

    @property
    def statistics_scope(self) -> StatisticsScope:
        """A tensor's norms are enough only for scope ``tensor``."""
        return "tensor" if self.scope == "tensor" else "model"

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """The partial sums of every τ_t²."""
        return squared_norms(task_vectors)

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """λ_t over the scope that ``name`` belongs to."""
        scope = {"model": None, "layer": layer_of(name), "tensor": name}[self.scope]
        return statistics.once(("metagpt", scope), lambda: self._coefficients(scope, tasks, statistics))

    def _coefficients(self, scope: str | None, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        names = None if scope is None else [scope]
        if self.scope == "layer":
            names = [name for name in statistics.names if layer_of(name) == scope]
        norms = {task: statistics.sum(f"squared_norm/{task}", names) for task in tasks}
        total = sum(norms.values())
        if total == 0 and self.scope == "model":
            raise InputError(
                f"metagpt: the task vectors of {name_list(tasks)} are all zero: the inputs equal the base; "
                "check the paths of the base and of the fine-tuned models."
            )
        return {task: self.multiplier * norm / total if total else 0.0 for task, norm in norms.items()}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + Σ λ_t τ_t."""
        return add_scaled(base, task_vectors, self.coefficients(name, task_vectors.tasks, statistics))


def layer_of(name: str) -> str:
    """The name up to its first number, ``""`` outside any numbered layer.

    Example:
        >>> layer_of("encoder.layers.3.mlp.fc1.weight"), layer_of("lm_head.weight")
        ('encoder.layers.3', '')
    """
    match = _BLOCK.match(name)
    return match.group(0) if match else ""

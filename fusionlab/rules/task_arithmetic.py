"""Task arithmetic: one coefficient for all, one per task, or one per parameter by name pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled
from fusionlab.rules.checks import by_task


@dataclass(frozen=True)
class TaskArithmetic:
    """θ₀ + Σ λ_t τ_t.

    Args:
        scaling_coefficient: λ, one number for all tasks or one per task; ``None`` leaves it to a search.
        by_name: λ of the parameters whose name matches a shell-style pattern, e.g. ``{"*.layers.0.*": 0.1}``; the first
            match wins, parameters without one take ``scaling_coefficient``.

    Raises:
        InputError: when fusing: no coefficient was chosen, a task has none, or a pattern matches no parameter.

    Example:
        >>> TaskArithmetic(scaling_coefficient=0.3).coefficients("w", ("a", "b"), Statistics())
        {'a': 0.3, 'b': 0.3}

    Source: Editing models with task arithmetic, arXiv 2212.04089.
    """

    scaling_coefficient: float | Mapping[str, float] | None = None
    by_name: Mapping[str, float | Mapping[str, float]] | None = None

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """λ_t of the first pattern that matches ``name``, else ``scaling_coefficient``."""
        statistics.once("task_arithmetic", lambda: self._check_patterns(statistics.names))
        return statistics.once(("task_arithmetic", name), lambda: self._coefficients(name, tasks))

    def _check_patterns(self, names: tuple[str, ...]) -> None:
        idle = [pattern for pattern in self.by_name or () if not any(fnmatchcase(name, pattern) for name in names)]
        if names and idle:
            raise InputError(
                f"task_arithmetic.by_name: no parameter matches {name_list(idle)}; names look like {names[0]}."
            )

    def _coefficients(self, name: str, tasks: tuple[str, ...]) -> dict[str, float]:
        for pattern, value in (self.by_name or {}).items():
            if fnmatchcase(name, pattern):
                return by_task(value, tasks, f"task_arithmetic.by_name[{pattern!r}]")
        if self.scaling_coefficient is None:
            raise InputError(
                f"task_arithmetic has no scaling_coefficient for {name}; give one (0.3 is usual without tuning), "
                "or let a fit choose it on validation data."
            )
        return by_task(self.scaling_coefficient, tasks, "task_arithmetic.scaling_coefficient")

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + Σ λ_t τ_t."""
        return add_scaled(base, task_vectors, self.coefficients(name, task_vectors.tasks, statistics))

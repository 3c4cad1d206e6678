"""What a rule is that knows the task of an input: one vector for all tasks, and for each a mask and a number."""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Measuring, Rule
from fusionlab.rules.routed import RoutedMlps


@runtime_checkable
class TaskKnownRule(Measuring, Protocol):
    """Weights of its own for each task, θ_t = θ₀ + s_t M_t ⊙ u, kept as one unified vector u, bits M_t and numbers s_t.

    It has measuring passes as a :class:`~fusionlab.rules.base.Rule` has, and no ``fuse``: there is no one model. Its
    scores are no model's that must find the task out by itself, and stand apart from those (``task_known`` in rows).
    """

    def unify(self, task_vectors: TaskVectors) -> Tensor:
        """u of a block, ``(elements,)`` in the dtype of the task vectors."""
        ...

    def masks(self, unified: Tensor, task_vectors: TaskVectors) -> Tensor:
        """M_t of a block by task, bool ``(num_tasks, elements)``."""
        ...

    def scales(self, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """s_t by task, one for the whole model."""
        ...


StreamedRule: TypeAlias = Rule | TaskKnownRule
"""What the engine runs: one model of all tasks, or one for each."""
AnyRule: TypeAlias = StreamedRule | RoutedMlps
"""And what makes one whose MLPs are weighed anew for every sample."""

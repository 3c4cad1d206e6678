"""Which of a task's metrics means and choices are made by."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fusionlab.contracts.protocols import Module


@runtime_checkable
class Choosing(Protocol):
    """A module that says by which metric of a task means and choices are made, where it is not the first."""

    def primary_metric(self, task: str) -> str | None:
        """The name of a value of :meth:`Module.metrics`, as rows have it; None for the first of them."""


def primary_metric(module: Module, task: str) -> str | None:
    """What a module says that means and choices are made by; None for a task's first metric."""
    return module.primary_metric(task) if isinstance(module, Choosing) else None

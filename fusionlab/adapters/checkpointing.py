"""Gradient checkpointing with several adapters on one base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from fusionlab.adapters.grouped import Draws, Group
from fusionlab.adapters.injection import activated, active
from fusionlab.errors import InputError


class _AdapterContexts:
    """``context_fn`` of torch's checkpoint: the function recomputed in backward uses the adapter of its forward.

    That of a group draws again what it drew for each task.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        before = active(self.model)
        return nullcontext(), _again(self.model, before, before.draws.copied() if isinstance(before, Group) else None)


@contextmanager
def _again(model: nn.Module, task: str | Group | None, draws: Draws | None) -> Iterator[None]:
    with activated(model, task), nullcontext() if draws is None else draws:
        yield


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Turn on a transformers model's gradient checkpointing such that recomputation fixes its adapter.

    Without it the adapter that is active at backward is used for all, silently.

    Raises:
        InputError: the model has no gradient checkpointing that can be told so.
    """
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise InputError(f"{type(model).__name__} has no gradient checkpointing that keeps adapters apart; turn it off")
    arguments = {"use_reentrant": False, "context_fn": _AdapterContexts(model)}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)

"""Gradient checkpointing with several adapters on one base."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from fusionlab.adapters.injection import activated, active
from fusionlab.errors import InputError


class _AdapterContexts:
    """``context_fn`` of torch's checkpoint: the function recomputed in backward uses the adapter of its forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), activated(self.model, active(self.model))


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

"""The weights that act on each task: one model on all, or of masks each task's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fusionlab.adapters.routed import FusedWeights
from fusionlab.adapters.weights import Weights
from fusionlab.backbones.layout import first_names
from fusionlab.errors import InputError, name_list
from fusionlab.fusion.base import AnyBase, Base
from fusionlab.linearize import LinearizedState
from fusionlab.tensors.masked import MaskedVectors


def acting(
    weights: FusedWeights | MaskedVectors | None, tasks: Sequence[str], base: AnyBase
) -> Iterator[tuple[FusedWeights | None, list[str]]]:
    """What is to act, with the tasks that are scored under it: the one maker for whoever scores.

    Args:
        weights: of a fused model, of a task, or None for the base's own.
        tasks: to score.
        base: that the weights are for.

    Yields:
        the weights themselves with all tasks; of masks, task by task, that task's.

    Raises:
        InputError: a task has no mask.
    """
    if not isinstance(weights, MaskedVectors):
        yield weights, list(tasks)
        return
    for task in tasks:
        weights.of(task)
    own = Base.of(base)
    for task in tasks:
        yield weights_of(weights, task, own), [task]


def weights_of(vectors: MaskedVectors, task: str, base: AnyBase) -> Weights:
    """θ_t = θ₀ + s_t M_t ⊙ u: a task's weights by name in memory, float32 or wider, rounded once.

    Args:
        vectors: of all tasks.
        task: which.
        base: a backbone, a module or a model; or a state, whose names are taken for those on disk.

    Raises:
        InputError: there is no mask for the task, or the base has no such tensors.
    """
    own, masked = Base.of(base), vectors.of(task)
    names = {name: name for name in masked.tensors} if own.model is None else first_names(own.model, masked.tensors)
    missing = [
        name
        for name, there in names.items()
        if there not in own.stored or own.stored[there].shape != masked.tensors[name].shape
    ]
    if missing:
        raise InputError(
            f"the unified vector has {name_list(missing)}, the base not, or in another shape; give the base that it "
            f"was made for"
        )
    state: dict[str, Tensor] = {}
    for name, there in names.items():
        value = masked.read(name)
        state[there] = value.add_(own.stored[there])
    found = own.layout.from_disk(state)
    return LinearizedState(found) if vectors.is_linearized else found

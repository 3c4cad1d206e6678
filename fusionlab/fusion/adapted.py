"""The units of adapters: the matrices that they change.

Adapters of fused attention change q and v, which the base's files hold as rows of one matrix. Where only adapters are
fused, q, k and v are units of their own, under the names that adapters give them; beside full weights, the unit is what
the files hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusionlab.adapters import Adapter, stored_task_vector
from fusionlab.adapters.fused_attention import PARTS
from fusionlab.tensors.lazy import Weights
from fusionlab.tensors.state import Computed, State


def parts_of(inputs: Iterable[Any], base: Weights) -> dict[str, tuple[str, ...]]:
    """The stored matrices of ``base`` that are fused as q, k and v; none where ``inputs`` are not all adapters."""
    inputs = list(inputs)
    if not all(isinstance(each, Adapter) for each in inputs):
        return {}
    attentions = dict.fromkeys(name for adapter in inputs for name in adapter.fused_attention)
    found = {f"{name}.in_proj_weight": tuple(f"{name}.{part}.weight" for part in PARTS) for name in attentions}
    return {stored: units for stored, units in found.items() if stored in base.tensors}


def task_vector(adapter: Adapter, names: Mapping[str, str], *, apart: bool) -> State:
    """τ by unit, each tensor computed when it is asked for.

    Args:
        adapter: whose.
        names: name in memory -> name on disk, where it is another one.
        apart: whether q, k and v of fused attention are units of their own.
    """
    return renamed(adapter.task_vector() if apart else stored_task_vector(adapter), names)


def shapes(adapter: Adapter, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shape of each unit that ``adapter`` changes, q, k and v apart, without computing it; ``names`` as above."""
    own = {f"{module}.weight": factors.stored_shape for module, factors in adapter.factors.items()}
    return {names.get(name, name): shape for name, shape in own.items()}


def renamed(task_vector: State, names: Mapping[str, str]) -> State:
    """A task vector under the names of the base's files; ``names`` as above."""
    return Computed({names.get(name, name): name for name in task_vector}, task_vector.__getitem__)

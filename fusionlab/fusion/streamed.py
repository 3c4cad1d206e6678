"""A fused model from files to files: the engine over what is read piece by piece, into a folder.

It starts without the libraries that only adapters and models in memory need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionlab.engine import Job, Outcome, Resources, StateWeights, TaskInput, TensorInfo, Weights, run
from fusionlab.fusion.units import UnitWeights
from fusionlab.tensors import WeightsWriter


def adapted_units(
    base: Weights, adapters: Mapping[str, tuple[Any, Mapping[str, str]]], cache_bytes: int
) -> tuple[UnitWeights, dict[str, TaskInput]]:
    """The base and adapters by the matrices that adapters change.

    Args:
        base: as it is stored.
        adapters: by task: the adapter, and name in memory -> name on disk where it is another one.
        cache_bytes: what may be kept of one task vector.
    """
    from fusionlab.fusion.adapted import parts_of, shapes, task_vector  # imports peft, which takes seconds

    units = UnitWeights(base, parts_of((adapter for adapter, _ in adapters.values()), base))
    inputs = {}
    for task, (adapter, names) in adapters.items():
        own = {name: TensorInfo(shape, torch.float32) for name, shape in shapes(adapter, names).items()}
        vector = StateWeights(task_vector(adapter, names, apart=True), own, cache_bytes)
        inputs[task] = TaskInput(vector, is_task_vector=True)
    return units, inputs


def output_dtype(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor of the base is stored in: ``dtype``, or its own; what is no float stays as it is."""
    return dtype if dtype is not None and info.dtype.is_floating_point else info.dtype


def write_weights(
    job: Job, tensors: Mapping[str, TensorInfo], folder: Path, max_shard_size: int, resources: Resources
) -> Outcome:
    """Fuse, and write the model into an existing folder.

    Args:
        job: over :class:`~fusionlab.fusion.units.UnitWeights`.
        tensors: what the output holds.
        folder: where to.
        max_shard_size: bytes in one weight file.
        resources: what the engine may use.

    Raises:
        InputError: NaN or Inf in an input, or what the rule refuses.
    """
    with WeightsWriter(folder, tensors, max_shard_size=max_shard_size) as writer:
        return run(job, _FolderSink(writer, job, tensors), resources)


class _FolderSink:
    """Writes a fused tensor under every name that it has in the output."""

    def __init__(self, writer: WeightsWriter, job: Job, tensors: Mapping[str, TensorInfo]) -> None:
        assert isinstance(job.base, UnitWeights)
        self._writer, self._units = writer, job.base
        self._names: dict[str, list[str]] = {}
        for name in tensors:
            self._names.setdefault(job.plan.aliases.get(name, name), []).append(name)

    def write(self, name: str, start: int, values: Tensor) -> None:
        stored, offset = self._units.place(name)
        for each in self._names[stored]:
            self._writer.write(each, offset + start, values)

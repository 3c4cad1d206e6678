"""Weights split over the processes while they train.

Beside adapters the frozen weights are split, and a device holds one layer whole at a time. In full fine-tuning the
base is whole, and what is trained is split: each task's copy, its gradient after its turn, and the optimizer's state.
While a task has its turn, a device holds that task's copy and gradient whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only


def shard_frozen(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Give every process its share of the frozen weights of each repeated layer; adapters stay whole.

    A layer's weights are gathered before its forward and before its backward, and dropped after each, so that all
    processes must run the layers equally often. What is not in a repeated layer, such as embeddings, stays whole.

    Args:
        model: with its adapters, on its device.
        mesh: one dimension, over all processes.

    Returns:
        the names of the layers.
    """
    found = dict(repeated_layers(model))
    for layer in found.values():
        whole = {value for name, value in layer.named_parameters() if value.requires_grad or "lora_" in name}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return list(found)


def repeated_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that stand in a list or a sequence of their like, by name: the layers of a transformer.

    Example:
        >>> blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
        >>> [name for name, _ in repeated_layers(nn.ModuleDict({"encoder": blocks, "head": nn.Linear(8, 2)}))]
        ['encoder.0', 'encoder.1']
    """
    chosen: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{layer}.") for layer in chosen)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        layers = dict(module.named_children())
        if len({type(layer) for layer in layers.values()}) == 1 and any(True for _ in module.parameters()):
            chosen += [f"{name}.{key}" for key in layers]
            yield from ((f"{name}.{key}", layer) for key, layer in layers.items())


def split(value: Tensor, mesh: DeviceMesh) -> DTensor:
    """This process's share of a tensor that every process has: a copy of some of its rows. A scalar stays whole."""
    placement: Placement = Shard(0) if value.ndim else Replicate()
    return distribute_tensor(value if value.ndim else value.clone(), mesh, [placement], src_data_rank=None)


def gathered(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those whole that are split. All processes must ask, and walk back, in one order.

    The gradient that a share gets is the mean over the processes, as a distributed wrapper gives it.
    """
    return {name: _gathered(value) if isinstance(value, DTensor) else value for name, value in values.items()}


def _gathered(value: DTensor) -> Tensor:
    whole = value.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if whole.requires_grad:
        size = value.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / size)
    return whole


def whole_on_cpu(tree: Any, *, keep: bool) -> Any:
    """A state with every split tensor whole, and on the CPU; all processes must call it, and one need keep it.

    Args:
        tree: the state.
        keep: whether this process is the one; the others get empty tensors.
    """

    def whole(value: DTensor) -> Tensor:
        gathered = value.detach().full_tensor()
        return gathered.cpu() if keep else torch.empty(0)

    return tree_map_only(DTensor, whole, tree)


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as ``like`` is; as it is where that is whole, or of another shape."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

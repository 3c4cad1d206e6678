"""Frozen weights split over the processes while adapters are trained: a device holds its share, and one layer whole."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


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

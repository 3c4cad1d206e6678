"""Several tasks' micro-batches as one batch: a frozen layer runs once, and each row meets its own task's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fusionlab.adapters.fused_attention import SplitAttention

_GROUP = "_fusionlab_group"


@dataclass(frozen=True)
class Group:
    """Tasks whose rows lie one after the other in a batch, equally many of each.

    Args:
        tasks: in the order of their rows.
        names: of their adapters in PEFT's layers.
        draws: what each draws from.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    draws: Draws

    def adapted(self, layer: LoraLayer, inputs: Tensor, output: Tensor) -> Tensor:
        """The base layer's output with (lora_alpha/rank)·B·A x added, A and B those of each row's task.

        Args:
            layer: with an adapter of one rank and scaling for each task.
            inputs: x, shape ``(tasks * rows, ..., columns)``.
            output: W x, shape ``(tasks * rows, ..., rows of W)``, whose dtype stays.
        """
        lora_a, lora_b = (torch.stack([part[name].weight for name in self.names]) for part in _factors(layer))
        first = self.names[0]
        x = layer.lora_dropout[first](inputs.to(lora_a.dtype)).reshape(len(self.names), -1, lora_a.shape[-1])
        low = torch.bmm(x, lora_a.mT)
        whole = output.reshape(len(self.names), -1, lora_b.shape[1])
        scaling = layer.scaling[first]
        if low.dtype == whole.dtype:
            return torch.baddbmm(whole, low, lora_b.mT, alpha=scaling).view_as(output)
        return (whole + torch.bmm(low, lora_b.mT) * scaling).to(output.dtype).view_as(output)


class Draws(TorchFunctionMode):
    """Within it dropout, of layers and of attention, draws for each task's rows what it would draw for them alone.

    Each task has the state of a generator, which goes on from draw to draw; rows that were filled in draw nothing and
    come out as zeros. What draws otherwise (stochastic depth) draws for all tasks from the generator as it is.

    Args:
        states: of the device's generator, one a task.
        sizes: samples of each task, before rows were filled in up to the largest of them.
        device: where it draws.
    """

    def __init__(self, states: Sequence[Tensor], sizes: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.states, self.sizes, self.device = list(states), sizes, device
        self.has_drawn = False

    @classmethod
    def seeded(cls, seeds: Sequence[int], sizes: Sequence[int], device: torch.device) -> Draws:
        """As generators begin that are seeded so."""
        return cls([torch.Generator(device).manual_seed(seed).get_state() for seed in seeds], sizes, device)

    def copied(self) -> Draws:
        """The same draws from here on."""
        return Draws(self.states, self.sizes, self.device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and _DRAWS[func](*args, **kwargs):
            self.has_drawn = True
            return self._by_task(func, args, kwargs)
        return func(*args, **kwargs)

    def _by_task(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first = args[0] if args else kwargs["input" if "input" in kwargs else "query"]
        rows = len(first) // len(self.states)  # of a task; a multiple of its samples where tokens are rows too
        outputs = []
        with _generator_kept(self.device):
            for place, state in enumerate(self.states):
                start = place * rows
                own = slice(start, start + rows * self.sizes[place] // max(self.sizes))
                parts, named = tree_map(lambda value, own=own: _cut(value, len(first), own), (args, kwargs))
                _set_state(state, self.device)
                output = func(*parts, **named)
                self.states[place] = _state(self.device)
                outputs += [output, output.new_zeros(rows - len(output), *output.shape[1:])]
        return torch.cat(outputs)


def _cut(value: Any, rows: int, own: slice) -> Any:
    """A tensor's own rows, where it has those of all tasks; anything else as it is."""
    return value[own] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value


def bind(layer: LoraLayer, group: Group | None) -> None:
    """From now on the layer's output is that of a group's adapters; None: as PEFT gives it."""
    if group is not None and _GROUP not in vars(layer):
        layer.register_forward_hook(_bound)
    if group is not None or _GROUP in vars(layer):
        vars(layer)[_GROUP] = group


def why_apart(model: nn.Module) -> str | None:
    """Why tasks cannot go through a model with adapters as one batch; None where they can."""
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer) and type(part) is not Linear:
            return f"the adapter of {name}, a {type(part).__name__}, acts for one task at a time"
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return f"{name} takes statistics over the batch"
        if isinstance(part, SplitAttention) and not part.batch_first:
            return f"{name} has its samples in the second dimension"
    return None


def _bound(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook: no adapter acts in PEFT's own forward, that of each row is added here."""
    group: Group | None = vars(layer)[_GROUP]
    if group is None:
        return output
    assert isinstance(layer, LoraLayer)
    return group.adapted(layer, inputs[0], output)


def _factors(layer: LoraLayer) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    return layer.lora_A, layer.lora_B


def _dropout_draws(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and p > 0


def _attention_draws(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> bool:
    """``rest`` is the mask, then the dropout."""
    return bool(named.get("dropout_p", rest[1] if len(rest) > 1 else 0.0))


_DRAWS: dict[Any, Any] = {F.dropout: _dropout_draws, F.scaled_dot_product_attention: _attention_draws}


@contextmanager
def _generator_kept(device: torch.device) -> Iterator[None]:
    before = _state(device)
    try:
        yield
    finally:
        _set_state(before, device)


def _state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)

"""A module that trains to first order about a point kept in its buffers. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fusionlab.errors import InputError, did_you_mean
from fusionlab.linearize.network import checked_point, linearized_call
from fusionlab.tensors.state import State


def select_parameters(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the module's parameters that are, or match by shell wildcards, one of ``patterns``, in module order.

    Raises:
        InputError: a pattern matches nothing.

    Example:
        >>> select_parameters(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["*.weight"])
        ['0.weight', '1.weight']
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"parameters to linearize: {pattern!r} matches nothing; {did_you_mean(pattern, names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


class LinearizedModule(nn.Module):
    """A module expanded to first order in some of its parameters about where they are now, or about ``point``.

    The linearization point is kept in buffers below ``linearization_point``; the selected parameters stay parameters of
    ``module`` and train; all others are frozen. A distributed wrapper goes around this module, never inside.

    Args:
        module: any module whose operations have forward-mode rules.
        parameters: names of the parameters to linearize in, or shell wildcards; each must match.
        point: φ₀ by name; the current values by default.
        output_of: picks the one tensor out of what ``module`` returns.

    Raises:
        InputError: a name matches nothing, the point's names or shapes differ, or it is float16.

    Example:
        >>> network = LinearizedModule(nn.Linear(2, 1), ["weight"])
        >>> [name for name, _ in network.named_buffers()], network.module.bias.requires_grad
        (['linearization_point.weight'], False)
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[str] = ("*",),
        point: State | None = None,
        output_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.names = select_parameters(module, parameters)
        self.output_of = output_of or (lambda output: output)
        own = dict(module.named_parameters())
        selected = {name: own[name] for name in self.names}
        point = checked_point(module, selected, selected if point is None else point, None)
        for name, parameter in own.items():
            parameter.requires_grad_(name in selected)
        self.linearization_point = nn.Module()
        for name in self.names:
            _register_buffer(self.linearization_point, name, point[name].detach().clone())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """f(φ₀) + J(φ₀)·(φ − φ₀); arguments are the module's."""
        own = dict(self.module.named_parameters())
        return linearized_call(
            lambda: self.output_of(self.module(*args, **kwargs)),
            self.module,
            {name: own[name] for name in self.names},
            dict(self.linearization_point.named_buffers()),
        )


def _register_buffer(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.register_buffer(leaf, value)

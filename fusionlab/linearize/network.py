"""Whole-network linearization: f(x; φ₀) + J(φ − φ₀) in a named subset of a module's parameters. Torch only.

The value takes one pass of dual numbers, the gradient one ordinary backward pass at φ₀ through the primal that the same
pass recorded: three passes' work in all, where reverse-over-forward AD also records and walks back the tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.linearize.dual import BilinearRule, Function, load_jvp_rules
from fusionlab.tensors.state import State


def autocast_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """What autocast computes in on the tensors' device; None where it is off."""
    device = next(iter(tensors.values())).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def linearized_call(
    call: Callable[[], Tensor],
    module: nn.Module,
    parameters: State,
    point: State,
    *,
    dtype: torch.dtype | None = None,
    dropout_modules: Collection[str] = (),
) -> Tensor:
    """f(φ₀) + J(φ₀)·(φ − φ₀), differentiable once in φ: the gradient is Jᵀ of the cotangent.

    Attention runs on the math kernel, autocast and the module's own dropout are off within. φ − φ₀ is formed in
    float32 or wider before anything is cast; bfloat16 terms are added, and returned, in float32. Nothing of the module
    is changed afterwards.

    Args:
        call: computes f by means of ``module``, one tensor; its inputs are bound in it.
        module: holds the parameters; call this inside the module that a distributed wrapper wraps.
        parameters: φ by parameter name of ``module``; they need not be the module's own tensors.
        point: φ₀, the linearization point, with the names and shapes of ``parameters``.
        dtype: what everything is cast to within, the tangent included; the point's own dtype by default.
        dropout_modules: ends of names of modules whose dropout stays on, with one mask for value and gradient.

    Raises:
        InputError: names that the module lacks, shapes that differ, float16, gradient checkpointing, an operation
            without forward-mode rule, or an output that does not depend on the parameters.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> point, weight = {"weight": torch.ones(1, 1)}, torch.full((1, 1), 3.0)
        >>> linearized_call(lambda: layer(torch.ones(1, 1)) ** 2, layer, {"weight": weight}, point)  # 1 + 2·(3 − 1)
        tensor([[5.]])
    """
    cast = checked_point(module, parameters, point, dtype)
    function = Function(call, module, dtype, dropout_modules)
    primals = {name: _at_point(parameters[name], cast[name]) for name in parameters}
    tangents = {
        name: (wide(parameters[name].detach()) - wide(point[name].detach())).to(cast[name].dtype) for name in parameters
    }
    primal, tangent = _dual_pass(function, primals, tangents, BilinearRule())
    return wide(primal) + wide(tangent)


@torch.no_grad()
def tangent_outputs(
    call: Callable[[], Tensor],
    module: nn.Module,
    point: State,
    tangents: Mapping[str, State],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``(f(φ₀), {task: J(φ₀)·τ_task})`` without gradient; the primal's products are computed once for all tasks.

    By linearity the output of any weighted sum of the task vectors is ``f(φ₀) + Σ λ_task · output[task]``.

    Args:
        call: computes f by means of ``module``, the same way each time it is called.
        module: holds the parameters.
        point: φ₀ by parameter name.
        tangents: τ by task and parameter name, all of the names and shapes of ``point``.
        dtype: what everything is cast to within; the point's own dtype by default.

    Raises:
        InputError: as :func:`linearized_call`, or no task.
    """
    if not tangents:
        raise InputError("tangent outputs need at least one task vector, got none")
    for tangent in tangents.values():
        _check_shapes(tangent, point)
    point = checked_point(module, point, point, dtype)
    function = Function(call, module, dtype)
    kept: list[tuple[Tensor, int]] = []
    base: Tensor | None = None
    outputs: dict[str, Tensor] = {}
    for task, tangent in tangents.items():
        rule = BilinearRule(kept if len(tangents) > 1 else None, replay=bool(outputs))
        cast = {name: tangent[name].to(point[name]) for name in point}
        primal, output = _dual_pass(function, point, cast, rule)
        base = primal if base is None else base
        outputs[task] = wide(output)
    assert base is not None
    return wide(base), outputs


class _AtPoint(torch.autograd.Function):
    """φ₀ in value, φ in gradient: the vector-Jacobian product taken at φ₀ arrives at φ."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, point: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return point.view_as(point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def _at_point(parameter: Tensor, point: Tensor) -> Tensor:
    return _AtPoint.apply(parameter, point) if parameter.requires_grad and torch.is_grad_enabled() else point


def _dual_pass(function: Function, primals: State, tangents: State, rule: BilinearRule) -> tuple[Tensor, Tensor]:
    """Value and tangent of the output; the graph, where recorded, is that of the value."""
    load_jvp_rules()
    with _no_inference_mode(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(_normal(primals[name]), _normal(tangents[name])) for name in primals}
        primal, tangent = forward_ad.unpack_dual(function(duals, rule))
        if tangent is None:
            raise InputError(
                f"the output does not depend on the parameters to linearize: {name_list(primals)}; "
                f"name parameters that the forward pass uses"
            )
        return primal, tangent.detach()


def _no_inference_mode() -> ExitStack:
    """Inference mode drops tangents in silence; no-grad mode keeps them."""
    stack = ExitStack()
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
    return stack


def _normal(tensor: Tensor) -> Tensor:
    """A tensor that AD follows: those that inference mode made are copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def checked_point(module: nn.Module, parameters: State, point: State, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The linearization point by the names of ``parameters``, in ``dtype``, detached.

    Raises:
        InputError: no names, unknown ones, other shapes, float16 or several dtypes.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    if not parameters:
        raise InputError("no parameters to linearize in; name at least one")
    unknown = [name for name in parameters if name not in own]
    if unknown:
        raise InputError(f"the module has no parameters {name_list(unknown)}; {did_you_mean(unknown[0], own)}")
    _check_shapes(point, parameters)
    _check_shapes({name: own[name] for name in parameters}, parameters)
    checked = {name: point[name].detach().to(dtype or point[name].dtype) for name in parameters}
    dtypes = {tensor.dtype for tensor in checked.values()}
    if torch.float16 in dtypes or (dtype is None and any(tensor.dtype == torch.float16 for tensor in own.values())):
        raise InputError(
            "linearization in float16 overflows and underflows; use bfloat16 or float32 (precision bf16-true)"
        )
    if len(dtypes) > 1:
        raise InputError(f"the linearization point has several dtypes {name_list(sorted(map(str, dtypes)))}; use one")
    return checked


def _check_shapes(got: State, expected: State) -> None:
    missing = [name for name in expected if name not in got]
    shapes = [
        f"{name} {tuple(got[name].shape)} (expected {tuple(expected[name].shape)})"
        for name in expected
        if name in got and got[name].shape != expected[name].shape
    ]
    if missing or shapes:
        raise InputError(
            "the linearization point, or a task vector, does not fit the parameters: "
            + "; ".join(
                f"{what}: {name_list(names)}"
                for what, names in (("missing", missing), ("other shapes", shapes))
                if names
            )
        )


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or in float64 if it is so already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()

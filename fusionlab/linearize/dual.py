"""Dual numbers through a module: parameters replaced, kernels that have a forward-mode rule, one cheaper rule.

Forward-mode AD needs attention from the math kernel, no fast path of ``nn.MultiheadAttention``, no autocast and none of
the network's own dropout; all four are switched here, for the length of one call. Torch only.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fusionlab.errors import InputError
from fusionlab.tensors.state import named_tensors

_BILINEAR = {F.linear: 0, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}  # with the dimensions behind that of the bias
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")
_NO_HOOKS = "saved-tensor hooks are off in a linearized network"
_CHECKPOINTED = (
    "{} uses gradient checkpointing, which would recompute with other weights than those that act; turn it off "
    "(model.gradient_checkpointing_disable()) and lower the batch size"
)
_NO_RULE = ("forward AD", "jvp function for custom autograd.Function")


@dataclass(frozen=True)
class Function:
    """One tensor as a function of a module's parameters.

    Args:
        call: computes the tensor by means of ``module``.
        module: holds the parameters by name.
        dtype: what parameters, buffers and tangents are cast to; None keeps each as it is.
        dropout_modules: ends of names of modules whose dropout stays on while they train, such as an adapter's; all
            other dropout is off.
    """

    call: Callable[[], Tensor]
    module: nn.Module
    dtype: torch.dtype | None = None
    dropout_modules: Collection[str] = ()

    def __call__(self, parameters: Mapping[str, Tensor], rule: TorchFunctionMode | None = None) -> Tensor:
        """The tensor at ``parameters``, which replace the module's own for the length of the call.

        Raises:
            InputError: an operation has no forward-mode rule, or ``call`` returns something else than a tensor.
        """
        values = dict(parameters)
        if self.dtype is not None:
            own = named_tensors(self.module)
            given = {id(own[name]) for name in values}
            for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
                if id(tensor) not in given and tensor.is_floating_point():
                    values[name] = tensor.to(self.dtype)
        refuse_checkpointing(self.module)
        with ExitStack() as stack:
            stack.enter_context(_without_dropout(self.module, tuple(self.dropout_modules)))
            stack.enter_context(tensors_replaced(self.module, values))
            stack.enter_context(_forward_mode_kernels())
            if torch.is_grad_enabled():  # a recomputation would use the module's own parameters, not the point
                stack.enter_context(disable_saved_tensors_hooks(_NO_HOOKS))
            if rule is not None:
                stack.enter_context(rule)
            try:
                output = self.call()
            except (NotImplementedError, RuntimeError) as error:
                if any(sign in str(error) for sign in _NO_RULE):
                    raise InputError(_no_rule(self.module, error)) from error
                if _NO_HOOKS in str(error):
                    raise InputError(_CHECKPOINTED.format(_where(self.module, error))) from error
                raise
        if not isinstance(output, Tensor):
            raise InputError(f"a linearized function returns one tensor, got {type(output).__name__}; pick one output")
        return output


class BilinearRule(TorchFunctionMode):
    """Tangents of linear layers and convolutions: only the products that are not zero, and no reverse graph.

    The tangent of W x is W ẋ where W is frozen; PyTorch's own rule adds Ẇ x with a matrix of zeros for Ẇ, a whole
    product more. And since the gradient of a linearized function is the vector-Jacobian product of its *primal*, no
    tangent needs recording for the backward pass.

    Args:
        primals: where primal outputs are kept in call order, for further tangents of the same inputs.
        replay: take the primal outputs from ``primals``; one that was overwritten in place is computed again.
    """

    def __init__(self, primals: list[tuple[Tensor, int]] | None = None, replay: bool = False) -> None:
        super().__init__()
        self.primals, self.replay, self.position = primals, replay, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _BILINEAR:
            return self._bilinear(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _bilinear(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
    ) -> Tensor:
        x, x_tangent = forward_ad.unpack_dual(input)
        w, w_tangent = forward_ad.unpack_dual(weight)
        b, b_tangent = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        output = self._primal(func, x, w, b, *rest, **named)
        if x_tangent is None and w_tangent is None and b_tangent is None:
            return output
        with torch.no_grad():
            if w_tangent is not None:
                tangent = func(x, w_tangent, b_tangent, *rest, **named)
                if x_tangent is not None:
                    tangent += func(x_tangent, w, None, *rest, **named)
            elif x_tangent is not None:
                tangent = func(x_tangent, w, b_tangent, *rest, **named)
            else:  # a bias alone, which costs no product
                tangent = cast(Tensor, b_tangent).view(-1, *[1] * _BILINEAR[func]).expand_as(output)
        return forward_ad.make_dual(output, tangent)

    def _primal(self, func: Any, *args: Any, **named: Any) -> Tensor:
        if self.primals is None:
            return func(*args, **named)
        position, self.position = self.position, self.position + 1
        if self.replay:
            output, version = self.primals[position]
            return output if output._version == version else func(*args, **named)
        output = func(*args, **named)
        self.primals.append((output, output._version))
        return output


@cache
def load_jvp_rules() -> None:
    """Import what PyTorch imports at the first dual number, without the deprecation notice that comes along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


@contextmanager
def tensors_replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the module's parameters and buffers of these names are other tensors, wherever they are tied.

    Args:
        module: the module.
        values: by any of a tensor's names.

    Raises:
        InputError: two values for one tensor.
    """
    own = named_tensors(module)
    wanted: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for name, value in values.items():
        key = id(own[name])
        if key in wanted and wanted[key] is not value and not torch.equal(wanted[key], value):
            raise InputError(f"{names[key]} and {name} are one tensor, and the values for them differ")
        wanted[key], names[key] = value, name
    slots: list[tuple[dict[str, Any], str, Any]] = [
        (tensors, leaf, tensor)
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for leaf, tensor in tensors.items()
        if id(tensor) in wanted
    ]
    try:
        for tensors, leaf, tensor in slots:
            tensors[leaf] = wanted[id(tensor)]
        yield
    finally:
        for tensors, leaf, tensor in slots:
            tensors[leaf] = tensor


@contextmanager
def _without_dropout(module: nn.Module, kept: tuple[str, ...]) -> Iterator[None]:
    training = [part for name, part in module.named_modules() if part.training and not (kept and name.endswith(kept))]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _forward_mode_kernels() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def refuse_checkpointing(module: nn.Module) -> None:
    """Raise where part of ``module`` recomputes its forward in the backward pass.

    Raises:
        InputError: gradient checkpointing is on.
    """
    recomputing = [part for part in module.modules() if any(vars(part).get(flag) is True for flag in _CHECKPOINTING)]
    if recomputing:
        name = next(name for name, part in module.named_modules() if part is recomputing[0])
        raise InputError(_CHECKPOINTED.format(name or type(module).__name__))


def _no_rule(module: nn.Module, error: BaseException) -> str:
    return (
        f"{_where(module, error)} has no forward-mode rule, which linearizing a network needs: "
        f"{str(error).splitlines()[0]} Load the model with attn_implementation='eager' or 'sdpa', replace that layer "
        f"by plain PyTorch operations, or use method l_lora, which needs no such rule."
    )


def _where(module: nn.Module, error: BaseException) -> str:
    """The innermost part of ``module`` that ``error`` came through, by name and class."""
    names = {id(part): name for name, part in module.named_modules()}
    inside, traceback = "the function", error.__traceback__
    while traceback is not None:
        part = traceback.tb_frame.f_locals.get("self")
        if id(part) in names:
            inside = f"{names[id(part)] or 'the module'} ({type(part).__name__})"
        traceback = traceback.tb_next
    return inside

"""What each method trains for a task, and how that acts on the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusionlab import adapters
from fusionlab.adapters import Adapter, InjectionReport
from fusionlab.adapters.injection import adapter_name
from fusionlab.adapters.weights import Weights
from fusionlab.backbones import KnownBackbone
from fusionlab.distributed.sharding import gathered, split
from fusionlab.errors import InputError
from fusionlab.linearize import LinearizedState
from fusionlab.modules.applying import (
    Application,
    Linearized,
    Replaced,
    linearized_adapter,
    names_in_backbone,
    plain,
)
from fusionlab.tensors.state import State

Method = Literal["lora", "l_lora", "tangent_lora", "tangent", "full"]
ON_ALL_WEIGHTS = ("tangent", "full")


class Adaptation(Protocol):
    """What one method trains.

    ``report`` and ``target_modules`` say where adapters are, None where there are none; ``mesh`` over which processes
    to split what is trained, None to keep it whole.
    """

    report: InjectionReport | None
    target_modules: list[str] | None
    mesh: DeviceMesh | None

    def add(self, tasks: Sequence[str]) -> dict[str, list[nn.Parameter]]:
        """Make what is trained for each task; everything else is frozen."""

    def apply(self, task: str | None) -> Application:
        """Make ``task`` the one that acts, None the pretrained model; returns how."""

    def weights(self, task: str) -> Weights:
        """A copy on the CPU of what was trained for ``task``."""


class LowRank:
    """``lora``, ``l_lora`` and ``tangent_lora``: one PEFT adapter per task, all from one seeded, hashed start.

    Args:
        backbone: the backbone; adapters go below its ``scope``.
        method: ``lora``, ``l_lora``, or ``tangent_lora``, whose output is the whole network's to first order.
        rank: rank r.
        lora_alpha: the adapter is scaled by ``lora_alpha / rank``.
        dropout: dropout on the adapter's input while training.
        target_modules: names of the linear layers to adapt.
        seed: seed of A₀.
        task_type: what PEFT calls the model's kind, written into adapters.
    """

    def __init__(
        self,
        backbone: KnownBackbone,
        method: Literal["lora", "l_lora", "tangent_lora"],
        rank: int,
        lora_alpha: float,
        dropout: float,
        target_modules: Sequence[str],
        seed: int,
        task_type: str | None = None,
    ) -> None:
        self.backbone, self.method = backbone, method
        self.report: InjectionReport | None = None
        self.mesh: DeviceMesh | None = None
        self.target_modules: list[str] | None = list(target_modules)
        self.settings = {
            "rank": rank,
            "lora_alpha": lora_alpha,
            "dropout": dropout,
            "target_modules": target_modules,
            "seed": seed,
            "task_type": task_type,
        }

    def add(self, tasks: Sequence[str]) -> dict[str, list[nn.Parameter]]:
        """Inject one trainable adapter per task.

        Raises:
            InputError: a target name matches no layer.
        """
        model, name = self.backbone.model, self.backbone.name
        scope = self.backbone.scope
        self.report = adapters.inject(
            model,
            tasks,
            method=self.method,
            scope=scope,
            base_model_name=name,
            **self.settings,
        )
        return {task: adapters.trainable_parameters(model, task) for task in tasks}

    def apply(self, task: str | None) -> Application:
        """Activate the task's adapter."""
        adapters.activate(self.backbone.model, task)
        if task is None or self.method != "tangent_lora":
            return plain
        return linearized_adapter(self.backbone, task)

    def weights(self, task: str) -> Adapter:
        """The task's adapter."""
        return adapters.extract(self.backbone.model, task)


class FullRank(nn.Module):
    """``full`` and ``tangent``: each task its own copy of all weights of the encoder, where the base's frozen ones are.

    Args:
        backbone: the backbone; trained is what lies below its ``full_scopes``.
        method: ``full``, or ``tangent``, whose output is the whole network's to first order about the base.
    """

    def __init__(self, backbone: KnownBackbone, method: Literal["tangent", "full"]) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone  # not a submodule of its own: the module that trains has it already
        self.method = method
        self.report: InjectionReport | None = None
        self.mesh: DeviceMesh | None = None
        self.target_modules: list[str] | None = None
        self.finetuned = nn.ModuleDict()
        self.names: dict[str, str] = {}

    def add(self, tasks: Sequence[str]) -> dict[str, list[nn.Parameter]]:
        """Copy the weights below ``full_scopes`` for each task.

        Raises:
            InputError: the base has no floating-point weights there.
        """
        own = dict(self.backbone.named_parameters())
        scopes = tuple(f"{scope}." if scope else "" for scope in self.backbone.full_scopes)
        self.names = {
            name: actual
            for name, actual in names_in_backbone(self.backbone).items()
            if actual in own and name.startswith(scopes) and own[actual].is_floating_point()
        }
        if not self.names:
            raise InputError(f"the base has no weights below {', '.join(self.backbone.full_scopes)}")
        trained = {}
        for task in tasks:
            holder = nn.Module()
            trained[task] = [_register(holder, name, self._copy(own[actual])) for name, actual in self.names.items()]
            self.finetuned[adapter_name(task)] = holder
        return trained

    def apply(self, task: str | None) -> Application:
        """Let the task's copy act where the base's weights are."""
        if task is None:
            return plain
        parameters = {self.names[name]: value for name, value in self._trained(task).items()}
        if self.method == "full":
            return Replaced(self.backbone, parameters)
        own = dict(self.backbone.named_parameters())
        return Linearized(self.backbone, parameters, {name: own[name] for name in parameters})

    def weights(self, task: str) -> State | LinearizedState:
        """The task's weights by the base's names; where they are split, all processes must ask."""
        own = self._trained(task)
        state = {name: gathered({name: own[name].detach()})[name].cpu().clone() for name in own}  # one at a time
        return LinearizedState(state) if self.method == "tangent" else state

    def _copy(self, value: Tensor) -> Tensor:
        return value.detach().clone() if self.mesh is None else split(value.detach(), self.mesh)

    def _trained(self, task: str) -> dict[str, Tensor]:
        return dict(self.finetuned[adapter_name(task)].named_parameters())


def make_adaptation(
    backbone: KnownBackbone,
    method: Method,
    *,
    rank: int,
    lora_alpha: float,
    dropout: float,
    target_modules: Sequence[str] | None,
    seed: int,
    task_type: str | None = None,
) -> Adaptation:
    """What ``method`` trains on ``backbone``; arguments as in :class:`LowRank`.

    Raises:
        InputError: no target, or adapter settings for a method that has no adapters.
    """
    if target_modules is not None and not target_modules:
        raise InputError("target_modules: expected at least one name, got []; leave it out for the default")
    if method not in ON_ALL_WEIGHTS:
        targets = tuple(target_modules or backbone.default_target_modules)
        return LowRank(backbone, method, rank, lora_alpha, dropout, targets, seed, task_type)
    if dropout or target_modules:
        setting = f"dropout {dropout}" if dropout else f"target_modules {list(target_modules or ())}"
        raise InputError(
            f"{setting} is for adapters; method {method!r} trains all weights of the encoder, leave it out"
        )
    return FullRank(backbone, method)


def _register(holder: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    *path, leaf = name.split(".")
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder._modules[part]  # type: ignore[assignment]
    parameter = nn.Parameter(value)
    holder.register_parameter(leaf, parameter)
    return parameter

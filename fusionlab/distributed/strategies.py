"""Which strategies work, and those of our own: DDP that calls the roll, and weights split while they train."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fusionlab.distributed.meeting import call_roll, listen
from fusionlab.distributed.sharding import shard_frozen, split_like, whole_on_cpu
from fusionlab.errors import InputError

SHARDED = "fsdp"
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "SingleDeviceStrategy", "DDPStrategy", "RollCallDDP")
_SHARDED_METHODS = ("lora", "l_lora", "full")
_OTHER_SHARDS = "it splits the network's own parameters, where tasks put in theirs; use ddp, or fsdp to train"
_REASONS = {
    "fsdp": "its options are those of another wrapper; use the plain name fsdp",
    "model_parallel": _OTHER_SHARDS,
    "deepspeed": _OTHER_SHARDS,
    "ddp_spawn": "its processes cannot hand the results back; use ddp",
    "ddp_fork": "its processes cannot hand the results back; use ddp",
    "ddp_notebook": "its processes cannot hand the results back; use ddp",
    "ddp_find_unused_parameters_true": "every parameter is used in every step, searching only costs time; use ddp",
}


def check_strategy(strategy: Any) -> None:
    """Raise unless the strategy works here.

    Args:
        strategy: what ``trainer.strategy`` says: a name, or a mapping with ``class_path``.

    Raises:
        InputError: it cannot work; the message says why and what to use.
    """
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if name in (*STRATEGIES, SHARDED):
        return
    key = name.lower().removesuffix("strategy")
    reason = next((reason for start, reason in _REASONS.items() if key.startswith(start)), "use auto or ddp")
    raise InputError(f"trainer.strategy {name!r} cannot work here: {reason}")


def check_sharded(method: str, *, train_only: bool, limit_val_batches: float | None) -> None:
    """Raise unless ``fsdp`` can train this: no linearized network, and nothing but training.

    Raises:
        InputError: another method, or a job that also scores; the message says what to do.
    """
    if method not in _SHARDED_METHODS:
        raise InputError(
            f"trainer.strategy 'fsdp' cannot work with method {method!r}, which expands the whole network about its "
            f"whole weights; use ddp, or method {', '.join(_SHARDED_METHODS[:-1])} or {_SHARDED_METHODS[-1]}"
        )
    if not train_only or limit_val_batches:
        raise InputError(
            "trainer.strategy 'fsdp' only trains, as fusing and scoring need whole weights: give --train_only and "
            "leave trainer.limit_val_batches at 0, then fuse and score by a fit over all tasks without fsdp"
        )


class RollCallDDP(DDPStrategy):
    """DDP that says which rank is missing where not all of them come together in time.

    Args:
        start_timeout: seconds to wait for all processes.
        options: of :class:`~lightning.pytorch.strategies.DDPStrategy`.
    """

    def __init__(self, start_timeout: float = 300, **options: Any) -> None:
        super().__init__(**options)
        self.start_timeout = start_timeout

    def setup_distributed(self) -> None:
        """Call the roll, then connect; under torchrun its agents have done so already."""
        self.set_world_ranks()
        if not distributed.is_initialized() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            environment = self.cluster_environment
            assert environment is not None
            store = call_roll(
                environment.main_address,
                environment.main_port,
                environment.global_rank(),
                environment.world_size(),
                self.start_timeout,
            )
            device = None if self.root_device.type == "cpu" else self.root_device
            distributed.init_process_group(
                self._get_process_group_backend(),
                store=store,
                rank=environment.global_rank(),
                world_size=environment.world_size(),
                timeout=self._timeout,
                device_id=device,
            )
            atexit.register(_disconnect)
        super().setup_distributed()
        environment = self.cluster_environment
        assert environment is not None
        listen(environment.main_address, environment.main_port)


class ShardedDDP(RollCallDDP):
    """DDP with weights split over the processes while they train.

    Adapters stay whole, over frozen weights that are split. In full fine-tuning what is trained is split itself, and
    its gradients come averaged out of their split: no wrapper is needed. Checkpoints hold whole tensors, as those of
    any other strategy, so that a run can go on under another one or on another number of processes.
    """

    mesh: DeviceMesh

    def setup_environment(self) -> None:
        """Connect, and tell the module, before it makes what it trains, what to split that over."""
        super().setup_environment()
        self.mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        if self._trains_split:
            self._module.adaptation.mesh = self.mesh

    def configure_ddp(self) -> None:
        """Wrap the module where what it trains is whole."""
        if not self._trains_split:
            super().configure_ddp()

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """While gradients are accumulated: split ones are averaged with every batch."""
        return nullcontext() if self._trains_split else super().block_backward_sync()

    def on_train_start(self) -> None:
        """Split frozen weights once nothing but training is left to do."""
        super().on_train_start()
        if not self._trains_split:
            shard_frozen(self._module.base_model, self.mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, and all else that is; of split frozen weights, which no checkpoint keeps, nothing."""
        trained = {name for name, value in self._module.named_parameters() if value.requires_grad}
        state = super().lightning_module_state_dict()
        kept = {name: value for name, value in state.items() if name in trained or not isinstance(value, DTensor)}
        return whole_on_cpu(kept, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, whole."""
        return whole_on_cpu(super().optimizer_state(optimizer), keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's shares of a whole state."""
        own = self._module.state_dict()
        state = {key: split_like(value, own[key]) for key, value in checkpoint["state_dict"].items()}
        super().load_model_state_dict({**checkpoint, "state_dict": state}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's shares of a whole state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                number: {
                    name: value if name == "step" else split_like(value, parameters[number])
                    for name, value in of.items()
                }
                for number, of in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})

    def teardown(self) -> None:
        """Leave split weights where they are: they are gathered after this, which NCCL cannot do on a CPU."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.model = self.lightning_module
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trains_split(self) -> bool:
        return self._module.method == "full"


def _disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()

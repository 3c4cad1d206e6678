"""Processes of one run: which strategies work, how the ranks meet, and what they must agree on."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fusionlab.distributed.sharding import shard_frozen, split_like, whole_on_cpu
from fusionlab.errors import InputError

RUN_FOLDER_VARIABLE = "FUSIONLAB_RUN_FOLDER"
_LAST_TO_LEAVE = 30.0  # seconds that rank 0, which holds the meeting place, waits for all to have heard
_news: list[News] = []
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


def started_world_size() -> int:
    """Number of processes that the launcher in the environment started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def started_rank() -> int:
    """This process's rank by the launcher in the environment; 0 without one."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name):
            return int(os.environ[name])
    return 0


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
        _news[:] = [News(environment.main_address, environment.main_port)]


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


def call_roll(host: str, port: int, rank: int, world_size: int, timeout: float) -> distributed.Store:
    """Wait until all ranks have come; returns the store through which they connect.

    Raises:
        InputError: some did not come in time, by number.
    """
    deadline = time.monotonic() + timeout
    where = f"{host}:{port}"
    try:
        store = distributed.TCPStore(
            host, port, world_size, rank == 0, timedelta(seconds=timeout), wait_for_workers=False
        )
        store.set(f"rank/{rank}", b"here")
        missing = [other for other in range(world_size) if other != rank]
        while missing and time.monotonic() < deadline:
            missing = [other for other in missing if not store.check([f"rank/{other}"])]
            time.sleep(0.05 if missing else 0)
    except (distributed.DistError, TimeoutError) as error:
        raise InputError(
            f"rank {rank} did not reach rank 0 at {where} within {timeout:g} s; start all {world_size} processes, with "
            f"the same MASTER_ADDR and MASTER_PORT ({str(error).splitlines()[0]})"
        ) from error
    if missing:
        numbers = ", ".join(map(str, missing))
        raise InputError(
            f"rank {numbers} of 0..{world_size - 1} did not come to {where} within {timeout:g} s (says rank {rank}); "
            f"see why it did not start, or give --start_timeout more seconds"
        )
    store.set_timeout(timedelta(seconds=max(timeout, 60)))
    return distributed.PrefixStore("connected", store)


class News:
    """Whether a process has left because of bad input, as every process hears while it waits for the others.

    A thread asks the store of rank 0 over a connection of its own, remembers, and says that it has heard. So what a
    process knows when a collective fails does not depend on who has left by then: rank 0, and with it the store,
    leaves only once all have heard.

    Args:
        host: where the processes meet.
        port: of the store there.
    """

    def __init__(self, host: str, port: int) -> None:
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        store = distributed.TCPStore(host, port, None, False, timedelta(seconds=60), wait_for_workers=False)
        self._store = distributed.PrefixStore("news", store)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.heard = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """Let the others know that this process leaves because of bad input, which it tells itself."""
        with self._lock:
            self._store.set("bad input", str(self.rank))
        self._hear()

    def wait_for_others(self) -> None:
        """On rank 0 wait until all have heard; a process that is gone without a word is waited for in vain."""
        deadline = time.monotonic() + _LAST_TO_LEAVE
        others = [f"heard/{rank}" for rank in range(self.world_size)] if self.rank == 0 else []
        while others and time.monotonic() < deadline:
            with self._lock:
                others = [key for key in others if not self._store.check([key])]
            time.sleep(0.05)

    def ask(self) -> bool | None:
        """Whether one has left because of bad input; None where rank 0 is gone and said nothing."""
        try:
            self._look()
        except distributed.DistError:
            return True if self.heard else None
        return self.heard

    def leave(self) -> None:
        """Stop to listen, and say so."""
        self._ended.set()
        self._thread.join()
        try:
            self._hear()
        except distributed.DistError:
            return  # rank 0 has left before, and waits for nobody

    def _listen(self) -> None:
        while not self.heard and not self._ended.wait(0.25):
            try:
                self._look()
            except distributed.DistError:
                return  # rank 0 has left without news

    def _look(self) -> None:
        with self._lock:
            told = self._store.check(["bad input"])
        if told:
            self._hear()

    def _hear(self) -> None:
        self.heard = True
        with self._lock:
            self._store.set(f"heard/{self.rank}", b"yes")


def tell_bad_input() -> None:
    """Let the other processes know that this one leaves because of bad input, which it tells itself."""
    if _news and distributed.is_initialized():
        _news[0].tell()
        _news[0].wait_for_others()


def leave() -> None:
    """Say, however a command ends, that this process needs not be waited for."""
    if _news:
        _news.pop().leave()


def exit_code_of_others() -> int | None:
    """The exit code with which to leave where another process has left, so that waiting for it failed; else None.

    2 after bad input, which that process tells; 1 where rank 0 is gone, with whom the processes meet.
    """
    if not _news:
        return None
    told = _news[0].ask()
    if told is None:
        print(f"fusionlab: rank {started_rank()} ends, as rank 0 has ended; what that one says is why", file=sys.stderr)
        return 1
    if told:
        _news[0].wait_for_others()
        return 2
    return None


def _disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def same_on_all_ranks(strategy: Any, what: str, value: Any) -> None:
    """Raise on the ranks that see another value than rank 0.

    Raises:
        InputError: this rank differs.
    """
    first = strategy.broadcast(value)
    differs = strategy.reduce_boolean_decision(first != value, all=False)
    if differs:
        raise InputError(
            f"the processes do not agree on {what}: rank 0 sees {first!r}, rank {strategy.global_rank} {value!r}; they "
            f"need the same files, on a file system that all of them share"
        )


def raise_together(strategy: Any, error: InputError | None) -> None:
    """Raise rank 0's error on all ranks, so that none of them waits for it; only rank 0 has a message.

    Raises:
        InputError: on rank 0.
        SystemExit: with exit code 2, on the others.
    """
    failed = strategy.broadcast(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)

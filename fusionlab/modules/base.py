"""The task-generic LightningModule: adapters, the multi-task step, per-task optimisation and the checkpoint filter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fusionlab import adapters
from fusionlab.adapters import Adapter
from fusionlab.backbones import load_backbone
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation import Row, evaluate, mean_over_ranks
from fusionlab.loading import LoadedWeights, load_weights
from fusionlab.optimization import lr_multiplier
from fusionlab.samplers import derive_seed
from fusionlab.state import State

Method = Literal["lora", "l_lora"]


class FusionModule(LightningModule):
    """Fine-tunes one adapter per task over one frozen backbone; subclasses supply loss, scores and metrics.

    One training step is one micro-batch of every task: each task's forward and backward are finished before the next
    task's adapter is activated, so only one graph is held, and each adapter is trained as if alone.

    Args:
        backbone: an embedded name, a local folder or a hub id, the embedded one by default; or a loaded backbone.
        method: ``lora`` trains A and B; ``l_lora`` trains each adapted layer expanded to first order in (A, B).
        rank: rank r of every adapter.
        lora_alpha: the adapter is scaled by ``lora_alpha / rank``.
        dropout: dropout on the adapter's input while training, 0..1.
        target_modules: names of the linear layers to adapt; the backbone's q and v projections by default.
        learning_rate: peak learning rate of AdamW; by default one that suits the method and the embedded backbone.
        weight_decay: decoupled weight decay on what is trained.
        num_warmup_steps: steps of linear warm-up.
        lr_schedule: what follows the warm-up, ``cosine`` to zero over the run, or ``constant``.
        weights: folder with an adapter or a fused model, to ``validate``, ``test`` or ``predict`` with.
        seed: seed of the initial adapter, of dropout, and written into every result row.
    """

    default_backbone: ClassVar[str]
    default_learning_rates: ClassVar[Mapping[str, float]]

    def __init__(
        self,
        backbone: str | nn.Module | None,
        method: Method = "lora",
        rank: int = 16,
        lora_alpha: float = 32,
        dropout: float = 0.0,
        target_modules: list[str] | None = None,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        num_warmup_steps: int = 0,
        lr_schedule: Literal["cosine", "constant"] = "cosine",
        weights: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must lie in 0..1, got {dropout}")
        if learning_rate is None:
            learning_rate = self.default_learning_rates[method]
        if learning_rate <= 0:
            raise InputError(f"learning_rate must be positive, got {learning_rate}")
        self.strict_loading = False
        self.method, self.rank, self.lora_alpha, self.dropout = method, rank, lora_alpha, dropout
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.num_warmup_steps, self.lr_schedule = num_warmup_steps, lr_schedule
        self.weights, self.seed = weights, seed
        backbone = self.default_backbone if backbone is None else backbone
        self.backbone: Any = load_backbone(backbone) if isinstance(backbone, str) else backbone
        self.target_modules = tuple(target_modules or self.backbone.default_target_modules)
        self.injection: adapters.InjectionReport | None = None
        self.task_parameters: dict[str, list[nn.Parameter]] = {}
        self.loaded: LoadedWeights | None = None
        self.rows: list[Row] = []
        self.predictions: list[dict[str, Any]] = []
        self._predicting = ExitStack()

    @property
    def resolved(self) -> dict[str, Any]:
        """The arguments whose defaults depend on the class or on other arguments, as they came out."""
        return {
            "backbone": self.backbone.name,
            "learning_rate": self.learning_rate,
            "target_modules": list(self.target_modules),
        }

    # what a kind of model supplies

    def prepare_tasks(self, tasks: dict[str, Any]) -> None:
        """Build what each task needs beside the adapter, such as a zero-shot head. Called on the final device."""
        raise NotImplementedError

    def loss(self, task: str, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a batch under the active weights, a scalar."""
        raise NotImplementedError

    def metrics(self, task: str) -> MetricCollection:
        """Fresh metrics of a task, on this module's device."""
        raise NotImplementedError

    def score(self, task: str, batch: dict[str, Any], metrics: MetricCollection) -> None:
        """Predict a batch under the active weights and count it in ``metrics``."""
        raise NotImplementedError

    # adapters

    @property
    def base_model(self) -> nn.Module:
        """The model whose parameter names adapters and fused weights are keyed by."""
        return self.backbone.model

    def setup(self, stage: str) -> None:
        """Inject one adapter per task before the optimizer and the distributed wrapper see the module."""
        if stage == "fit" and self.injection is None:
            self.add_adapters(list(self.trainer.datamodule.tasks))
        elif stage != "fit" and self.weights is not None:
            self.loaded = load_weights(Path(self.weights), self.base_model)

    def add_adapters(self, tasks: list[str]) -> None:
        """Inject one trainable adapter per task, all started from one seeded, hashed A₀.

        Raises:
            InputError: a target name matches no layer.
        """
        self.injection = adapters.inject(
            self.base_model,
            tasks,
            method=self.method,
            rank=self.rank,
            lora_alpha=self.lora_alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            scope=self.backbone.scope,
            seed=self.seed,
            base_model_name=self.backbone.name,
        )
        self.task_parameters = {task: adapters.trainable_parameters(self.base_model, task) for task in tasks}

    def activate(self, task: str | None) -> None:
        """Make ``task``'s adapter the active one; None deactivates all, which is the pretrained model."""
        adapters.activate(self.base_model, task)

    def adapter(self, task: str) -> Adapter:
        """A copy of the task's current adapter."""
        return adapters.extract(self.base_model, task)

    @contextmanager
    def use(self, weights: str | Adapter | State | None) -> Iterator[None]:
        """Score under other weights: None is pretrained, a name that task's adapter, else an adapter or fused weights.

        Everything is put back bit for bit at the end, the active adapter included.

        Args:
            weights: None, a task's name, an adapter, or a state of base weights by name that replace the base's.
        """
        before = adapters.active(self.base_model)
        if weights is None or isinstance(weights, str):
            change: AbstractContextManager[None] = nullcontext()
        elif isinstance(weights, Adapter):
            change = adapters.added(self.base_model, weights)
        else:
            change = adapters.base_weights_replaced(self.base_model, weights)
        with change:
            if weights is None or isinstance(weights, str):
                self.activate(weights)
            try:
                yield
            finally:
                self.activate(before)

    # training

    def on_fit_start(self) -> None:
        """Prepare the tasks on the device; everything trains as it would in plain PyTorch, dropout included."""
        self.prepare_tasks(self.trainer.datamodule.tasks)
        self.train()

    def training_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> Tensor:
        """One micro-batch of every task; returns the summed loss, with the gradients already computed per task."""
        losses, parameters, gradients = {}, [], []
        for task, part in batch.items():
            torch.manual_seed(derive_seed(self.seed, "dropout", task, self._batches_before, self.global_rank))
            self.activate(task)
            loss = self.loss(task, part)
            gradients += torch.autograd.grad(loss, self.task_parameters[task])
            parameters += self.task_parameters[task]
            losses[task] = loss.detach()
        losses = mean_over_ranks(losses)
        self._check_finite(losses)
        self.log_dict({f"train/{task}/loss": loss for task, loss in losses.items()}, batch_size=1)
        total = torch.stack(list(losses.values())).sum()
        return _WithGradients.apply(total, gradients, *parameters)

    @property
    def _batches_before(self) -> int:
        """The number of micro-batches before this one, over all epochs and restarts."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What the distributed wrapper leaves alone: all that is not trained, which every rank has loaded itself."""
        trained = {id(parameter) for parameters in self.task_parameters.values() for parameter in parameters}
        frozen = [name for name, parameter in self.named_parameters() if id(parameter) not in trained]
        return frozen + [name for name, _ in self.named_buffers()]

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        if torch.stack(list(losses.values())).isfinite().all():
            return
        bad = [f"{task} ({loss.item()})" for task, loss in losses.items() if not loss.isfinite()]
        raise FloatingPointError(
            f"the loss is not finite at step {self.global_step} for {name_list(bad)}; training stopped before the "
            f"update, the last checkpoint is kept. Lower learning_rate or use bf16 or float32."
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with one parameter group per task, so that decay, clipping and schedule act per task."""
        groups = [{"params": parameters, "name": task} for task, parameters in self.task_parameters.items()]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_multiplier(step, self.num_warmup_steps, total_steps, self.lr_schedule),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each task's gradient by itself."""
        if not gradient_clip_val:
            return
        for group in optimizer.param_groups:
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(group["params"], gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters only, never the frozen backbone, and the hash of what they started from."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        kept |= {name for name in checkpoint["state_dict"] if ".lora_" in name or "lora_a0" in name}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        assert self.injection is not None
        checkpoint["a0_hash"] = self.injection.a0_hash

    # evaluation

    def evaluation_context(self) -> AbstractContextManager[Any]:
        """The precision context of the attached trainer, or none."""
        trainer = self._trainer
        return nullcontext() if trainer is None else trainer.precision_plugin.val_step_context()

    def on_test_start(self) -> None:
        """Prepare the tasks on the device."""
        self.prepare_tasks(self.trainer.datamodule.tasks)

    on_validation_start = on_test_start

    def on_predict_start(self) -> None:
        """Prepare the tasks and put the weights in."""
        self.prepare_tasks(self.trainer.datamodule.tasks)
        self.predictions = []
        self._predicting.enter_context(self.use(None if self.loaded is None else self.loaded.weights))

    def on_predict_end(self) -> None:
        """Take the weights out."""
        self._predicting.close()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """In ``fit``, score each task's adapter on its own validation split and log; else score ``weights``."""
        if self.trainer.state.fn != "fit":
            self.rows = self._score_weights("validation")
            return
        for task in self.task_parameters:
            with self.use(task):
                rows = evaluate(self, self.trainer.datamodule, [task], "validation")
            self.log_dict({f"validation/{task}/{row['metric']}": row["value"] for row in rows}, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score ``weights`` on the test splits."""
        self.rows = self._score_weights("test")

    def _score_weights(self, split: str) -> list[Row]:
        loaded = self.loaded
        labels = {"model": "pretrained"} if loaded is None else loaded.labels
        with self.use(None if loaded is None else loaded.weights):
            return evaluate(self, self.trainer.datamodule, None, split, **{"seed": self.seed} | labels)


class _WithGradients(torch.autograd.Function):
    """Identity on a scalar whose backward hands out gradients that are computed already.

    The distributed wrapper then sees one backward over all tasks' parameters, each ready exactly once, although every
    task's graph was freed before the next task's forward.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return None, None, *torch._foreach_mul(ctx.gradients, upstream)

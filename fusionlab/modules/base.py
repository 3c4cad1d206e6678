"""The task-generic LightningModule: weights, the multi-task step, per-task optimisation and the checkpoint filter."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fusionlab import adapters
from fusionlab.adapters import Adapter, InjectionReport
from fusionlab.adapters.routed import FusedWeights, RoutedWeights
from fusionlab.adapters.weights import Weights, is_linearized
from fusionlab.backbones import KnownBackbone, load_backbone
from fusionlab.contracts import Application, ModuleDefaults
from fusionlab.data.tasks import Samples
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation.rows import Row
from fusionlab.evaluation.scores import evaluate, mean_over_ranks
from fusionlab.fusion.by_task import acting, weights_of
from fusionlab.keys import keyed
from fusionlab.linearize import LINEARIZED_METHODS
from fusionlab.modules.adaptation import Method, make_adaptation
from fusionlab.modules.applying import (
    LinearOutputs,
    applied,
    as_linearized,
    plain,
    task_vector_on_backbone,
)
from fusionlab.modules.grouping import AtOnce, SideBySide, checked, in_groups, losses_of, num_at_once
from fusionlab.modules.optimization import check_optimization, lr_multiplier
from fusionlab.modules.provenance import check_trained_on, trained_on
from fusionlab.modules.resuming import check_same_training
from fusionlab.modules.stepping import WithGradients, gradients_of
from fusionlab.runs.loading import LoadedWeights, base_hash, load_weights, point_hash, weights_folder
from fusionlab.samplers import derive_seed
from fusionlab.tensors.masked import MaskedVectors

_log = logging.getLogger(__name__)


class FusionModule(LightningModule, ModuleDefaults, ABC):
    """Fine-tunes one adapter, or one copy of the weights, per task; subclasses supply loss, scores and metrics.

    One training step is one micro-batch of every task, each task trained as if alone: either its forward and backward
    are finished before the next task is activated, so that only one graph is held, or several tasks' samples go through
    each frozen layer as one batch, every row bound to its own task's adapter. Subclasses compute what depends
    on the trained weights through :meth:`output`, so that every method can act there.

    The constructor's arguments are written here once: a subclass takes its own and hands on the others.

    Args:
        backbone: an embedded name, a local folder or a hub id, the embedded one by default; or a loaded backbone.
        method: ``lora`` trains A and B; ``l_lora`` each adapted layer expanded to first order in (A, B);
            ``tangent_lora`` the whole network expanded so; ``full`` all weights, of a CLIP those of the image tower;
            ``tangent`` those, the whole network expanded to first order. With ``weights``, a tangent method scores
            them linearized.
        rank: rank r of every adapter.
        lora_alpha: the adapter is scaled by ``lora_alpha / rank``.
        dropout: dropout on the adapter's input while training, 0..1.
        target_modules: names of the linear layers to adapt; the backbone's q and v projections by default.
        learning_rate: peak learning rate of AdamW; by default one that suits the method.
        weight_decay: decoupled weight decay on what is trained.
        num_warmup_steps: steps of linear warm-up.
        lr_schedule: what follows the warm-up, ``cosine`` to zero over the run, or ``constant``.
        weights: folder or hub id of an adapter or a fused model, to ``validate``, ``test`` or ``predict`` with.
        samples_at_once: samples of several tasks that go through the network as one batch in a training step, at most,
            which is faster where it is small and takes memory as one batch of so many does; 0 takes task after task.
            ``auto`` is, for ``lora`` and ``l_lora`` on images on CPUs, so many as have 2^17 pixels (128 of 32 x 32),
            else 0.
        seed: seed of the initial adapter, of dropout, and written into every result row.
    """

    default_backbone: ClassVar[str]
    default_learning_rates: ClassVar[Mapping[str, float]]
    reads: ClassVar[Samples]
    """What samples it is trained and scored on."""
    task_type: ClassVar[str | None] = None
    """What PEFT calls the kind of model, written into adapters."""
    num_at_once: int = 0
    """Samples of all tasks that go through the network at once, known once there are adapters."""
    draws: bool = True

    def __init__(
        self,
        backbone: str | nn.Module | None = None,
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
        samples_at_once: AtOnce = "auto",
        seed: int = 42,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must lie in 0..1, got {dropout}")
        if learning_rate is None:
            learning_rate = self.default_learning_rates[method]
        check_optimization(learning_rate, weight_decay, num_warmup_steps)
        self.strict_loading = False
        self.method, self.rank, self.lora_alpha, self.dropout = method, rank, lora_alpha, dropout
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.num_warmup_steps, self.lr_schedule = num_warmup_steps, lr_schedule
        self.weights, self.seed = weights, seed
        self.samples_at_once = checked(samples_at_once)
        backbone = self.default_backbone if backbone is None else backbone
        self.backbone: KnownBackbone = load_backbone(backbone, causal=False) if isinstance(backbone, str) else backbone
        self.adaptation = make_adaptation(
            self.backbone,
            method,
            rank=rank,
            lora_alpha=lora_alpha,
            dropout=dropout,
            target_modules=target_modules,
            seed=seed,
            task_type=self.task_type,
        )
        self.application: Application = plain
        self.task_parameters: dict[str, list[nn.Parameter]] = {}
        self.point = ""
        self.loaded: LoadedWeights | None = None
        self.rows: list[Row] = []
        self._predicting = ExitStack()

    @property
    def resolved(self) -> dict[str, Any]:
        """The arguments whose defaults depend on the class or on other arguments, as they came out."""
        return {
            "backbone": self.backbone.name,
            "learning_rate": self.learning_rate,
            "target_modules": self.adaptation.target_modules,
        }

    # what a kind of model supplies

    @abstractmethod
    def prepare_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Build what each task needs beside the adapter, such as a zero-shot head. Called on the final device."""

    @abstractmethod
    def loss(self, task: str, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a batch under the active weights, a scalar."""

    @abstractmethod
    def metrics(self, task: str) -> MetricCollection:
        """Fresh metrics of a task, on this module's device."""

    @abstractmethod
    def score(self, task: str, batch: dict[str, Any], metrics: MetricCollection) -> None:
        """Predict a batch under the active weights and count it in ``metrics``."""

    def side_by_side(self, parts: Sequence[Mapping[str, Any]]) -> SideBySide | None:
        """The tasks' micro-batches as one batch; None where they go through the network one after another."""
        return None

    @property
    def samples_by_default(self) -> int:
        """How many samples of all tasks ``samples_at_once: auto`` takes at once."""
        return 0

    def task_settings(self, task: str) -> dict[str, Any]:
        """What decides the task's scores beside samples, weights and the network: metric, and prompts or answers."""
        return {"metrics": list(self.metrics(task))}

    def scoring_settings(self, task: str) -> dict[str, Any]:
        """What decides the task's scores beside samples and weights; its tasks are prepared."""
        return {
            "precision": self.precision,
            "dtype": str(next(self.base_model.parameters()).dtype),
            "backbone": self.backbone.settings,
            "task": self.task_settings(task),
        }

    # weights

    def setup(self, stage: str) -> None:
        """Make what is trained before the optimizer and the distributed wrapper see the module.

        Raises:
            InputError: float16 under a linearization, or all of training in it, a target that matches no layer, weights
                that do not fit, or tasks that cannot go through the network together where that is asked for.
        """
        if self.method in LINEARIZED_METHODS and str(self.trainer.precision).startswith("16"):
            raise InputError(
                f"trainer.precision {self.trainer.precision!r} with method {self.method!r}: linearization in float16 "
                f"overflows and underflows; use bfloat16 or float32 (bf16-mixed, bf16-true, 32)"
            )
        if stage == "fit" and str(self.trainer.precision) == "16-true":
            raise InputError(
                "trainer.precision '16-true': the second moments of AdamW underflow in float16; train with 16-mixed, "
                "bf16-mixed or 32"
            )
        if stage == "fit" and not self.task_parameters:
            self.add_adapters(list(self.trainer.datamodule.tasks))
            num_at_once(self)  # refuses before anything is written
        elif stage != "fit" and self.weights is not None:
            self.loaded = self._load(weights_folder(self.weights))

    def _load(self, folder: Path) -> LoadedWeights:
        """The weights in ``folder``; a tangent method linearizes what was trained otherwise."""
        loaded = load_weights(folder, self.base_model, base_name=self.backbone.name)
        trained = loaded.labels.get("method")
        if self.method not in LINEARIZED_METHODS or trained in LINEARIZED_METHODS:
            return loaded
        labels = {"method": f"{trained or 'given'}, linearized"}
        if isinstance(loaded.weights, MaskedVectors):
            return replace(loaded, weights=replace(loaded.weights, is_linearized=True), labels=loaded.labels | labels)
        if isinstance(loaded.weights, RoutedWeights):
            raise InputError(
                f"{str(folder)!r} has weights of its own for every sample, which do not act to first order; leave out "
                f"--model.method {self.method}"
            )
        return LoadedWeights(as_linearized(loaded.weights), loaded.labels | labels)

    def add_adapters(self, tasks: list[str]) -> None:
        """Make what is trained for each task: adapters from one seeded, hashed A₀, or copies of the weights.

        Raises:
            InputError: a target name matches no layer.
        """
        self.task_parameters = self.adaptation.add(tasks)
        self.point = point_hash(self.base_model)
        if self.injection is not None:
            self.adapted_base_hash = base_hash(self.base_model, self.injection.module_names)

    @property
    def injection(self) -> InjectionReport | None:
        """Which layers were adapted, once they are; None for methods without adapters."""
        return self.adaptation.report

    def activate(self, task: str | None) -> None:
        """Let what is trained for ``task`` act; None is the pretrained model."""
        self.application, self.active = self.adaptation.apply(task), task

    def output(self, call: Callable[[], Tensor]) -> Tensor:
        """What ``call`` computes by the backbone, one tensor, under the active weights."""
        return self.application(call)

    def finetuned(self, task: str) -> Weights:
        """A copy on the CPU of what is trained for ``task``: an adapter, or weights by the base's names.

        Where weights are split over processes, all of them must ask.
        """
        return self.adaptation.weights(task)

    def acts_linearly(self, finetuned: Mapping[str, Weights]) -> bool:
        """Whether a weighted sum of them gives that weighted sum of outputs, as :meth:`linear_outputs` needs.

        All are linearized, and no adapter acts on one of the layers of a tied tensor.
        """
        return all(is_linearized(weights) for weights in finetuned.values()) and not any(
            adapters.modules_of_tied_tensors(self.base_model, weights.factors)
            for weights in finetuned.values()
            if isinstance(weights, Adapter)
        )

    def linear_outputs(self, finetuned: Mapping[str, Weights]) -> LinearOutputs:
        """The outputs under any weighted sum of what was trained linearized for each task."""
        vectors = {task: task_vector_on_backbone(self.backbone, weights) for task, weights in finetuned.items()}
        return LinearOutputs(self.backbone, vectors)

    @contextmanager
    def use(self, weights: str | FusedWeights | Application | None) -> Iterator[None]:
        """Score under other weights: None is pretrained, a name what is trained for that task, else any weights.

        Everything is put back bit for bit at the end, the active task included.

        Args:
            weights: None, a task's name, an adapter, base weights by name, as they are or linearized, weights that are
                weighed anew for every sample, or what gives the outputs in the network's place.
        """
        before = self.active, self.application, adapters.active(self.base_model)
        try:
            if weights is None or isinstance(weights, str):
                self.activate(weights)
                yield
            elif isinstance(weights, MaskedVectors):
                raise InputError(
                    f"these weights are by task, of {name_list(weights.tasks)}: use those of one, "
                    f"fusionlab.weights_of(weights, task, module)"
                )
            elif callable(weights):
                self.activate(None)
                self.application = weights
                yield
            else:
                with applied(self.backbone, weights) as self.application:
                    yield
        finally:
            self.active, self.application = before[:2]
            adapters.activate(self.base_model, before[2])

    # training

    def train(self, mode: bool = True) -> Self:
        """As every module, but that BatchNorm of the base keeps its statistics, which all tasks share."""
        super().train(mode)
        for layer in self.base_model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        return self

    def on_fit_start(self) -> None:
        """Prepare the tasks on the device; everything trains as it would in plain PyTorch, dropout included."""
        self.prepare_tasks(self.trainer.datamodule.tasks)
        self.num_at_once = num_at_once(self)
        self.train()
        dtypes = {parameter.dtype for parameters in self.task_parameters.values() for parameter in parameters}
        if torch.bfloat16 in dtypes:
            _log.warning(
                "what is trained is bfloat16: a step that moves a weight by less than 1/256 of it is lost; take "
                "trainer.precision bf16-mixed or 32, and dtype bfloat16 for adapters' bases alone"
            )

    def training_step(self, batch: dict[str, dict[str, Any]], batch_idx: int) -> Tensor:
        """One micro-batch of every task; returns the summed loss, with the gradients already computed per task."""
        losses, parameters, gradients = {}, [], []
        for tasks in in_groups({task: len(part["index"]) for task, part in batch.items()}, self.num_at_once):
            seeds = [derive_seed(self.seed, "dropout", task, self._batches_before, self.global_rank) for task in tasks]
            of_tasks = losses_of(self, {task: batch[task] for task in tasks}, seeds)
            trained = [parameter for task in tasks for parameter in self.task_parameters[task]]
            gradients.append(gradients_of(list(of_tasks.values()), trained, self._loss_scale))
            torch.clear_autocast_cache()  # these tasks' weights in half precision, which no other task uses
            parameters += trained
            losses |= {task: loss.detach() for task, loss in of_tasks.items()}
        losses = mean_over_ranks(losses)
        self.log_dict({f"train/{task}/loss": loss for task, loss in losses.items()}, batch_size=1)
        self.log("train/learning_rate", self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"], batch_size=1)
        self._check_finite(losses)  # waits for the device, so after all else that the host can do
        total = torch.stack(list(losses.values())).sum()
        return WithGradients.apply(total, gradients, *parameters)

    @property
    def _loss_scale(self) -> float | None:
        """What losses are multiplied by, so that gradients do not underflow in float16; None elsewhere."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

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
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise InputError(
                "training has no end to lay the learning rate's schedule over: give max_steps or max_epochs"
            )
        groups = [{"params": parameters, "name": task} for task, parameters in self.task_parameters.items()]
        fused = self._loss_scale is None  # else gradients are divided by the scale before they are clipped
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_multiplier(step, self.num_warmup_steps, int(total_steps), self.lr_schedule),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, and drop the gradients, which would lie beside those of the next step until its backward."""
        super().optimizer_step(*args, **kwargs)
        self.optimizers(use_pl_optimizer=False).zero_grad()

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

    @property
    def trained_as(self) -> dict[str, Any]:
        """What decides what is trained, beside parameters and their start."""
        return {"method": self.method, "lora_alpha": self.lora_alpha}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained only, never the frozen backbone, and the hash of what adapters started from."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        kept |= {name for name in checkpoint["state_dict"] if ".lora_" in name or "lora_a0" in name}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        checkpoint["trained_as"] = self.trained_as
        if self.injection is not None:
            checkpoint["a0_hash"] = self.injection.a0_hash
        checkpoint["trained_on"] = {task: trained_on(self, task) for task in self.task_parameters}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on where tasks, settings, samples or base are others than those of the training so far."""
        check_same_training(self, checkpoint)
        self.check_trained_on(checkpoint, list(self.task_parameters), "the last checkpoint")

    def check_trained_on(self, checkpoint: Mapping[str, Any], tasks: Sequence[str], where: str) -> None:
        """Raise if tasks in a checkpoint were trained on other samples or another base than are here now.

        Raises:
            InputError: naming the tasks and what is another.
        """
        check_trained_on(self, checkpoint, tasks, where)

    # evaluation

    def on_test_start(self) -> None:
        """Prepare the tasks on the device."""
        self.prepare_tasks(self.trainer.datamodule.tasks)

    on_validation_start = on_test_start

    def on_predict_start(self) -> None:
        """Prepare the tasks and put the weights in; of masks those of the one task.

        Raises:
            InputError: masks, and not one task.
        """
        self.prepare_tasks(self.trainer.datamodule.tasks)
        tasks, weights = list(self.trainer.datamodule.tasks), None if self.loaded is None else self.loaded.weights
        if isinstance(weights, MaskedVectors):
            if len(tasks) != 1:
                raise InputError(
                    f"predict: these weights are of one task at a time, of {name_list(weights.tasks)}; got "
                    f"{name_list(tasks) or 'none'}: give one as data.tasks"
                )
            weights = weights_of(weights, tasks[0], self)
        self._predicting.enter_context(self.use(weights))

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
        labels = {"model": "pretrained", "seed": self.seed} if loaded is None else {"seed": None} | loaded.labels
        data, rows = self.trainer.datamodule, []
        for weights, tasks in acting(None if loaded is None else loaded.weights, list(data.tasks), self):
            with self.use(weights):
                rows += evaluate(self, data, tasks, split, **labels)
        self.log_dict({f"{split}/{row['task']}/{row['metric']}": row["value"] for row in rows}, batch_size=1)
        return keyed(rows, self, data)

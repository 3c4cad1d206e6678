"""Protocols of networks, modules, data and fine-tuned weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fusionlab.adapters import InjectionReport
from fusionlab.adapters.routed import FusedWeights
from fusionlab.adapters.weights import Weights
from fusionlab.samplers import Split

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Batch: TypeAlias = dict[str, Any]
"""Samples by what they are: ``index`` int64 ``(batch,)``, in evaluation ``mask`` bool ``(batch,)``, and inputs."""
Row: TypeAlias = dict[str, Any]
"""A result row."""
Application: TypeAlias = Callable[[Callable[[], Tensor]], Tensor]
"""Gives what a call computes by the network, one tensor, as weights act that are not in the network itself."""


class Backbone(Protocol):
    """A network in its base's weights θ₀, which fusion adds to."""

    @property
    def model(self) -> nn.Module:
        """The network whose parameter names weights have."""

    @property
    def name(self) -> str:
        """What the user called it: a name, a folder or a hub id; it goes into adapters and tables."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the outputs beside weights and samples, as JSON has it."""

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside full weights, such as a configuration."""


class Tokenizing(Protocol):
    """A backbone that reads texts."""

    @property
    def tokenizer(self) -> Any:
        """Of transformers."""


class Source(Protocol):
    """What holds fine-tuned weights θ_t of one base and method."""

    @property
    def backbone(self) -> Backbone:
        """The base."""

    @property
    def method(self) -> str:
        """How it fine-tunes, as rows and folders say it: ``full``, ``lora``, ..."""

    @property
    def adapted_base_hash(self) -> str | None:
        """Hash of the base weights that adapters change, where it was made before."""

    def finetuned(self, task: str) -> Weights:
        """A copy on the CPU of what was trained for ``task``: an adapter, or weights by the base's names.

        Where weights are split over processes, all of them must ask.
        """


class LinearOutputs(Protocol):
    """What a network gives for any weighted sum of linearized task vectors, from one run of it: f + Σ λ_t J τ_t."""

    def forget(self) -> None:
        """Another batch follows."""

    def parts(self, call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """``(f, {task: J τ})`` of what ``call`` computes by the network."""

    def at(self, coefficients: Mapping[str, float]) -> Application:
        """How the weights with these coefficients λ by task act while one batch is scored."""


class Module(Source, Protocol):
    """A ``LightningModule`` that trains some weights for each task, and scores any weights on any task.

    *Active* are the weights that act in :meth:`loss` and :meth:`score`; to begin with the base's.
    """

    task_parameters: dict[str, list[nn.Parameter]]
    """What is trained, by task; empty before :meth:`add_adapters`."""

    # what is trained

    def add_adapters(self, tasks: list[str]) -> None:
        """Make what is trained for each task; asked by ``setup`` of ``fit``, once."""

    def activate(self, task: str | None) -> None:
        """Let what is trained for ``task`` act, None the base; losses have a gradient in it."""

    @property
    def injection(self) -> InjectionReport | None:
        """Which layers were adapted; None before, or where there are no adapters."""

    def check_trained_on(self, checkpoint: Mapping[str, Any], tasks: Sequence[str], where: str) -> None:
        """Raise :class:`InputError` if ``tasks`` of a checkpoint were trained on something else than is here now."""

    def export(self, root: Path, tasks: list[str]) -> None:
        """Write into a run folder what was trained beside what is fused, such as heads; all processes call it."""

    # how it is scored

    @property
    def seed(self) -> int:
        """Goes into every row."""

    @property
    def precision(self) -> str:
        """What the trainer computes in, as its flag says it; ``32-true`` without one."""

    @property
    def device(self) -> torch.device:
        """Where batches are wanted."""

    @property
    def global_rank(self) -> int:
        """Of this process."""

    @property
    def base_model(self) -> nn.Module:
        """The backbone's network."""

    def prepare_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Build what tasks need beside weights, such as heads; asked on the final device, more than once."""

    def read_run(self, folders: Sequence[Path], tasks: Mapping[str, Any]) -> str:
        """Put in what :meth:`export` of a run wrote; returns its hash, empty for nothing."""

    def use(self, weights: str | FusedWeights | Application | None) -> AbstractContextManager[None]:
        """Let weights act within a block: a task's name, None for the base, or any; all is put back, bit for bit."""

    def loss(self, task: str, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def metrics(self, task: str) -> MetricCollection:
        """Fresh metrics of a task on this device, the one that means and choices are made by first.

        A ``MetricCollection`` of a list keeps its order, one of a mapping sorts the names: with several metrics give a
        list, or say which one counts (:class:`fusionlab.contracts.Choosing`).
        """

    def score(self, task: str, batch: Batch, metrics: MetricCollection) -> None:
        """Predict a batch and count it in ``metrics``, without the samples whose ``mask`` is False."""

    def scored_classes(self, task: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, num_classes)`` and labels ``(batch,)``; :class:`InputError` where there are no classes."""

    pads: bool
    """Whether samples of a batch are padded to one length, so that where padding must not count each is run alone."""

    def run_inputs(self, task: str, batch: Batch) -> None:
        """Run the network over a batch's inputs, with nothing of its labels; for what its layers read meanwhile."""

    def scoring_settings(self, task: str) -> Mapping[str, Any]:
        """What decides the task's scores beside samples and weights, as JSON has it; asked once tasks are prepared."""

    def ranking_settings(self, task: str) -> Mapping[str, Any]:
        """What decides :meth:`scored_classes` beside that: a search may look at it, however the task is scored."""

    def evaluation_context(self) -> AbstractContextManager[Any]:
        """The precision in which it is scored."""

    def acts_linearly(self, finetuned: Mapping[str, Weights]) -> bool:
        """Whether a weighted sum of these gives that weighted sum of outputs, as :meth:`linear_outputs` needs."""

    def linear_outputs(self, finetuned: Mapping[str, Weights]) -> LinearOutputs:
        """The outputs under any weighted sum of what was trained linearized for each task."""

    # what the commands write

    @property
    def resolved(self) -> Mapping[str, Any]:
        """Constructor arguments whose defaults depend on others, as they came out; they go into ``config.yaml``."""

    @property
    def rows(self) -> Sequence[Row]:
        """Of the last ``validate`` or ``test``, as :func:`fusionlab.evaluate` gives them."""

    # of every torch module

    training: bool

    def eval(self) -> nn.Module:
        """Evaluation mode."""

    def modules(self) -> Iterator[nn.Module]:
        """All parts."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by name."""


class ImageEncoder(Backbone, Protocol):
    """A backbone that encodes images."""

    def image_features(self, images: Tensor) -> Tensor:
        """Features of uint8 images, shape ``(batch, dim)``."""


class Headed(Module, Protocol):
    """A module that scores images by a frozen head for each task on what its backbone gives."""

    @property
    def backbone(self) -> ImageEncoder:
        """The base."""

    @property
    def heads(self) -> Mapping[str, Tensor]:
        """By task, unit rows ``(num_classes, dim)``."""

    def full_precision(self) -> AbstractContextManager[Any]:
        """Autocast off, in which heads act."""


class Data(Protocol):
    """A ``LightningDataModule`` with some tasks, each with the splits ``train``, ``validation`` and ``test``.

    Its training batches are ``{task: batch}``, one micro-batch of every task.
    """

    training_tasks: list[str] | None
    """Tasks to train where it is not all of them: the others were trained by earlier jobs."""

    @property
    def task_names(self) -> Sequence[str]:
        """The tasks in order, known before ``setup``."""

    @property
    def tasks(self) -> Mapping[str, Any]:
        """What the module reads of each task, by name; set up."""

    @property
    def splits(self) -> Mapping[str, Mapping[str, Split]]:
        """By task and split; set up."""

    @property
    def batch_size(self) -> int:
        """Samples of each task in a training batch of one process."""

    @property
    def eval_batch_size(self) -> int:
        """Samples in an evaluation batch at most."""

    def eval_batches(self, task: str, split: str, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """A rank's evaluation batches, each sample once over all ranks, with ``mask`` False on padding."""

    def num_eval_batches(self, task: str, split: str) -> int:
        """Number of evaluation batches over all ranks."""

    def shown_samples(self, task: str) -> list[str]:
        """Some training samples as text, for users to look at; none where a sample is no text."""

"""``fit --dry_run``: a fit by its own code up to the first step, then what it would do and the memory it would take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fusionlab.callbacks.attached import attached
from fusionlab.contracts import Data, Module
from fusionlab.evaluation.loop import to_device
from fusionlab.memory import peak_bytes

_ADAM = 3  # gradient and two moments beside each trained value
_NOT_YET = "not yet checked: whether losses stay finite, and what rules refuse for the values that will be trained"


class DryRunEnds(Exception):  # noqa: N818
    """The fit has come to its first step, which a dry run does not take."""


class DryRun(Callback):
    """Ends a fit before its first step: data, tasks, adapters and rules are checked by the code of the run by then.

    One micro-batch of each task goes forward and backward, so that what activations take is measured; nothing is
    updated, and no run folder is begun.

    Args:
        folder: the run folder that would be written.
        state: what was found there.
    """

    def __init__(self, folder: str, state: str) -> None:
        self.folder, self.state = folder, state

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell, and end the fit.

        Raises:
            DryRunEnds: always.
        """
        self.end(trainer, pl_module, self._first_losses(trainer, attached(trainer, pl_module)[0]))

    def end(self, trainer: Trainer, pl_module: LightningModule, losses: Mapping[str, float]) -> None:
        """Tell what the fit would do, with the loss of the first batch of what it would train.

        Raises:
            DryRunEnds: always.
        """
        module, data = attached(trainer, pl_module)
        if trainer.is_global_zero:
            print("\n".join([*self._plan(trainer, module, data, losses), *_samples(data), _NOT_YET]))
        raise DryRunEnds

    def _plan(self, trainer: Trainer, module: Module, data: Data, losses: Mapping[str, float]) -> list[str]:
        steps = trainer.estimated_stepping_batches if losses else 0
        verb = "would go on with" if self.state == "unfinished" else "would write"
        lines = [f"fit of {module.backbone.name} by {module.method}: {verb} {self.folder}, {steps} updates"]
        for task in data.tasks:
            sizes = ", ".join(f"{len(split)} {name}" for name, split in data.splits[task].items())
            trained = f"loss of the first batch {losses[task]:.3f}" if task in losses else "trained by an earlier job"
            lines.append(f"  {task}: {sizes}; {trained}")
        trained = {id(value): value for values in module.task_parameters.values() for value in values}
        frozen = [value for value in module.parameters() if id(value) not in trained]
        shown = (
            f"weights {_size(_bytes(frozen))}",
            f"{sum(value.numel() for value in trained.values()):,} trained values with gradients and AdamW's moments "
            f"{_size(_bytes(trained.values()) * (1 + _ADAM))}",
            f"most used so far, one micro-batch of each task included, {_size(_peak(module.device))}",
        )
        return [*lines, f"memory of each process: {'; '.join(shown)}"]

    def _first_losses(self, trainer: Trainer, module: Module) -> dict[str, float]:
        """The loss of each task's first micro-batch, after a backward pass whose gradients are dropped."""
        found = {}
        batch = next(iter(trainer.train_dataloader))
        with trainer.precision_plugin.train_step_context():
            for task, part in batch.items():
                module.activate(task)
                loss = module.loss(task, to_device(part, module.device))
                trained = [value for value in module.task_parameters[task] if value.requires_grad]
                torch.autograd.grad(loss, trained, allow_unused=True)
                found[task] = float(loss.detach())
        return found


class NothingToTrain(Callback):
    """Ends a dry run whose tasks are all trained, where training would begin; before any callback that writes."""

    def __init__(self, dry_run: DryRun) -> None:
        self.dry_run = dry_run

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell, and end the fit.

        Raises:
            DryRunEnds: always.
        """
        self.dry_run.end(trainer, pl_module, {})


def around(callbacks: Sequence[Callback], dry_run: DryRun) -> list[Callback]:
    """``callbacks`` with those of a dry run: one before all that write, and one after all that check."""
    return [NothingToTrain(dry_run), *callbacks, dry_run]


def _samples(data: Data) -> list[str]:
    """The first training samples of tasks that show theirs."""
    lines = []
    for task in data.tasks:
        for number, sample in enumerate(data.shown_samples(task)):
            lines += [f"{task}, training sample {number}, what is learnt in ⟦ ⟧:", *sample.splitlines()]
    return lines


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

"""All fused tangent models at once: they are linear in what the network gives, so one pass per task vector will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusionlab.adapters.weights import Weights
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.contracts import Batch, Data, Headed, LinearOutputs, Module, Row, has_heads
from fusionlab.evaluation.loop import Acting, count_batches
from fusionlab.evaluation.rows import rows_of
from fusionlab.evaluation.scores import Scored, score
from fusionlab.fusion.finetuned import Finetuned

Sum: TypeAlias = tuple[Mapping[str, float], Sequence[str], Mapping[str, Any]]
"""A weighted sum of task vectors to score: λ by task, the tasks to score it on, and fields of its rows."""
LOGITS_AT_ONCE = 1 << 24  # elements of candidates x samples x classes in flight


class TangentOutputs:
    """The logits' parts of tangent models on the data: f(x; θ₀) and J(θ₀)·τ_t, each through the task's head.

    A fused model's features are f + Σ λ_t J τ_t; their normalisation and the temperature are positive factors, which
    leave the first of the largest logits where it is. Parts are computed once per task and split and kept.

    Args:
        module: a prepared module with zero-shot heads, without adapters of its own.
        data: a data module that is set up.
        finetuned: linearized task vectors.
    """

    def __init__(self, module: Headed, data: Data, finetuned: Finetuned) -> None:
        self._module, self._data, self._finetuned = module, data, finetuned
        self._known: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        self.tasks = tuple(data.tasks)
        self.passes = 0.0

    def pays(self, candidates: Mapping[str, Sum]) -> bool:
        """Always: what is computed is kept."""
        return True

    @torch.no_grad()
    def score(
        self,
        candidates: Mapping[str, Sum],
        split: str,
        *,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[str, list[Row]]:
        """Rows of fused models by name.

        Args:
            candidates: by name.
            split: ``validation`` or ``test``.
            on_batch: called after each task with the number of candidates scored.
        """
        rows: dict[str, list[Row]] = {name: [] for name in candidates}
        common = {"precision": self._module.precision}
        for task in self._data.tasks:
            names = [name for name, (_, tasks, _) in candidates.items() if task in tasks]
            if not names:
                continue
            lambdas = torch.tensor(
                [[1.0, *(candidates[name][0].get(t, 0.0) for t in self._finetuned.tasks)] for name in names]
            )
            parts, labels, mask = self._parts(task, split)
            predictions = _predictions(lambdas.to(parts), parts)
            for name, predicted in zip(names, predictions, strict=True):
                metrics = self._module.metrics(task)
                metrics.update(predicted, labels, mask)
                rows[name] += rows_of(
                    task, split, metrics, self._data.splits[task][split], common | dict(candidates[name][2])
                )
            if on_batch is not None:
                on_batch(len(names))
        return rows

    def _parts(self, task: str, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """``(num_tasks + 1, samples, classes)``, labels and mask ``(samples,)``."""
        if (task, split) not in self._known:
            self._known[task, split] = self._compute(task, split)
            self.passes += len(self._finetuned.tasks) + 1
        return self._known[task, split]

    def _compute(self, task: str, split: str) -> tuple[Tensor, Tensor, Tensor]:
        module, backbone = self._module, self._module.backbone
        linear = module.linear_outputs(self._finetuned.weights)

        def begin(task: str) -> list[tuple[Tensor, Tensor, Tensor]]:
            return []

        def keep(task: str, batch: Batch, kept: list[tuple[Tensor, Tensor, Tensor]]) -> None:
            base, outputs = linear.parts(lambda: backbone.image_features(batch["images"]))
            features = torch.stack([base, *outputs.values()])
            with module.full_precision():
                logits = features @ module.heads[task].to(features).T
            kept.append((logits, batch["labels"], batch["mask"]))

        batches = partial(self._data.eval_batches, split=split)
        found = count_batches(module, {"": Acting([task])}, batches, begin, keep, tasks=[task])
        parts, labels, masks = zip(*found[""][task], strict=True)
        return torch.cat(parts, dim=1), torch.cat(labels), torch.cat(masks)


def linear_tasks(module: Module, tasks: Iterable[str], finetuned: Mapping[str, Weights]) -> tuple[str, ...]:
    """The tasks on which weighted sums act linearly: where the weights do, those whose answers are not generated."""
    if not module.acts_linearly(finetuned):
        return ()
    return tuple(task for task in tasks if set(module.metrics(task)) == {"accuracy"})


def score_linear_sums(
    module: Module,
    data: Data,
    finetuned: Mapping[str, Weights],
    candidates: Mapping[str, Sum],
    split: str,
    *,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, list[Row]]:
    """The rows that :func:`fusionlab.evaluate` would give for each Σ λ_t τ_t, all from one pass per task vector.

    To float rounding; on all ranks together. Only for :func:`linear_tasks`.

    Args:
        module: a prepared module, with or without adapters of its own.
        data: a data module that is set up.
        finetuned: linearized, by task.
        candidates: by name.
        split: ``validation`` or ``test``.
        on_batch: called after each batch of this rank.
    """
    outputs = module.linear_outputs({task: finetuned[task] for task in _acting(candidates) or list(finetuned)[:1]})
    models = {
        name: Scored(Acting(tasks, partial(sum_of, module, outputs, by_task)), labels)
        for name, (by_task, tasks, labels) in candidates.items()
    }
    advance = (lambda models: None) if on_batch is None else (lambda models: on_batch())
    return score(module, data, models, split, before_batch=outputs.forget, on_batch=advance)


def sum_of(module: Module, outputs: LinearOutputs, by_task: Mapping[str, float]) -> AbstractContextManager[None]:
    """Let Σ λ_t τ_t act on the batch whose outputs are known."""
    return module.use(outputs.at(by_task))


def _acting(candidates: Mapping[str, Sum]) -> list[str]:
    """The tasks whose vectors have a coefficient that is not zero, in order."""
    return list(
        dict.fromkeys(task for by_task, _, _ in candidates.values() for task, value in by_task.items() if value)
    )


class LinearSums:
    """Fused tangent models scored together where there are no heads on features, batch by batch.

    Outputs may be large, such as the logits of a vocabulary, so they are not kept: each call passes over the data
    again, once per task vector that has a coefficient, for all candidates that it is given.

    Args:
        module: a prepared module, without adapters of its own.
        data: a data module that is set up.
        finetuned: linearized task vectors.
    """

    def __init__(self, module: Module, data: Data, finetuned: Finetuned) -> None:
        self._module, self._data, self._finetuned = module, data, finetuned
        self.tasks = linear_tasks(module, data.tasks, finetuned.weights)
        self.passes = 0.0

    def pays(self, candidates: Mapping[str, Sum]) -> bool:
        """Whether one pass per task vector costs no more than one per candidate."""
        return len(_acting(candidates)) <= len(candidates)

    def score(self, candidates: Mapping[str, Sum], split: str) -> dict[str, list[Row]]:
        """Rows of fused models by name, as :func:`score_linear_sums` gives them."""
        scored = {task for _, tasks, _ in candidates.values() for task in tasks}
        self.passes += len(scored) * max(1, len(_acting(candidates)))  # the base comes with the first task vector
        return score_linear_sums(self._module, self._data, self._finetuned.weights, candidates, split)


def tangent_shortcut(module: Module, data: Data, finetuned: Finetuned) -> TangentOutputs | LinearSums | None:
    """What scores weighted sums of these models together, on its ``tasks``; None where they are not linearized.

    It holds all task vectors on the module's device while it scores.
    """
    if not module.acts_linearly(finetuned.weights):
        return None
    return TangentOutputs(module, data, finetuned) if has_heads(module) else LinearSums(module, data, finetuned)


def _predictions(lambdas: Tensor, parts: Tensor) -> Tensor:
    """The predicted label of every candidate and sample, int64, shape ``(candidates, samples)``."""
    _, samples, classes = parts.shape
    flat = parts.flatten(1)
    step = max(1, LOGITS_AT_ONCE // (samples * classes))
    return torch.cat([lowest_argmax((rows @ flat).view(-1, samples, classes)) for rows in torch.split(lambdas, step)])

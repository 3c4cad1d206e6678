"""All fused tangent models at once: they are linear in what the network gives, so one pass per task vector will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusionlab.candidates.finetuned import Finetuned
from fusionlab.evaluation import Row, evaluating, rank_and_world_size, rows_of, to_device
from fusionlab.linearize import autocast_dtype, tangent_outputs
from fusionlab.metrics import lowest_argmax
from fusionlab.weights import Weights, is_linearized

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

    def __init__(self, module: Any, data: Any, finetuned: Finetuned) -> None:
        self._module, self._data, self._finetuned = module, data, finetuned
        self._known: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        self.passes = 0.0

    @staticmethod
    def applies(module: Any, finetuned: Finetuned) -> bool:
        """Whether the shortcut is exact here: linearized weights and heads on features."""
        return finetuned.is_linearized and bool(getattr(module, "heads", None))

    @torch.no_grad()
    def score(
        self,
        candidates: Mapping[str, tuple[Mapping[str, float], Sequence[str], Mapping[str, Any]]],
        split: str,
        *,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[str, list[Row]]:
        """Rows of fused models by name; each is given as (λ by task, tasks to score, labels).

        Args:
            candidates: by name.
            split: ``validation`` or ``test``.
            on_batch: called after each task with the number of candidates scored.
        """
        rows: dict[str, list[Row]] = {name: [] for name in candidates}
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
                rows[name] += rows_of(task, split, metrics, self._data.splits[task][split], dict(candidates[name][2]))
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
        own = dict(backbone.named_parameters())
        actual_names = {actual.removeprefix("model.").replace(".base_layer.", "."): actual for actual in own}
        names = {name: actual_names[name] for name in self._finetuned.names if name in actual_names}
        point = {actual: own[actual].detach() for actual in names.values()}
        tangents = {}
        for each in self._finetuned.tasks:
            task_vector = self._finetuned.task_vector(each)
            tangents[each] = {
                actual: task_vector[name].to(own[actual]) if name in task_vector else torch.zeros_like(own[actual])
                for name, actual in names.items()
            }
        parts, labels, masks = [], [], []
        module.eval()
        with module.evaluation_context():
            for batch in self._data.eval_batches(task, split):
                batch = to_device(batch, module.device)
                images, dtype = batch["images"], autocast_dtype(point)
                base, outputs = tangent_outputs(
                    lambda images=images: backbone.image_features(images), backbone, point, tangents, dtype=dtype
                )
                features = torch.stack([base, *outputs.values()])
                parts.append(features.float() @ module.heads[task].float().T)
                labels.append(batch["labels"])
                masks.append(batch["mask"])
        return torch.cat(parts, dim=1), torch.cat(labels), torch.cat(masks)


def sums_are_linear(module: Any, tasks: Iterable[str], finetuned: Mapping[str, Weights]) -> bool:
    """Whether weighted sums act linearly on what is scored: linearized weights, and answers that are not generated."""
    linearized = all(is_linearized(weights) for weights in finetuned.values())
    return linearized and all(set(module.metrics(task)) == {"accuracy"} for task in tasks)


@torch.no_grad()
def score_linear_sums(
    module: Any,
    data: Any,
    finetuned: Mapping[str, Weights],
    sums: Sequence[Mapping[str, float]],
    split: str,
    *,
    on_batch: Callable[[], None] | None = None,
) -> list[list[Row]]:
    """The rows that :func:`fusionlab.evaluate` would give for each Σ λ_t τ_t, all from one pass per task vector.

    To float rounding; on all ranks together. Only where :func:`sums_are_linear`.

    Args:
        module: a prepared module, with or without adapters of its own.
        data: a data module that is set up.
        finetuned: linearized, by task.
        sums: λ by task, one mapping for each fused model.
        split: ``validation`` or ``test``.
        on_batch: called after each batch of this rank.
    """
    rank, world_size = rank_and_world_size()
    outputs = module.linear_outputs(finetuned)
    rows: list[list[Row]] = [[] for _ in sums]
    with evaluating(module):
        for task in data.tasks:
            metrics = [module.metrics(task) for _ in sums]
            for batch in data.eval_batches(task, split, rank=rank, world_size=world_size):
                outputs.forget()
                batch = to_device(batch, module.device)
                for coefficients, counted in zip(sums, metrics, strict=True):
                    with module.use(outputs.at(coefficients)):
                        module.score(task, batch, counted)
                if on_batch is not None:
                    on_batch()
            for found, counted in zip(rows, metrics, strict=True):
                found += rows_of(task, split, counted, data.splits[task][split], {})
    return rows


def _predictions(lambdas: Tensor, parts: Tensor) -> Tensor:
    """The predicted label of every candidate and sample, int64, shape ``(candidates, samples)``."""
    _, samples, classes = parts.shape
    flat = parts.flatten(1)
    step = max(1, LOGITS_AT_ONCE // (samples * classes))
    return torch.cat([lowest_argmax((rows @ flat).view(-1, samples, classes)) for rows in lambdas.split(step)])

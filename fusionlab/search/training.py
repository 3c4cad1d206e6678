"""What models do on training inputs, whose labels nothing here reads: what layers read, and gradients of predictions.

Every process runs the same samples in the same batches, so that all find the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from fusionlab.adapters import base_state
from fusionlab.adapters.routed import RoutedWeights
from fusionlab.contracts import Batch, Data, Module
from fusionlab.data.chat.split import PackedSplit
from fusionlab.engine.planning import AVERAGED
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation.loop import in_evaluation_mode, to_device
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.rules.routed import RoutedMlps
from fusionlab.rules.settings import stack_and_index
from fusionlab.samplers import Split, derive_seed
from fusionlab.search.layers import Block, Grams, LinearLayers
from fusionlab.search.mlps import Mlp, mlps_of
from fusionlab.tensors.state import State

BATCH = 32  # inputs that need no padding; not the data's batch size, which would move sums by rounding


class TrainingRuns:
    """Fine-tuned and fused models on the tasks' training inputs.

    Args:
        finetuned: the fine-tuned weights.
        module: a module whose tasks are prepared.
        data: a data module that is set up.

    Raises:
        InputError: weights that act to first order about the base only, or the factors of adapters fused apart.
    """

    def __init__(self, finetuned: Finetuned, module: Module, data: Data) -> None:
        self._finetuned, self._module, self._data = finetuned, module, data
        self._grams: dict[tuple[str, int], Grams] = {}
        self._squares: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        self.cost = 0.0
        """Passes over the training splits so far, counting tasks alike whatever their size."""
        if finetuned.is_linearized:
            raise InputError(TO_FIRST_ORDER.format(what="these weights"))
        if finetuned.space == "factor":
            raise InputError("factor space needs a weighted sum of A and B; use delta_weight space")

    def units(self, tasks: Sequence[str] | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that the models of some tasks, by default of all, have changed, by name on disk."""
        inputs = self._finetuned.inputs(tasks or self._finetuned.tasks)
        return {
            name: info.shape
            for name, info in inputs.units.tensors.items()
            if name in inputs.touched and info.dtype.is_floating_point
        }

    def linear_units(self, tasks: Sequence[str]) -> list[str]:
        """Those of the units that linear layers multiply, and nothing else."""
        return [unit for unit in self.units(tasks) if unit in self.layers.units]

    def is_transposed(self, unit: str) -> bool:
        """Whether the weight of a linear layer is stored ``(in, out)``."""
        return self.layers.units[unit].transposed

    @property
    def num_tasks(self) -> int:
        """Of all models."""
        return len(self._finetuned.tasks)

    @property
    def num_elements(self) -> int:
        """Of all units."""
        return sum(map(math.prod, self.units().values()))

    @property
    def gram_bytes(self) -> int:
        """Of the Gram matrices of all layers and tasks."""
        return self.num_tasks * self.layers.gram_bytes

    @cached_property
    def layers(self) -> LinearLayers:
        """The linear layers that any model has changed."""
        return LinearLayers(self._module.base_model, self._finetuned.base.layout, set(self.units()))

    def task_vector(self, task: str) -> dict[str, Tensor]:
        """τ by unit, float32, on the CPU, without integers."""
        known, vector = self.units(), self._finetuned.inputs(self._finetuned.tasks).task_vector(task)
        return {name: value for name, value in vector.items() if name in known}

    def num_samples(self, tasks: Sequence[str], limit: int, split: str = "train") -> int:
        """Samples that are run of the tasks, of each one ``limit`` at most."""
        return sum(min(limit, len(self._split(task, split))) for task in tasks)

    @property
    def device(self) -> torch.device:
        """The module's."""
        return self._module.device

    def mlps(self, tasks: Sequence[str] | None = None) -> dict[str, Mlp]:
        """The MLPs that the models of some tasks, by default of all, have changed, by name in memory.

        Raises:
            InputError: there is none.
        """
        names = {on_disk: name for name, on_disk in self._finetuned.base.layout.names.items()}
        changed = [names.get(unit, unit).removesuffix(".weight") for unit in self.units(tasks)]
        return mlps_of(self._module.base_model, changed)

    @contextmanager
    def routed(self, rule: RoutedMlps, split: str) -> Iterator[Callable[[str, int, int], Tensor]]:
        """Within the block the model of ``rule`` acts, in evaluation mode.

        Args:
            rule: with routers on the module's device.
            split: whose inputs are run.

        Yields:
            the scores of the classes, ``(batch, classes)``, of a task's next inputs, by step and their number: a fixed
            order, round and round; differentiable in the routers.
        """
        weights = self._finetuned.inputs(rule.tasks).fuse(rule).weights
        assert isinstance(weights, RoutedWeights)
        order = {task: drawn_order(task, len(self._split(task, split))) for task in rule.tasks}

        def logits(task: str, step: int, size: int) -> Tensor:
            samples = self._split(task, split)
            chosen = order[task][(torch.arange(size) + step * size) % len(samples)]
            self._count(task, len(chosen), samples)
            batch = to_device(samples.batch(chosen), self._module.device)
            return self._module.scored_classes(task, batch)[0]

        with torch.enable_grad(), in_evaluation_mode(self._module), self._module.use(weights):
            yield logits

    def _count(self, task: str, size: int, samples: Split) -> None:
        """Passes count tasks alike, whatever their size."""
        self.cost += size / len(samples) / len(self._data.tasks)

    def expert_grams(self, task: str, limit: int) -> Grams:
        """G of every linear layer under the task's own model on its own inputs; found once."""
        if (task, limit) not in self._grams:
            self._grams[task, limit] = self.grams(task, self.task_vector(task), limit, self.layers.units)
        return self._grams[task, limit]

    def grams(self, task: str, task_vector: State, limit: int, units: Collection[str]) -> Grams:
        """G of what the linear layers of ``units`` read, while a model runs over inputs of the task.

        Args:
            task: the task.
            task_vector: what moves the base, by unit.
            limit: inputs at most.
            units: of the layers.
        """
        with self.layers.reading(units) as reading, torch.no_grad(), self._acting(task_vector):
            for batch in self._batches(task, limit):
                self._module.run_inputs(task, batch)
        return reading.grams(self.layers, units)

    def expert_squared_gradients(self, task: str, limit: int, seed: int) -> dict[str, Tensor]:
        """The mean over inputs x of (∂ log p(y|x) / ∂θ)² under the task's own model, each y drawn from p(y|x).

        One forward and one backward pass an input; sums in float64; found once.

        Args:
            task: with classes, or label words among which y is.
            limit: inputs at most.
            seed: of the draws.

        Returns:
            by unit, float64, on the CPU.
        """
        key = task, limit, seed
        if key not in self._squares:
            self._squares[key] = self._squared_gradients(*key)
        return self._squares[key]

    def _squared_gradients(self, task: str, limit: int, seed: int) -> dict[str, Tensor]:
        device = self._module.device
        own = self.task_vector(task)
        vector = {
            name: (own[name].to(device) if name in own else torch.zeros(shape, device=device)).requires_grad_()
            for name, shape in self.units().items()
            if not name.endswith(AVERAGED)
        }
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in vector.items()}
        draws, count = torch.Generator().manual_seed(derive_seed("fisher", seed, task)), 0
        statistics = {name: value for name, value in own.items() if name.endswith(AVERAGED)}
        with torch.enable_grad(), self._acting(vector | statistics):
            for batch in self._batches(task, limit, alone=True):
                log_p = self._module.scored_classes(task, batch)[0][0].float().log_softmax(-1)
                drawn = torch.multinomial(log_p.detach().cpu().double().exp(), 1, generator=draws)
                gradients = torch.autograd.grad(log_p[drawn.item()], list(vector.values()), allow_unused=True)
                for name, gradient in zip(vector, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.detach().double().square()
                count += 1
        return {name: (each / max(1, count)).cpu() for name, each in sums.items()}

    def blocks(self, tasks: Sequence[str]) -> list[Block]:
        """The parts of the network with linear layers, in the order in which an input of the first task meets them.

        Raises:
            InputError: a linear layer was trained, and neither it nor its block runs.
        """
        of = {unit: _block_of(unit) for unit in self.units(tasks)}
        linear = self.linear_units(tasks)
        with self.layers.reading(linear) as reading, torch.no_grad(), self._acting({}):
            for batch in self._batches(tasks[0], 1):
                self._module.run_inputs(tasks[0], batch)
        keys = dict.fromkeys(map(_block_of, reading.order))
        check_ran(unit for unit in linear if _block_of(unit) not in keys)
        found = []
        for key in keys:
            units = tuple(unit for unit, own in of.items() if own == key)
            found.append(Block(tuple(unit for unit in units if unit in linear), units))
        return found

    @contextmanager
    def _acting(self, task_vector: State) -> Iterator[None]:
        """The base moved by a task vector, in evaluation mode."""
        own = base_state(self._module.base_model)
        placed = {name: value.to(self._module.device) for name, value in task_vector.items()}
        with in_evaluation_mode(self._module), self._module.use(self._finetuned.moved(own, placed)):
            yield

    def _batches(self, task: str, limit: int, *, alone: bool = False) -> Iterator[Batch]:
        """A fixed choice of training samples, in batches that need no padding: of one sample where lengths differ."""
        split = self._split(task)
        draw = torch.Generator().manual_seed(derive_seed("training inputs", task))
        chosen = torch.randperm(len(split), generator=draw)[:limit].sort().values
        for indices in chosen.split(1 if alone or self._module.pads else BATCH):
            self._count(task, len(indices), split)
            yield to_device(split.batch(indices), self._module.device)

    def _split(self, task: str, name: str = "train") -> Split:
        return plain_split(self._data, task, name)


def plain_split(data: Data, task: str, name: str) -> Split:
    """A split by samples, also where several of them are trained on as one."""
    split = data.splits[task][name]
    return split.split if isinstance(split, PackedSplit) else split


def drawn_order(task: str, num_samples: int) -> Tensor:
    """A fixed order of a task's samples, int64, that has nothing of the order in which they are stored."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(derive_seed("inputs", task)))


def check_ran(idle: Iterable[str]) -> None:
    """Raise if there are linear layers that never ran.

    Raises:
        InputError: with their names.
    """
    if names := name_list(idle):
        raise InputError(
            f"{names}: trained, but no linear layer of it ran over the training inputs, so that what it reads is not "
            f"known; train layers that the model uses, or choose a rule that looks at no data"
        )


TO_FIRST_ORDER = (
    "{what} act to first order about the base only, so that what a layer reads or decides does not follow from them; "
    "fuse them by a rule that looks at no training inputs, or train with lora, l_lora or full"
)


def _block_of(unit: str) -> tuple[str, int] | str:
    """The block that a unit is in; outside of all blocks its own layer."""
    return stack_and_index(unit) or unit.rpartition(".")[0]

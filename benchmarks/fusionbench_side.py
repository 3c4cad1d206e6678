"""What ``bench_fusionbench_agreement.py`` gives to both sides, and how FusionBench's classes take it.

Its classes are given a pool of models in memory, of which each call gets a copy, since some work in place. A model is
the image tower under the names that files have (``vision_model.``), which transformers 5 no longer has in memory and
RegMean++ reads. Its CLIP classes are given the training images as they go into the network, our zero-shot heads, and
the base's projection. Its RegMean++ takes ``layer(...)[0]`` for what a layer gives, which in transformers 5 is the
first image of the batch: its layers get a hook that returns a tuple, as those of transformers 4 did.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from fusion_bench.method.emr_merging import EMRMerging
from fusion_bench.method.regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus, RegMeanAlgorithmPlusPlus
from fusion_bench.method.tall_mask import task_arithmetic as tall_mask_class
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.modelpool import CLIPVisionModelPool
from torch import Tensor, nn

from fusionlab import rules
from fusionlab.search.workbench import Workbench

State = dict[str, Tensor]
Fuser = Callable[["Inputs"], State]


class Tower(nn.Module):
    """The image tower as a part called ``vision_model``.

    Args:
        vision_model: of transformers.
    """

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def forward(self, images: Tensor) -> Any:
        """As the tower."""
        return self.vision_model(images)


class Pool(CLIPVisionModelPool):
    """Models in memory, and the images of each task with a label that nothing reads."""

    def __init__(self, models: Mapping[str, nn.Module], images: Mapping[str, Tensor]) -> None:
        super().__init__(dict(models))
        self._images = images

    def load_model(self, name: str, *args: Any, **kwargs: Any) -> nn.Module:
        """A copy."""
        return deepcopy(self._models[name])

    def load_train_dataset(self, name: str, *args: Any, **kwargs: Any) -> list[tuple[Tensor, int]]:
        """The images."""
        return [(image, 0) for image in self._images[name]]

    def load_processor(self, *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
        """None is needed."""
        return lambda image: image


class RegMeanPlusPlus(RegMeanAlgorithmForCLIPPlusPlus):
    """FusionBench's, whose constructor fails on its own ``_config_mapping``: a dict where its base has a bidict."""

    _config_mapping = RegMeanAlgorithmPlusPlus._config_mapping | {"_dataloader_kwargs": "dataloader_kwargs"}


@dataclass(frozen=True)
class Inputs:
    """What both sides get.

    Args:
        bench: our module and data.
        base: θ₀ of the image tower by name on disk.
        states: θ_t by task.
        tower: the base's.
        projection: the base's, from the tower to the space of the heads.
        temperature: what cosines are multiplied by.
        heads: by task, ``(classes, dim)``.
        images: of each task, ``(images, 3, height, width)``.
    """

    bench: Workbench
    base: State
    states: dict[str, State]
    tower: Tower
    projection: nn.Module
    temperature: Tensor
    heads: dict[str, Tensor]
    images: dict[str, Tensor]

    def double(self) -> Inputs:
        """All in float64 but our module, which :meth:`fused` turns to what is asked."""

        def of(tensors: Mapping[str, Tensor]) -> State:
            return {name: tensor.double() for name, tensor in tensors.items()}

        return replace(
            self,
            base=of(self.base),
            states={task: of(state) for task, state in self.states.items()},
            tower=deepcopy(self.tower).double(),
            projection=deepcopy(self.projection).double(),
            temperature=self.temperature.double(),
            heads=of(self.heads),
            images=of(self.images),
        )

    def fused(self, fuser: Fuser) -> State:
        """What ``fuser`` makes, with our module in the dtype of the states."""
        self.bench.module.to(self.temperature.dtype)
        return {name: tensor.detach() for name, tensor in fuser(self).items()}

    def first(self, count: int) -> Inputs:
        """Of the first tasks only."""
        return replace(self, states=dict(list(self.states.items())[:count]))

    @property
    def vectors(self) -> dict[str, State]:
        """τ_t by task."""
        return {task: {name: own[name] - self.base[name] for name in own} for task, own in self.states.items()}

    def model(self, state: State) -> Tower:
        """The tower with other weights."""
        tower = deepcopy(self.tower)
        tower.load_state_dict(state)
        return tower.requires_grad_()

    def pool(self, *, with_base: bool = True, as_tuples: bool = False) -> Pool:
        """The models as FusionBench takes them."""
        models = {task: self.model(state) for task, state in self.states.items()}
        if with_base:
            models["_pretrained_"] = self.model(self.base)
        for model in models.values() if as_tuples else []:
            for layer in model.vision_model.encoder.layers:
                layer.register_forward_hook(_as_tuple)
        return Pool(models, self.images)

    def log_p(self, model: Tower, task: str, images: Tensor) -> Tensor:
        """Log-probabilities of the classes, ``(images, classes)``."""
        features = self.projection(model(images)[1])
        unit = features / features.norm(dim=-1, keepdim=True)
        return (self.temperature * unit @ self.heads[task].T).log_softmax(-1)


def _as_tuple(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> tuple[Tensor]:
    return (output,)


def with_heads(algorithm: Any, inputs: Inputs) -> Any:
    """A CLIP class of FusionBench with our heads instead of those it would build from its own lists of classes."""
    algorithm.visual_projection, algorithm.logit_scale_exp = inputs.projection, inputs.temperature
    algorithm.zeroshot_weights = inputs.heads
    algorithm.setup_zero_shot_classification_head = lambda: None
    return algorithm


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what FusionBench prints and warns of."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


@contextlib.contextmanager
def drawing(masks: Iterator[Tensor]) -> Iterator[None]:
    """Within the block ``torch.rand_like`` gives these instead of draws: 1 keeps an entry, 0 drops it."""
    with mock.patch.object(torch, "rand_like", lambda like: next(masks).view_as(like)):
        yield


def by_class(algorithm: Callable[[], Any], seed: int = 0, **pool: Any) -> Fuser:
    """What an algorithm of FusionBench makes of the models; some take images in an order drawn with ``seed``."""

    def fuse(inputs: Inputs) -> State:
        torch.manual_seed(seed)
        with quiet():
            return algorithm().run(inputs.pool(**pool)).state_dict()

    return fuse


def by_task(states: dict[str, State]) -> State:
    """Each task's weights under one name each."""
    return {f"{task}: {name}": tensor for task, state in states.items() for name, tensor in state.items()}


def their_emr(inputs: Inputs) -> State:
    """Each task's weights, from an unmodulated model each: to change tasks adds and subtracts, which rounds."""
    found = {}
    with quiet():
        unmodulated = EMRMerging().run(inputs.pool())
        for task in inputs.states:
            model = deepcopy(unmodulated)
            model.set_task(task)
            found[task] = model.backbone.state_dict()
    return by_task(found)


def their_tall(inputs: Inputs) -> State:
    """Each task's weights by the masks of the class, which itself fails on that it subtracts tensors from parameters.

    It is called as the class calls it, on a state without parameters.
    """
    vectors, found = inputs.vectors, {}
    total = {name: sum(vector[name] for vector in vectors.values()) for name in inputs.base}
    for task, vector in vectors.items():
        with quiet():
            masks = tall_mask_class.generate_task_masks(total, vector, inputs.base, tall_mask_lambda=0.6)
        found[task] = {name: base + masks[name] * total[name] for name, base in inputs.base.items()}
    return by_task(found)


def their_flat_tall(inputs: Inputs) -> State:
    """Each task's weights by the masks of ``tall_mask.utils``, tensor by tensor."""
    found: dict[str, State] = {task: {} for task in inputs.states}
    for name, base in inputs.base.items():
        own = torch.stack([state[name].flatten() for state in inputs.states.values()])
        with quiet():
            masks = generate_task_masks(own - base.flatten(), own, base.flatten(), tall_mask_lambda=0.6)
        total = (own - base.flatten()).sum(0)
        for state, mask in zip(found.values(), masks, strict=True):
            state[name] = base + (mask * total).view_as(base)
    return by_task(found)


def with_our_draws(algorithm: Callable[[], Any]) -> Fuser:
    """One of DARE with the draws of ours."""

    def masks(inputs: Inputs) -> Iterator[Tensor]:
        rule = rules.Dare(rules.TaskArithmetic(1.0), drop_rate=0.5)
        for task, vector in inputs.vectors.items():
            for name, _ in inputs.tower.named_parameters():
                yield rule.masks(name, rules.TaskVectors((task,), vector[name].flatten()[None]))[0]

    def fuse(inputs: Inputs) -> State:
        with drawing(masks(inputs)):
            return by_class(algorithm)(inputs)

    return fuse

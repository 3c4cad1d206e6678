"""A module's active weights as a model of lm-eval's."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusionlab.backbones import CausalBackbone
from fusionlab.errors import InputError


class Scored(Protocol):
    """A module with a causal language model, as far as lm-eval asks it."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""

    @property
    def backbone(self) -> CausalBackbone:
        """The network in its base's weights."""

    @property
    def is_linearized(self) -> bool:
        """Whether the active weights act by the first order of the whole network, which has no cache."""

    def output(self, call: Callable[[], Tensor]) -> Tensor:
        """What ``call`` computes by the backbone under the active weights."""


class Handed(nn.Module):
    """What lm-eval holds in the place of a model of transformers'; the module itself stays as it is.

    Nothing is tied anew: under other weights the backbone's layers hold plain tensors.

    Args:
        module: the module.
    """

    def __init__(self, module: Scored) -> None:
        super().__init__()
        self.config, self.device = module.backbone.model.config, module.device
        self.given = (module,)  # not its part, so that nobody puts it into another mode

    def tie_weights(self) -> None:
        """Leave the weights as they are."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits, shape ``(batch, len, vocab)``."""
        (module,) = self.given
        return module.output(lambda: module.backbone.logits(input_ids))

    def generate(self, **arguments: Any) -> Tensor:
        """Transformers' own generation.

        Raises:
            InputError: the active weights are linearized over the whole network.
        """
        (module,) = self.given
        if module.is_linearized:
            raise InputError(
                "lm-eval generates by transformers' own loop, which whole-network tangents do not pass through; give "
                "tasks that rank answers or measure texts, or score the generated ones as tasks of ChatTasks"
            )
        return module.output(lambda: module.backbone.model.generate(**arguments))


@cache
def bridge_class() -> type:
    """lm-eval's class for models of transformers', whose logits are those of the module."""
    from lm_eval.models.huggingface import HFLM

    class Bridge(HFLM):  # type: ignore[misc]
        """As lm-eval's class, with a count of the documents whose tokens here are others than there.

        There a context and an answer are tokenized as one text, and cut where the context's own tokens would end;
        here no token spans the border.
        """

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.spanned: dict[str, set[int]] = {}

        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            with torch.no_grad():
                return self.model(inps)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            for request in requests:
                context, answer = request.args
                if context and self._spans(context, answer):
                    self.spanned.setdefault(request.task_name, set()).add(request.doc_id)
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _spans(self, context: str, answer: str) -> bool:
            own = self._encode_pair(context, answer)[0]
            return self.tok_encode(context + answer)[: len(own)] != own

    return Bridge


def bridged(module: Scored, batch_size: int) -> Any:
    """The module as a model of lm-eval's; its tokenizer is a copy, to which lm-eval may add a padding token."""
    with _without_notice():
        return bridge_class()(
            pretrained=Handed(module), tokenizer=copy.deepcopy(module.backbone.tokenizer), batch_size=batch_size
        )


@contextmanager
def _without_notice() -> Iterator[None]:
    """Leave out what lm-eval says of any model that was not made from a name."""
    log = logging.getLogger("lm_eval.models.huggingface")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)

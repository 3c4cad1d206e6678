"""Several samples in one row of a language model: how an architecture keeps them apart, found by trying it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fusionlab.errors import InputError

Apart = Literal["positions", "mask"]
_EXACT = 1e-3
_LONGEST = 24  # tokens of a sample that is tried; longer than a short window
Logits = Callable[[Tensor, Tensor | None, Apart], Tensor]


def find_apart(model: nn.Module, vocabulary: int, logits: Logits, name: str) -> Apart:
    """How samples of one row are kept apart: by restarted positions, or by an additive mask where these leak.

    Two samples are tried in a row, one of them longer than a short window: changing the first must move no logit of
    the second, in training mode too, and each must have the logits that it has alone.

    Args:
        model: the model; its parts' modes and the random states are put back.
        vocabulary: ids that it has.
        logits: of rows of ids by their positions (None for one sample a row), kept apart in a way.
        name: of the model.

    Raises:
        InputError: neither way is exact.
    """
    if "position_ids" in inspect.signature(model.forward).parameters:  # type: ignore[arg-type]
        for way in ("positions", "mask"):
            if _is_exact(model, vocabulary, logits, way):
                return way
    raise InputError(
        f"data.packing: {name!r}, a {type(model).__name__}, does not keep samples of one row apart, neither by their "
        f"positions nor by a mask; leave packing off"
    )


@torch.no_grad()
def _is_exact(model: nn.Module, vocabulary: int, logits: Logits, way: Apart) -> bool:
    device = next(model.parameters()).device
    first, other, second = (
        torch.arange(start, start + length, device=device).remainder(vocabulary)[None]
        for start, length in ((3, _LONGEST), (11, _LONGEST), (5, _LONGEST // 2))
    )
    positions = torch.cat([torch.arange(part.shape[1], device=device) for part in (first, second)])[None]
    flags = [(part, part.training) for part in model.modules()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for training in (False, True):
                model.train(training)
                found, moved = (
                    _seeded(logits, torch.cat([begin, second], dim=1), positions, way)[:, _LONGEST:]
                    for begin in (first, other)
                )
                if not _close([found], [moved]):
                    return False
            model.eval()
            together = logits(torch.cat([first, second], dim=1), positions, way).split([_LONGEST, second.shape[1]], 1)
            return _close(together, [logits(part, None, way) for part in (first, second)])
    finally:
        for part, was_training in flags:
            part.training = was_training


def _seeded(logits: Logits, ids: Tensor, positions: Tensor, way: Apart) -> Tensor:
    torch.manual_seed(0)  # the same dropout
    return logits(ids, positions, way)


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        bool((a.float().log_softmax(-1) - b.float().log_softmax(-1)).abs().max() < _tolerance(a))
        for a, b in zip(found, expected, strict=True)
    )


def _tolerance(logits: Tensor) -> float:
    return _EXACT if logits.dtype == torch.float32 else 1e-1

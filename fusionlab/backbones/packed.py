"""Several samples in one row of a language model: how an architecture keeps them apart, found by trying it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fusionlab.backbones.trying import tried
from fusionlab.errors import InputError

Apart = Literal["positions", "mask"]
_LEAST = 24  # tokens of a sample that is tried
Logits = Callable[[Tensor, Tensor | None, Apart], Tensor]


def find_apart(model: nn.Module, vocabulary: int, logits: Logits, name: str, longest: int) -> Apart:
    """How samples of one row are kept apart: by restarted positions, or by an additive mask where these leak.

    Two samples are tried in a row, the first one longer than the shortest window that a sample can be longer than:
    changing it must move no logit of the second, in training mode too, and each must have the logits that it has alone.
    Measure is what changing it moves where the two are one sample: a thousandth of that, or rounding.

    Args:
        model: the model; its parts' modes and the random states are put back.
        vocabulary: ids that it has.
        logits: of rows of ids by their positions (None for one sample a row), kept apart in a way.
        name: of the model.
        longest: tokens of the longest sample.

    Raises:
        InputError: neither way is exact.
    """
    if "position_ids" in inspect.signature(model.forward).parameters:  # type: ignore[arg-type]
        windows = [window + 8 for window in windows_of(model) if window < longest]
        length = max(_LEAST, min(windows, default=0))
        for way in ("positions", "mask"):
            if tried(partial(_is_exact, model, vocabulary, logits, way, length)):
                return way
    raise InputError(
        f"data.packing: {name!r}, a {type(model).__name__}, does not keep samples of one row apart, neither by their "
        f"positions nor by a mask; leave packing off"
    )


def windows_of(model: nn.Module) -> list[int]:
    """How many tokens back some of its layers see, as its configuration says."""
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    settings = text.to_dict()
    said = [settings.get(key) for key in ("sliding_window", "window_size", "attention_chunk_size")]
    return [window for window in said if isinstance(window, int) and window]


@torch.no_grad()
def _is_exact(model: nn.Module, vocabulary: int, logits: Logits, way: Apart, length: int) -> bool:
    device = next(model.parameters()).device
    first, other, second = (
        torch.arange(start, start + size, device=device).remainder(vocabulary)[None]
        for start, size in ((3, length), (11, length), (5, _LEAST // 2))
    )
    positions = torch.cat([torch.arange(part.shape[1], device=device) for part in (first, second)])[None]
    rows = [torch.cat([begin, second], dim=1) for begin in (first, other)]
    flags = [(part, part.training) for part in model.modules()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for training in (False, True):
                model.train(training)
                as_one = _difference(*(_seeded(logits, row, None, way)[:, length:] for row in rows))
                found, moved = (_seeded(logits, row, positions, way)[:, length:] for row in rows)
                if _difference(found, moved) > _allowed(found, as_one):
                    return False
            model.eval()
            together = logits(rows[0], positions, way).split([length, second.shape[1]], 1)
            alone = [logits(part, None, way) for part in (first, second)]
            return all(_difference(a, b) <= _allowed(a, as_one) for a, b in zip(together, alone, strict=True))
    finally:
        for part, was_training in flags:
            part.training = was_training


def _seeded(logits: Logits, ids: Tensor, positions: Tensor | None, way: Apart) -> Tensor:
    torch.manual_seed(0)  # the same dropout
    return logits(ids, positions, way)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Of log-likelihoods of tokens, at most."""
    return float((found.float().log_softmax(-1) - expected.float().log_softmax(-1)).abs().max())


def _allowed(logits: Tensor, as_one: float) -> float:
    """What may differ: a thousandth of what a sample moves, or what rounding of logits of this size and dtype does."""
    steps = 64 if logits.dtype == torch.float32 else 4
    rounding = steps * torch.finfo(logits.dtype).eps * max(1.0, float(logits.abs().max()))
    return max(1e-3 * as_one, rounding)

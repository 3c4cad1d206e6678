"""What ``fusion.json`` and rows say of masks, and how large they are beside what was fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusionlab.rules import Tall, TaskKnownRule
from fusionlab.tensors.lazy import TensorInfo


def masks_record(
    rule: TaskKnownRule,
    scales: Mapping[str, float],
    unified: Mapping[str, TensorInfo],
    masks: Mapping[str, TensorInfo],
    input_bytes: int,
) -> dict[str, Any]:
    """What ``fusion.json`` and rows say of masks: s_t, TALL's λ_t, bits an entry, bytes beside those of the inputs."""
    thresholds = {"thresholds": rule.thresholds(tuple(scales))} if isinstance(rule, Tall) else {}
    return {
        "scales": dict(scales),
        **thresholds,
        "bits_an_entry": len(scales),
        "unified_bytes": sum(info.nbytes for info in unified.values()),
        "mask_bytes": sum(info.nbytes for info in masks.values()),
        "input_bytes": input_bytes,
    }

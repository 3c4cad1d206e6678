"""What a folder of experts and routers is, and how large it is beside what was fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusionlab.layout import ROUTED, ROUTED_OWN

_HOW = """One model, whose {count} MLPs have weights of their own for every sample: a router weighs the task vectors by
what the MLP reads of that sample alone, whatever batch it is in; no task is told. All other weights are ordinary ones.
`{file}` has them and `{own}` says what is what. No stock library reads them: `fusionlab.load`, and `python -m fusionlab
test` and `predict` with `--model.weights`, do, on the base that they were made for.

Size: {sizes}."""


def how_to_read(record: Mapping[str, Any]) -> str:
    """Markdown for a card, from ``routed`` of ``fusion.json``."""
    return _HOW.format(count=record["num_mlps"], sizes=sizes_text(record), file=ROUTED, own=ROUTED_OWN)


def sizes_text(record: Mapping[str, Any]) -> str:
    """How large experts, routers and the rest are, and what they were made of.

    Example:
        >>> sizes_text({"expert_bytes": 8e6, "router_bytes": 1e6, "rest_bytes": 4e6, "input_bytes": 2e7})
        'experts 8.00 MB + routers 1.00 MB + the rest 4.00 MB = 13.00 MB; what was trained for all tasks 20.00 MB'
    """
    experts, routers, rest, inputs = (
        record[name] / 1e6 for name in ("expert_bytes", "router_bytes", "rest_bytes", "input_bytes")
    )
    return (
        f"experts {experts:,.2f} MB + routers {routers:,.2f} MB + the rest {rest:,.2f} MB = "
        f"{experts + routers + rest:,.2f} MB; what was trained for all tasks {inputs:,.2f} MB"
    )

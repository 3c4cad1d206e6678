"""What a folder of masks of one vector is, and how large it is beside what was fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusionlab.layout import FUSION, MASKS, UNIFIED

_HOW = """Each task has weights of its own, and the task of an input must be known. `{unified}` holds one vector u,
`{masks}` a mask M_t of one bit an entry for each of {count} tasks, `{fusion}` a number s_t each; the weights of task t
are base + s_t M_t u. No stock library reads them: `fusionlab.load`, and `python -m fusionlab test` and `predict` with
`--model.weights`, do. One full model of a task, which others read:

```
python -m fusionlab fuse --base BASE --finetuned '{{{task}: FOLDER}}' --rule average --save weights --output MODEL
```

Size: {sizes}."""


def how_to_read(record: Mapping[str, Any]) -> str:
    """Markdown for a card, from ``masks`` of ``fusion.json``."""
    files = {"unified": UNIFIED, "masks": MASKS, "fusion": FUSION}
    scales = record["scales"]
    return _HOW.format(count=len(scales), task=next(iter(scales)), sizes=sizes_text(record), **files)


def sizes_text(record: Mapping[str, Any]) -> str:
    """How large masks are, and what they were made of.

    Example:
        >>> sizes_text({"unified_bytes": 4_000_000, "mask_bytes": 250_000, "input_bytes": 8_000_000})
        'unified vector 4.00 MB + masks 0.25 MB = 4.25 MB; what was trained for all tasks 8.00 MB'
    """
    parts = [record[name] / 1e6 for name in ("unified_bytes", "mask_bytes", "input_bytes")]
    return (
        f"unified vector {parts[0]:,.2f} MB + masks {parts[1]:,.2f} MB = {parts[0] + parts[1]:,.2f} MB; what was "
        f"trained for all tasks {parts[2]:,.2f} MB"
    )

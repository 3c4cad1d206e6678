"""What ``predict`` writes."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """Write one CSV line per input, whole or not at all; the columns are the keys of the first prediction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(predictions[0]) if predictions else [])
        writer.writeheader()
        writer.writerows(predictions)
    os.replace(beside, path)

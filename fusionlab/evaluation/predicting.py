"""What ``predict`` writes."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionlab.backbones.choice import lowest_argmax
from fusionlab.errors import InputError, name_list
from fusionlab.files import written_whole


def labelled(logits: Tensor, class_names: Sequence[str], task: str, paths: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each path: its label among the task's classes (ties go to the lower one) and the label's probability.

    Args:
        logits: shape ``(batch, num_classes)``; rows beyond ``paths`` are padding.
        class_names: the task's classes.
        task: its name.
        paths: what the rows are of.

    Raises:
        InputError: an output is NaN.
    """
    if broken := [path for path, each in zip(paths, logits.isnan().any(dim=-1).tolist(), strict=False) if each]:
        raise InputError(f"the model's outputs are NaN for {name_list(broken)}: there is no label; use other weights")
    probabilities = torch.softmax(logits.float(), dim=-1)
    labels = lowest_argmax(probabilities).tolist()
    return [
        {
            "path": path,
            "task": task,
            "label": class_names[label],
            "probability": round(float(probabilities[row, label]), 6),
        }
        for row, (path, label) in enumerate(zip(paths, labels, strict=False))
    ]


def write_predictions(path: Path, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per input, whole or not at all: JSON where the file is called ``.jsonl``, else CSV.

    The columns of CSV are the keys of all predictions, empty where one has no such key.
    """
    with written_whole(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
            return
        columns = dict.fromkeys(key for prediction in predictions for key in prediction)
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(predictions)

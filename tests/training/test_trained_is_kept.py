"""Where scoring fails at the end of a fit, what was trained is there all the same, and the run can be finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fusionlab
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter
from fusionlab.callbacks import FusionCallback


def fit(root: Path, *more: str) -> int:
    return main([
        "fit", "--data.tasks", "[digits, signs]", "--data.max_samples", "16", "--data.batch_size", "4",
        "--model.rank", "2", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false",
        "--fusion.rules", "[average]", "--trainer.default_root_dir", str(root), *more,
    ])  # fmt: skip


def test_a_score_that_fails_loses_nothing_that_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FusionCallback._make

    def fails(self: FusionCallback, *arguments: Any) -> Any:
        raise RuntimeError("cannot be fused")

    monkeypatch.setattr(FusionCallback, "_make", fails)
    with pytest.raises(RuntimeError, match="cannot be fused"):
        fit(tmp_path / "run")
    kept = {path: path.read_bytes() for path in (tmp_path / "run/adapters").glob("*/*.safetensors")}
    assert {path.parent.name for path in kept} == {"digits", "signs"}
    assert all(isinstance(fusionlab.load(path.parent), Adapter) for path in kept)
    assert not (tmp_path / "run/results.json").exists()
    monkeypatch.setattr(FusionCallback, "_make", whole)
    assert fit(tmp_path / "run") == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(json.loads((tmp_path / "run/results.json").read_text())["rows"]) == 6

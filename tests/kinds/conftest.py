"""What tests by kind share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def models(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of the module's own ``originals``, to be changed at will."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path

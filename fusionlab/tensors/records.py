"""What fusionlab wrote of a folder of weights itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusionlab.files import is_there
from fusionlab.foreign import OwnRecord, read_json
from fusionlab.layout import FUSION, OWN


def own_record(folder: Path) -> dict[str, Any]:
    """The content of ``fusion.json``, or else of ``fusionlab.json``; empty for folders of other tools."""
    for name in (FUSION, OWN):
        if is_there(folder / name):
            return read_json(folder / name, OwnRecord)
    return {}

"""The metadata of cards, of models and data sets: YAML between two lines of three dashes at the head of a README.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fusionlab.files import accessed, is_there
from fusionlab.foreign.reading import parse_yaml

_HEAD = re.compile(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


def card_head(card: Path) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there is no card, no head, or no mapping in it.

    Raises:
        InputError: the card cannot be read, or its head is not YAML.
    """
    if not is_there(card):
        return {}
    with accessed(card):
        head = _HEAD.match(card.read_text(encoding="utf-8", errors="replace"))
    content = parse_yaml(head[1], repr(str(card))) if head else None
    return content if isinstance(content, dict) else {}

"""Model cards: the ``README.md`` of every folder of weights, with the metadata that the hub reads."""

from fusionlab.cards.card import write_card
from fusionlab.cards.facts import DataSet, Origin

__all__ = ["DataSet", "Origin", "write_card"]

"""Whole tables of rows as encoded samples, tokenized once by ``datasets`` and kept in its cache."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusionlab.data.chat.encoding import Encoder
from fusionlab.data.chat.rows import NothingToLearnError, Said
from fusionlab.data.chat.split import Samples
from fusionlab.data.local import no_progress_bars
from fusionlab.data.tokens import Ragged
from fusionlab.errors import InputError


@dataclass(frozen=True)
class EncodedTable:
    """A table whose rows were encoded.

    Args:
        table: ``input_ids``, ``labels``, ``prompt_ids``, ``answer``, ``is_cut``, ``fault`` and ``is_empty`` by row.
    """

    table: Any

    @property
    def faults(self) -> list[tuple[int, str, bool]]:
        """``(row, reason, whether only nothing is left to learn)`` of the rows that could not be encoded."""
        columns = (self.table["fault"][:], self.table["is_empty"][:])
        return [(row, fault, empty) for row, (fault, empty) in enumerate(zip(*columns, strict=True)) if fault]

    def samples(self, targets: np.ndarray) -> tuple[Samples, np.ndarray]:
        """The rows without a fault, with theirs of the ``targets``; and the rows' places in the table."""
        kept = np.array([not fault for fault in self.table["fault"][:]])
        table = self.table.select(np.flatnonzero(kept))
        parts = (Ragged.of(table[name][:]) for name in ("input_ids", "labels", "prompt_ids"))
        return Samples(*parts, tuple(table["answer"][:]), targets[kept]), np.flatnonzero(kept)

    @property
    def num_cut(self) -> int:
        """Samples that are longer than they may be."""
        return sum(self.table["is_cut"][:])


def encode_table(
    table: Any, read: Callable[[Mapping[str, Any]], Said], encoder: Encoder, key: str, cache: Path
) -> EncodedTable:
    """Encode every row of a table, or take it from the cache.

    Args:
        table: a ``datasets.Dataset``.
        read: what a row says.
        encoder: makes its tokens.
        key: of all that decides the tokens beside the rows.
        cache: folder of the encoded tables.
    """
    from datasets import Features, List, Value

    tokens = List(Value("int32"))
    features = {"input_ids": tokens, "labels": tokens, "prompt_ids": tokens, "answer": Value("string"),
                "is_cut": Value("bool"), "fault": Value("string"), "is_empty": Value("bool")}  # fmt: skip
    fingerprint = hashlib.sha256(f"{rows_hash(table)}\0{key}".encode()).hexdigest()[:32]
    cache.mkdir(parents=True, exist_ok=True)

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            said = read(row)
            found = encoder.encode(said)
        except InputError as error:
            empty = isinstance(error, NothingToLearnError)
            blank: dict[str, Any] = {"input_ids": [], "labels": [], "prompt_ids": [], "answer": "", "is_cut": False}
            return blank | {"fault": str(error), "is_empty": empty}
        return {
            "input_ids": found.input_ids,
            "labels": found.labels,
            "prompt_ids": found.prompt_ids,
            "answer": encoder.cutter.read(found.answer_ids[: len(found.answer_ids) - found.num_closing]),
            "is_cut": found.num_tokens > len(found.input_ids),
            "fault": "",
            "is_empty": False,
        }

    with nullcontext() if sys.stderr.isatty() else no_progress_bars():
        encoded = table.map(
            encode,
            remove_columns=table.column_names,
            features=Features(features),
            new_fingerprint=fingerprint,
            cache_file_name=str(cache / f"{fingerprint}.arrow"),
        )
    return EncodedTable(encoded)


def rows_hash(table: Any) -> str:
    """SHA-256 over the columns and rows of a table.

    ``datasets`` itself knows a prepared table by the modification times of the files that it was made of.
    """
    digest = hashlib.sha256(repr(sorted(table.features.items())).encode())
    for rows in table.with_format("arrow").iter(1000):
        digest.update(repr(rows.select(sorted(table.column_names)).to_pylist()).encode())
    return digest.hexdigest()

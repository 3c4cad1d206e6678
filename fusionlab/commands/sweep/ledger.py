"""A ledger that several processes share: one small file a record, leases for work in hand; on one machine or a share.

A record is written beside and linked to its name, which fails where the name is taken: a record is never written twice,
even if its work was done twice because a lease seemed dead. A lease is a file that its holder keeps touching.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fusionlab.errors import InputError, name_list
from fusionlab.files import create_text, named
from fusionlab.foreign import read_json
from fusionlab.layout import INPUTS, LEASES, POINTS
from fusionlab.runs.leases import Leases


class Ledger:
    """Records by key below a folder.

    Args:
        folder: created when first written to.
        lease_seconds: a lease that was not touched for so long is dead.
    """

    def __init__(self, folder: Path, lease_seconds: float = 60.0) -> None:
        self.folder = folder
        self._leases = Leases(folder / LEASES, lease_seconds)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record, or None."""
        path = self._path(key)
        return _read(path) if path.is_file() else None

    def put(self, key: str, record: Mapping[str, Any]) -> bool:
        """Record, whole or not at all; False where ``key`` has a record already, which stays."""
        return create_text(self._path(key), json.dumps({"key": key, **record}, allow_nan=False) + "\n")

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, by key."""
        for path in sorted((self.folder / POINTS).glob("*/*.json")):
            yield _read(path)

    def count(self) -> int:
        """How many records there are."""
        return sum(1 for _ in (self.folder / POINTS).glob("*/*.json"))

    def check_inputs(self, inputs: Mapping[str, Any], *, write: bool = True) -> None:
        """Compare what the records depend on with what the ledger was begun with; new names are added.

        Only what is given is compared: an earlier version wrote more of each.

        Raises:
            InputError: some differ; the message has both values.
        """
        differences, new = [], {}
        for name, value in inputs.items():
            path = self.folder / INPUTS / f"{quote(name, safe='')}.json"
            if not path.is_file():
                new[path] = value
            elif (known := _read(path)) != value:
                differences += _differences(name, known, value)
        if differences:
            raise InputError(
                f"the ledger in {str(self.folder)!r} was made with other inputs: {name_list(differences)}. Give the "
                f"inputs it was made with, or another --output."
            )
        for path, value in new.items() if write else ():
            create_text(path, json.dumps(value, sort_keys=True) + "\n")

    @contextmanager
    def lease(self, name: str) -> Iterator[bool]:
        """Hold the lease of ``name`` in the block; False where another process holds it."""
        held = self._leases.take(name) is None
        try:
            yield held
        finally:
            if held:
                self._leases.give_back(name)

    def _path(self, key: str) -> Path:
        return self.folder / POINTS / key[:2] / f"{key}.json"


def _read(path: Path) -> dict[str, Any]:
    with named("ledger", "remove the file, so that it is made anew"):
        return read_json(path)


def _differences(name: str, known: Any, value: Any) -> list[str]:
    if not (isinstance(known, Mapping) and isinstance(value, Mapping)):
        return [f"{name}: {known!r} there, {value!r} now"]
    return [
        f"{name} {key}: {known.get(key)!r} there, {value[key]!r} now"
        for key in sorted(value)
        if known.get(key) != value[key]
    ]

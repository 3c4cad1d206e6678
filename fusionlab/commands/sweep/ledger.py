"""A ledger that several processes share: one small file a record, leases for work in hand; on one machine or a share.

A record is written beside and linked to its name, which fails where the name is taken: a record is never written twice,
even if its work was done twice because a lease seemed dead. A lease is a file that its holder keeps touching.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fusionlab.errors import InputError, name_list
from fusionlab.keys import key_of

__all__ = ["Ledger", "key_of"]


class Ledger:
    """Records by key below a folder.

    Args:
        folder: created when first written to.
        lease_seconds: a lease that was not touched for so long is dead.
    """

    def __init__(self, folder: Path, lease_seconds: float = 60.0) -> None:
        self.folder, self.lease_seconds = folder, lease_seconds
        self._held: set[Path] = set()
        self._heart: threading.Thread | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record, or None."""
        path = self._path(key)
        return json.loads(path.read_text()) if path.is_file() else None

    def put(self, key: str, record: Mapping[str, Any]) -> bool:
        """Record, whole or not at all; False where ``key`` has a record already, which stays."""
        return self._create(self._path(key), json.dumps({"key": key, **record}, allow_nan=False) + "\n")

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, by key."""
        for path in sorted((self.folder / "points").glob("*/*.json")):
            yield json.loads(path.read_text())

    def check_inputs(self, inputs: Mapping[str, Any], *, write: bool = True) -> None:
        """Compare what the records depend on with what the ledger was begun with; new names are added.

        Only what is given is compared: an earlier version wrote more of each.

        Raises:
            InputError: some differ; the message has both values.
        """
        differences, new = [], {}
        for name, value in inputs.items():
            path = self.folder / "inputs" / f"{quote(name, safe='')}.json"
            if not path.is_file():
                new[path] = value
            elif (known := json.loads(path.read_text())) != value:
                differences += _differences(name, known, value)
        if differences:
            raise InputError(
                f"the ledger in {str(self.folder)!r} was made with other inputs: {name_list(differences)}. Give the "
                f"inputs it was made with, or another --output."
            )
        for path, value in new.items() if write else ():
            self._create(path, json.dumps(value, sort_keys=True) + "\n")

    @contextmanager
    def lease(self, name: str) -> Iterator[bool]:
        """Hold the lease of ``name`` in the block; False where another process holds it."""
        path = self.folder / "leases" / f"{quote(name, safe='')}.json"
        held = self._acquire(path)
        try:
            yield held
        finally:
            if held:
                with self._lock:
                    self._held.discard(path)
                path.unlink(missing_ok=True)

    def _acquire(self, path: Path) -> bool:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        if not self._create(path, json.dumps(holder)):
            if not self._is_dead(path):
                return False
            stale = path.with_name(f".{path.name}.stale-{uuid.uuid4().hex}")
            try:
                os.rename(path, stale)  # of several that find it dead, one succeeds
            except FileNotFoundError:
                return False
            stale.unlink()
            if not self._create(path, json.dumps(holder)):
                return False
        with self._lock:
            self._held.add(path)
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, daemon=True)
                self._heart.start()
        return True

    def _is_dead(self, path: Path) -> bool:
        try:
            holder, touched = json.loads(path.read_text()), path.stat().st_mtime
        except FileNotFoundError:
            return False  # released at this moment: the next round takes it
        if holder["host"] == socket.gethostname() and not _is_alive(holder["pid"]):
            return True
        return self._now() - touched > self.lease_seconds

    def _now(self) -> float:
        """The time as the file system has it, which machines agree on."""
        probe = self.folder / "leases" / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _beat(self) -> None:
        while True:
            time.sleep(self.lease_seconds / 4)
            with self._lock:
                for path in self._held:
                    if path.exists():
                        os.utime(path)

    def _path(self, key: str) -> Path:
        return self.folder / "points" / key[:2] / f"{key}.json"

    def _create(self, path: Path, text: str) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")
        try:
            with beside.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.link(beside, path)
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def sweep_up(self) -> None:
        """Remove what dead processes of this machine left half-written."""
        prefix = f".tmp-{socket.gethostname()}-"
        for path in self.folder.rglob(".*.tmp-*"):
            _, found, rest = path.name.partition(prefix)
            if found and not _is_alive(int(rest.split("-")[0])):
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def _differences(name: str, known: Any, value: Any) -> list[str]:
    if not (isinstance(known, Mapping) and isinstance(value, Mapping)):
        return [f"{name}: {known!r} there, {value!r} now"]
    return [
        f"{name} {key}: {known.get(key)!r} there, {value[key]!r} now"
        for key in sorted(value)
        if known.get(key) != value[key]
    ]

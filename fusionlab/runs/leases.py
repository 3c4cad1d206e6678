"""Leases: one process at a time works on something, also over machines; a dead process's lease runs out."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fusionlab.errors import InputError
from fusionlab.files import create_text, unfinished_files

LEASE_SECONDS = 120.0
_TOKEN = secrets.token_hex(16)  # tells this process from an earlier one of its number


class Leases:
    """Leases in a folder that processes share: one file a lease, renewed by a thread while it is held.

    A lease counts as dead where its process is gone from this machine, where SLURM has restarted its job since, or
    where it was not renewed for ``seconds`` by the file server's clock.

    Args:
        folder: where the files lie; created when first written to.
        seconds: how long a lease lives without a sign of life.
    """

    def __init__(self, folder: Path, seconds: float = LEASE_SECONDS) -> None:
        self.folder, self.seconds = folder, seconds
        restart = number_of_launcher("SLURM_RESTART_COUNT") or 0
        self.owner = {
            "host": socket.gethostname(), "pid": os.getpid(), "token": _TOKEN, "job": slurm_job(), "restart": restart,
        }  # fmt: skip
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, name: str) -> str | None:
        """Hold the lease of ``name``.

        Returns:
            None; or, where another process holds it, which one, and how old its last sign of life is.
        """
        path = self._path(name)
        while not create_text(path, json.dumps(self.owner)):
            try:
                holder = _holder(path)
                age = self._now() - path.stat().st_mtime
            except FileNotFoundError:
                continue  # it was given back just now
            if not self._is_dead(holder, age):
                return f"{_told(holder, path)}; its last sign of life is {age:.0f} s old"
            _move_away(path, holder)
        with self._lock:
            self._held.add(path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew, daemon=True)
                self._thread.start()
        return None

    def take_tasks(self, tasks: Iterable[str]) -> None:
        """Hold the right to train all of these tasks, or none.

        Raises:
            InputError: another job trains one.
        """
        for task in tasks:
            holder = self.take(task)
            if holder is not None:
                self.close()
                raise InputError(
                    f"task {task!r} is being trained by {holder}. Wait for it, or, if it is dead, for "
                    f"{self.seconds:.0f} s"
                )

    def give_back(self, name: str) -> None:
        """Give a lease back; one that was taken over, since it seemed dead, stays whose it is."""
        path = self._path(name)
        with self._lock:
            self._held.discard(path)
        self._remove(path)

    def close(self) -> None:
        """Give all back."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        for path in self._held:
            self._remove(path)
        self._held = set()
        with suppress(OSError):  # it is not there, or holds leases of others
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.json"

    def _remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            if _holder(path) == self.owner:
                path.unlink()

    def _now(self) -> float:
        """The time as the file system has it, which machines agree on."""
        probe = self.folder / f".clock-{secrets.token_hex(8)}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _is_dead(self, holder: dict[str, Any], age: float) -> bool:
        own = self.owner
        restarted = own["job"] is not None and own["job"] == holder.get("job")
        if age > self.seconds or (restarted and own["restart"] > holder.get("restart", 0)):
            return True
        if holder.get("host") != own["host"]:
            return False
        return holder.get("token") != _TOKEN if holder["pid"] == own["pid"] else not is_alive(holder["pid"])

    def _renew(self) -> None:
        while not self._stopped.wait(self.seconds / 4):
            with self._lock:
                for path in self._held:
                    with suppress(FileNotFoundError):
                        os.utime(path)


def _holder(path: Path) -> dict[str, Any]:
    """Who holds a lease; empty where its file is damaged, so that its age alone says whether it is dead."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:  # empty or cut short
        return {}
    return found if isinstance(found, dict) and {"host", "pid"} <= found.keys() else {}


def _told(holder: dict[str, Any], path: Path) -> str:
    if not holder:
        return f"a process that {str(path)!r} does not tell, which is damaged"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['host']}{job}"


def _move_away(path: Path, dead: dict[str, Any]) -> None:
    """Remove a dead lease; what others did with it since it was read stands."""
    aside = path.with_name(f".{path.name}.dead-{secrets.token_hex(8)}")
    try:
        os.rename(path, aside)  # of several that take it over, one succeeds
    except FileNotFoundError:
        return
    if _holder(aside) != dead:  # another took it over meanwhile
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def number_of_launcher(name: str) -> int | None:
    """The number that a launcher such as SLURM or torchrun has put into the environment; None where there is none.

    Raises:
        InputError: it is no whole number, or negative.
    """
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise InputError(f"the environment's {name} must be a number of at least 0, got {value!r}; unset it")
    return int(value)


def slurm_job() -> str | None:
    """SLURM's id of this job, or of this task of an array; None where there is no SLURM."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    return job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def remove_unfinished(folder: Path) -> None:
    """Remove what dead processes of this machine left half-written."""
    for path, pid in unfinished_files(folder):
        if not is_alive(pid):
            path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and that nobody waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")

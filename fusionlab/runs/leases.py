"""Leases: at most one job trains a task of a run folder, also over machines; a dead job's lease runs out."""

from __future__ import annotations

import json
import os
import socket
import threading
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from fusionlab.errors import InputError

LEASE_SECONDS = 120
_RENEW_SECONDS = 20


class TaskLeases:
    """The right to train some tasks of a run folder: one file a task, renewed by a thread while it is held.

    A lease counts as dead where its process is gone from this machine, where SLURM started the same job again, or
    where it was not renewed for :data:`LEASE_SECONDS` by the file server's clock.

    Args:
        folder: where the files lie.
        tasks: names of the tasks.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        self.folder = folder
        self.paths = {task: folder / f"{urllib.parse.quote(task, safe='')}.json" for task in tasks}
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": _job()}
        self._held: list[Path] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take all of them, or none.

        Raises:
            InputError: another job holds one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for task, path in self.paths.items():
                self._take(task, path)
        except InputError:
            self.release()
            raise
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give them back."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for path in self._held:
            path.unlink(missing_ok=True)
        self._held = []
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _take(self, task: str, path: Path) -> None:
        while not self._create(path):
            owner, age = _read(path), self._age(path)
            if owner is None:
                continue  # it was given back, or is being written, just now
            if not self._is_dead(owner, age):
                raise InputError(
                    f"task {task!r} is being trained by process {owner['pid']} on {owner['host']}"
                    f"{', job ' + owner['job'] if owner['job'] else ''}; its last sign of life is {age:.0f} s old. "
                    f"Wait for it, or, if it is dead, for {LEASE_SECONDS} s"
                )
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            path.rename(aside)  # of several that take it over, one
            aside.unlink()

    def _create(self, path: Path) -> bool:
        """Create the file with its content at once; False where there is one."""
        unfinished = path.with_name(f".{path.name}.new-{self.owner['host']}-{os.getpid()}")
        unfinished.write_text(json.dumps(self.owner))
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return False
        finally:
            unfinished.unlink()
        self._held.append(path)
        return True

    def _age(self, path: Path) -> float:
        """Seconds since the lease was renewed, by the clock of the file server."""
        probe = self.folder / f".clock-{self.owner['host']}-{os.getpid()}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - path.stat().st_mtime if path.exists() else 0.0

    def _is_dead(self, owner: dict, age: float) -> bool:
        if age > LEASE_SECONDS or (owner["job"] is not None and owner["job"] == self.owner["job"]):
            return True
        return owner["host"] == self.owner["host"] and not _is_alive(owner["pid"])

    def _renew(self) -> None:
        while not self._stopped.wait(_RENEW_SECONDS):
            for path in self._held:
                if path.exists():
                    os.utime(path)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def _job() -> str | None:
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    return job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier run of this very process; it holds none now
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

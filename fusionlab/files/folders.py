"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusionlab.errors import InputError
from fusionlab.files.paths import accessed, path_of
from fusionlab.files.whole import sync

_LONGEST_FILE = 64  # characters in the name of a file that is written into a folder


@contextmanager
def write_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends without an exception, and else disappears.

    It is made beside ``path`` as ``.NAME.tmp-*`` and held by a lock; left-overs of dead processes are removed first.
    At the end everything is synced to disk before it is renamed.

    Args:
        path: the folder to make; its parent is created.
        overwrite: replace a folder that exists; the old one is put back by the next run after a crash in between.

    Yields:
        the folder to write into.

    Raises:
        InputError: ``path`` exists (without ``overwrite``), cannot be made where it is, or the disk is full.
    """
    path = _absolute(path)
    remove_leftovers(path)
    refuse_existing(path, overwrite=overwrite)
    with _staging_folder(path) as staging:
        yield staging
        _sync_tree(staging)
        _rename(staging, path, overwrite=overwrite)
        sync(path.parent)


def check_writable(path: str | Path) -> None:
    """Raise unless :func:`write_folder` could begin: it is tried, and what that made is removed again.

    Raises:
        InputError: ``path`` exists, or cannot be made where it is: below a file, without the right to, too long.
    """
    path = _absolute(path)
    refuse_existing(path)
    with _staging_folder(path) as staging:
        (staging / ("x" * _LONGEST_FILE)).touch()


@contextmanager
def _staging_folder(path: Path) -> Iterator[Path]:
    """A locked folder beside ``path`` that is removed in the end, with the parents that were made for it alone."""
    missing = [parent for parent in path.parents if not parent.exists()]
    staging, handle = _locked_folder(path)
    try:
        yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk of {str(path)!r} is full; nothing was written.") from error
        if str(error.filename).startswith(str(staging)) or error.errno in (errno.EFBIG, errno.EROFS):
            raise InputError(f"{str(path)!r} cannot be written: {error.strerror}; nothing was.") from error
        raise
    finally:
        os.close(handle)
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # it holds something
                parent.rmdir()


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path_of(path)))


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Raise if ``path`` is taken.

    Raises:
        InputError: it exists (without ``overwrite``), or is a file.
    """
    if path.exists() and (not overwrite or not path.is_dir()):
        raise InputError(f"the output {str(path)!r} exists; give another one or remove it.")


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A folder beside ``path``, and the handle that holds its lock; made again where it was taken for a left-over."""
    while True:
        staging = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        with accessed(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        try:
            handle = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_SH)
        if staging.exists():
            return staging, handle
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Remove the staging folders of ``path`` that no living process holds.

    An old output that a dead process had moved aside, without moving the new one in, is put back instead.
    """
    for leftover in sorted(path.parent.glob(f".{glob.escape(path.name)}.tmp-*")):
        if leftover.name.endswith("-old") and not path.exists():
            os.rename(leftover, path)
        elif leftover.is_dir():
            _remove_unless_held(leftover)


def _remove_unless_held(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its process renamed or removed it just now
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)  # under the lock, so that who is about to hold it waits and sees
    except OSError:  # held; or a file system without locks on folders, where nothing is removed
        pass
    finally:
        os.close(handle)


def _rename(staging: Path, path: Path, *, overwrite: bool) -> None:
    if not overwrite or not path.exists():
        try:
            os.rename(staging, path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise InputError(f"the output {str(path)!r} appeared meanwhile; nothing was written.") from error
            raise
        return
    old = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}-old"
    os.rename(path, old)
    os.rename(staging, path)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))

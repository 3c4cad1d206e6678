"""Paths that a user wrote, the system's refusals told as bad input, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusionlab.errors import InputError, did_you_mean

_SHOWN = 200
_LONGEST_FILE = 64  # characters in the name of a file that is written into a folder
_POINTER = b"version https://git-lfs"


def path_of(name: str | Path) -> Path:
    """The path that a user wrote, ``~`` expanded; it need not exist.

    Raises:
        InputError: empty, no text that a path can be, too long, in a folder that may not be looked into, or a link
            whose target is gone.
    """
    shown = f"{str(name)[:_SHOWN]!r}"
    if not str(name):
        raise InputError("expected a path, got an empty text.")
    try:
        path = Path(name).expanduser()
        str(path).encode()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise InputError(f"{shown} {_reason(path, error)}.") from error
    except OSError as error:
        raise InputError(f"{shown} {_reason(path, error)}.") from error
    except (ValueError, RuntimeError) as error:  # a zero byte, half of a character, no such user's home
        raise InputError(f"{shown} is no path: {error}.") from error
    return path


def nearest(path: Path) -> str:
    """`` did you mean '...'?`` with the name beside a path that is not there which is nearest to it; else empty."""
    folder = path.parent
    if not (folder.is_dir() and os.access(folder, os.R_OK)):
        return ""
    hint = did_you_mean(path.name, os.listdir(folder))
    return f" {hint}" if hint.startswith("did you mean") else ""


def is_there(path: Path) -> bool:
    """Whether something bears the name, a link whose target is gone too: reading it then says so, in place of silence.

    Raises:
        InputError: its folder may not be looked into.
    """
    with accessed(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # a name with a zero byte is none
            return False
    return True


def is_file(path: Path) -> bool:
    """Whether it is a file, or a link to one that is gone, which reading then tells; see :func:`is_there`."""
    return is_there(path) and (path.is_file() or not path.exists())


@contextmanager
def accessed(path: Path, doing: str = "read") -> Iterator[None]:
    """Within the block the system's refusal of ``path`` is bad input, told with its reason.

    Args:
        path: what is opened, listed or made.
        doing: ``read`` or ``written``.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{str(path)[:_SHOWN]!r} {_reason(path, error, doing)}.") from error


def mistaken(path: Path, begins: bytes) -> str:
    """What a file is that is not what its name says, going by its first bytes; empty where that is not known."""
    if not begins:
        return "it is empty"
    if begins.startswith(_POINTER):
        return "it is the pointer that Git LFS keeps in place of the file; run git lfs pull, or download it"
    if begins.lstrip()[:1] == b"<":
        return "it is a web page, as a failed download leaves it"
    return ""


def _reason(path: Path, error: OSError, doing: str = "read") -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to a file that is gone ({os.readlink(path)}), as a pruned cache leaves it; download it again"
    return f"cannot be {doing}: {(error.strerror or str(error)).lower()}"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, renamed to it at the end, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def create_text(path: Path, text: str) -> bool:
    """Write a text file where none bears the name, whole and synced to disk; False where one does, which stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        beside.write_text(text, encoding="utf-8")
        _sync(beside)
        os.link(beside, path)
    except FileExistsError:
        return False
    finally:
        beside.unlink(missing_ok=True)
    return True


def unfinished_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """What processes of this machine are writing below ``folder``, or left half-written, each with its process."""
    prefix = f".tmp-{socket.gethostname()}-"
    for path in folder.rglob(".*.tmp-*"):
        _, found, rest = path.name.partition(prefix)
        if found:
            yield path, int(rest.split("-")[0])


def _beside(path: Path) -> Path:
    """A name for what is to become ``path``, which says whose it is."""
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


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
        _sync(path.parent)


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
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

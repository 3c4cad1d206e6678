"""Paths that a user wrote, and the system's refusals told as bad input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusionlab.errors import InputError, did_you_mean

_SHOWN = 200
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


@contextmanager
def named(what: str, advice: str = "") -> Iterator[None]:
    """Within the block bad input is told of as that of ``what``, such as an option, with what to do about it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {str(error).rstrip('.')}{advice and f'; {advice}'}") from error


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

"""Paths that a user wrote, the system's refusals told as bad input, and files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusionlab.errors import InputError

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
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")

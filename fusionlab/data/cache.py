"""Folders of decoded data that appear whole or not at all, and are shared by every process of a machine."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import psutil


def cache_root(cache_dir: str | None) -> Path:
    """The given folder, else ``$FUSIONLAB_CACHE``, else ``~/.cache/fusionlab``."""
    return Path(cache_dir or os.environ.get("FUSIONLAB_CACHE") or "~/.cache/fusionlab").expanduser()


def cached_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """``folder``, made by ``write`` if it is not there.

    ``write`` fills a folder beside it, which is renamed when complete; of several processes that do so at once the
    first wins, and the others use its result. What a killed process of this machine left unfinished is removed.

    Returns:
        ``folder``.
    """
    if folder.is_dir():
        return folder
    prefix = f".{folder.name}.tmp-{socket.gethostname()}-"
    for left_over in folder.parent.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(left_over.name.removeprefix(prefix).partition("-")[0])):
            shutil.rmtree(left_over, ignore_errors=True)
    unfinished = folder.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder

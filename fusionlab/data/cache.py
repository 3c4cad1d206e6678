"""Folders of decoded data that appear whole or not at all, and are shared by every process of a machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fusionlab.errors import InputError
from fusionlab.files import write_folder


def cache_root(cache_dir: str | None) -> Path:
    """The given folder, else ``$FUSIONLAB_CACHE``, else ``~/.cache/fusionlab``."""
    return Path(cache_dir or os.environ.get("FUSIONLAB_CACHE") or "~/.cache/fusionlab").expanduser()


def cached_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """``folder``, made by ``write`` if it is not there.

    ``write`` fills a folder beside it, which is renamed when complete; of several processes that do so at once the
    first wins, and the others use its result. What a killed process left unfinished is removed.

    Returns:
        ``folder``.
    """
    if not folder.is_dir():
        try:
            with write_folder(folder) as unfinished:
                write(unfinished)
        except InputError:  # another process was first; or it cannot be made
            if not folder.is_dir():
                raise
    return folder

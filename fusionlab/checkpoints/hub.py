"""Where a model is: a local path, which needs no network, or the id of one on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from fusionlab.errors import InputError

_ID = re.compile(r"^[\w.-]+/[\w.-]+(?:@[\w./-]+)?$")
_TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe")


def resolve(name: str) -> Path:
    """The local folder or file of ``name``; a hub id (``owner/name`` or ``owner/name@revision``) is downloaded.

    A path that exists is always meant as a path. Safetensors are preferred to pickled weights.

    Raises:
        InputError: neither an existing path nor a hub id, or it cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not _ID.match(name):
        raise InputError(f"{name!r} does not exist, and is no hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = [*_TEXT_FILES, weights]
            found = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
            if any(found.glob(weights)):
                return found
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name!r} does not exist here, and cannot be had from the hub: {reason[:300]}") from error
    raise InputError(f"{name!r} on the hub holds neither safetensors nor .bin weights.")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as a hub id and is no existing path."""
    return bool(_ID.match(name)) and not Path(name).expanduser().exists()

"""The stock clients of this process, pointed at a stand-in for the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.utils import _http


def point_at(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Ask ``hub`` from now on, without xet or token and with an empty cache, as variables say it at the start.

    Args:
        hub: that serves.
        cache: a folder.
        patch: puts all back.
    """
    import datasets

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    patch.setattr(datasets.config, "HF_MODULES_CACHE", str(cache / "modules"))
    go_online(patch)
    patch.setattr(_http.time, "sleep", lambda seconds: None)  # between two tries
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    huggingface_hub.close_session()


def go_online(patch: pytest.MonkeyPatch) -> None:
    """Ask the hub again."""
    _offline(patch, "0")


def go_offline(patch: pytest.MonkeyPatch) -> None:
    """Ask it no more, as ``HF_HUB_OFFLINE=1`` does."""
    _offline(patch, "1")


def _offline(patch: pytest.MonkeyPatch, value: str) -> None:
    import datasets

    patch.setenv("HF_HUB_OFFLINE", value)
    patch.setattr(constants, "HF_HUB_OFFLINE", value == "1")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", value == "1")

"""The run folder: where it lies, whether it is new, unfinished or finished, and what changed in its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fusionlab.errors import InputError, name_list

CONFIG, RESULTS, CHECKPOINTS = "config.yaml", "results.json", "checkpoints"
# what may differ when a run is taken up again: where and how it runs, not what it computes
_FREE_KEYS = ("overwrite", "output", "ckpt_path", "data.cache_dir", "data.init_args.cache_dir")
_FREE_TRAINER_KEYS = (
    "default_root_dir", "accelerator", "strategy", "devices", "num_nodes", "logger", "enable_progress_bar",
    "enable_model_summary", "log_every_n_steps", "profiler", "fast_dev_run", "plugins",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Args:
        path: the folder; it need not exist.
    """

    path: Path

    @classmethod
    def next_free(cls, stem: str, parent: Path = Path("runs")) -> RunFolder:
        """``runs/<stem>-<k>`` with the lowest k that is not taken by a finished or started run."""
        stem = "".join(char if char.isalnum() or char in "._-" else "-" for char in stem)
        k = 1
        while (parent / f"{stem}-{k}").exists():
            k += 1
        return cls(parent / f"{stem}-{k}")

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        path = self.path / CHECKPOINTS / "last.ckpt"
        return path if path.is_file() else None

    def state(self) -> Literal["new", "unfinished", "finished"]:
        """Whether a run was begun here and whether it ended; results.json is written last."""
        if (self.path / RESULTS).exists():
            return "finished"
        return "unfinished" if (self.path / CONFIG).exists() else "new"

    def check(self, config: Mapping[str, Any], *, overwrite: bool = False) -> Literal["new", "unfinished"]:
        """What ``fit`` has to do here.

        Raises:
            InputError: the run is finished, or its configuration differs in more than where it runs.
        """
        if overwrite or self.state() == "new":
            return "new"
        if self.state() == "finished":
            raise InputError(
                f"the run in {str(self.path)!r} is finished; give another --trainer.default_root_dir, or --overwrite "
                f"to run it again"
            )
        changes = changed_keys(yaml.safe_load((self.path / CONFIG).read_text()), config)
        if changes:
            raise InputError(
                f"the unfinished run in {str(self.path)!r} has another configuration: {name_list(changes)}. Give its "
                f"own configuration to resume it, another --trainer.default_root_dir, or --overwrite to start anew."
            )
        return "unfinished"


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, with both values, except those that only say where and how a run runs."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key} ({before.get(key)!r} before, {after.get(key)!r} now)"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_free(key)
    ]


def _is_free(key: str) -> bool:
    if key in _FREE_KEYS:
        return True
    parts = key.split(".")
    return parts[0] == "trainer" and len(parts) > 1 and parts[1] in _FREE_TRAINER_KEYS


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value

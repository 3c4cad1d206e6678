"""One input of a recipe, open: its files and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionlab.engine import TaskInput, Weights
from fusionlab.tensors import Checkpoint
from fusionlab.tensors.architecture import Architecture
from fusionlab.tensors.fingerprints import file_records, fingerprint
from fusionlab.tensors.readers import SafetensorsWeights


@dataclass(frozen=True)
class Opened:
    """One input of a recipe.

    Args:
        name: as the recipe says it.
        path: where it is.
        files: its weight files.
        weights: what the engine reads.
        config: its ``config.json`` or ``adapter_config.json``.
        unread: what looks like weights beside them and is not read, by relative path.
        adapter: the adapter, if it is one.
        names: name in memory -> name in the base's files, where an adapter's differ.
        with_content: know the files by all of their content.
        notes: what the user should know of it.
        is_part: it is a model of a part of the base, or of more than it.
        is_masked: it is a task vector of masks.
        of_models: full models were made into it.
        is_remade: it is made of ranges of blocks or rows of a vocabulary, under a configuration of its own.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    weights: Weights
    config: Mapping[str, Any]
    unread: tuple[str, ...] = ()
    adapter: Any = None
    names: Mapping[str, str] = field(default_factory=dict)
    with_content: bool = False
    notes: tuple[str, ...] = ()
    is_part: bool = False
    is_masked: bool = False
    of_models: bool = False
    is_remade: bool = False

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What its files are known by, from before anything of them is used."""
        headers = self.weights.headers if isinstance(self.weights, SafetensorsWeights) else None
        return file_records(self.files, headers, content=self.with_content)

    @property
    def is_unchanged(self) -> bool:
        """Whether the files are still what :attr:`records` says, going by times, headers and ends of tensors."""
        before = [{key: value for key, value in record.items() if key != "sha256"} for record in self.records]
        return file_records(self.files) == before

    @property
    def fingerprint(self) -> str:
        """One hash over them."""
        return fingerprint(self.records)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: info.shape for name, info in self.weights.tensors.items()}

    @cached_property
    def architecture(self) -> Architecture:
        """What its ``config.json`` says that it is."""
        return Architecture(self.path if self.path.is_dir() else self.path.parent, self.config)

    @property
    def task_input(self) -> TaskInput:
        """What the engine takes."""
        return TaskInput(self.weights, self.adapter is not None or self.is_masked, self.is_part, self.of_models)


def full_model(name: str, path: Path, checkpoint: Checkpoint) -> Opened:
    """A full model: ``name`` as the recipe says it, where it is, and what is there."""
    return Opened(name, path, checkpoint.files, checkpoint.weights, checkpoint.config, tuple(checkpoint.unread))

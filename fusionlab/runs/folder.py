"""The run folder: where it lies, whether it is new, unfinished or finished, and what changed in its configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from fusionlab.errors import InputError, name_list
from fusionlab.files import named, remove, write_text
from fusionlab.foreign import BegunConfig, TrainedPart, read_json, read_names, read_yaml, yaml_of
from fusionlab.layout import (
    CHECKPOINTS,
    CONFIG,
    DIAGNOSTICS,
    FUSED,
    LAST,
    OF_A_RUN,
    OVERWRITTEN,
    PARTS,
    PLOTS,
    RESULTS,
    RUNS,
    TABLE,
    TAKEN,
    TRAINED,
)

RunState = Literal["new", "unfinished", "extended"]
# what may differ when a run is taken up again: where and how it runs, not what it computes
_FREE_KEYS = (
    "overwrite", "dry_run", "output", "ckpt_path", "start_timeout", "checkpoint_every_n_steps", "data.cache_dir",
    "data.init_args.cache_dir", "model.init_args.samples_at_once",
)  # fmt: skip
# what may differ between the jobs that train the tasks of one run, and the one that fuses them
_NOT_TRAINING = ("data.init_args.tasks ", "data.init_args.eval_batch_size ", "fusion.", "train_only ", "harness")
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
    def next_free(cls, stem: str, parent: Path = Path(RUNS)) -> RunFolder:
        """``runs/<stem>-<k>`` with the lowest k that is not taken by a finished or started run."""
        stem = "".join(char if char.isalnum() or char in "._-" else "-" for char in stem)
        k = 1
        while (parent / f"{stem}-{k}").exists():
            k += 1
        return cls(parent / f"{stem}-{k}")

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        path = self.path / CHECKPOINTS / LAST
        return path if path.exists() else None

    def config(self) -> dict[str, Any]:
        """What the run was begun with.

        Raises:
            InputError: its config.yaml cannot be read, or is none.
        """
        with self._named():
            return read_yaml(self.path / CONFIG, BegunConfig)

    def _named(self) -> AbstractContextManager[None]:
        """Within the block a damaged file is told of with what to do about it."""
        return named(f"the run in {str(self.path)!r}", "put the file back, or run it anew by fit --overwrite")

    def state(self) -> Literal["new", "unfinished", "finished"]:
        """Whether a run was begun here and whether it ended; results.json, of a part trained.json, is written last."""
        if (self.path / RESULTS).exists() or (self.path / TRAINED).exists():
            return "finished"
        return "unfinished" if (self.path / CONFIG).exists() else "new"

    def check(self, config: Mapping[str, Any], *, overwrite: bool = False) -> RunState:
        """What ``fit`` has to do here; ``extended`` is a run to which tasks are added.

        Raises:
            InputError: the run is finished, or its configuration differs in more than where it runs.
        """
        state = self.state()
        if overwrite or state == "new":
            return "new"
        before = self.config() if (self.path / CONFIG).exists() else config
        changes = changed_keys(before, config)
        if changes and _adds_tasks(before, config) and (state == "finished" or self._parts_hold(before)):
            return "extended"
        if state == "finished":
            differing = f" with another configuration ({name_list(changes)})" if changes else ""
            raise InputError(
                f"the run in {str(self.path)!r} is finished{differing}; give another --trainer.default_root_dir, or "
                f"--overwrite to run it again"
            )
        if changes:
            raise InputError(
                f"the unfinished run in {str(self.path)!r} has another configuration: {name_list(changes)}. Give its "
                f"own configuration to resume it, another --trainer.default_root_dir, or --overwrite to start anew."
            )
        return "unfinished"

    # tasks trained by other jobs

    def part(self, tasks: Iterable[str]) -> RunFolder:
        """The folder of a job that trains ``tasks`` only."""
        name = "+".join(quote(task, safe=" ") for task in tasks)
        if len(name) > 100:
            name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return RunFolder(self.path / PARTS / name)

    def finish_part(self, tasks: Iterable[str]) -> None:
        """Mark this part as trained; the last thing that its job writes."""
        _write_json(self.path / TRAINED, {"tasks": list(tasks)})

    def trained_tasks(self, config: Mapping[str, Any]) -> dict[str, Path]:
        """The tasks of ``config`` that are trained already, here or in parts, each with the checkpoint that holds it.

        Raises:
            InputError: a part was trained with another configuration; the keys that differ are named.
        """
        wanted = _definitions(config)
        found: dict[str, Path] = {}
        before = self.config() if self.state() == "finished" else None
        if before is not None and self.last_checkpoint is not None and _adds_tasks(before, config):
            found |= dict.fromkeys(set(_definitions(before)) - set(self.taken()), self.last_checkpoint)
        for record in sorted((self.path / PARTS).glob(f"*/{TRAINED}")):
            part = RunFolder(record.parent)
            before = part.config()
            definitions = _definitions(before)
            tasks = [task for task in part._trained() if task in wanted]
            changes = [change for change in changed_keys(before, config) if not change.startswith(_NOT_TRAINING)]
            changes += [f"task {task!r}" for task in tasks if definitions.get(task) != wanted[task]]
            if tasks and changes:
                raise InputError(
                    f"{name_list(tasks)} in {str(record.parent)!r} was trained with another configuration: "
                    f"{name_list(changes)}. Give the same configuration, or --overwrite to train all tasks anew."
                )
            found |= dict.fromkeys(tasks, record.parent / CHECKPOINTS / LAST)
        return found

    def holders(self) -> dict[str, Path]:
        """Every task that is trained already, here or in a part, with the folder of whoever did it."""
        found: dict[str, Path] = {}
        if self.state() == "finished" and (self.path / CONFIG).is_file():
            found |= dict.fromkeys(_definitions(self.config()), self.path)
        for record in sorted((self.path / PARTS).glob(f"*/{TRAINED}")):
            found |= dict.fromkeys(RunFolder(record.parent)._trained(), record.parent)
        return found

    def taken(self) -> list[str]:
        """The tasks that the run here took over from parts when it began."""
        path = self.path / TAKEN
        with self._named():
            return read_names(path) if path.exists() else []

    def _trained(self) -> list[str]:
        """The tasks that this part has trained."""
        with self._named():
            return list(read_json(self.path / TRAINED, TrainedPart)["tasks"])

    def begin(self, config: Mapping[str, Any], state: RunState, taken: Iterable[str], *, overwrite: bool) -> None:
        """Write what a run starts with; of an extended run keep what is trained, as a part.

        Whatever is cut short here leaves a run that can be resumed or extended.
        """
        if state == "unfinished":
            return
        if state == "extended" and (self.path / CHECKPOINTS).is_dir():
            self._keep_as_part(self.config())
        if overwrite:
            self._put_aside()
        for name in (RESULTS, TRAINED, TABLE, FUSED, PLOTS, DIAGNOSTICS):
            remove(self.path / name)
        taken = list(taken)
        if taken:
            _write_json(self.path / TAKEN, taken)
        write_text(self.path / CONFIG, yaml_of(config))

    def take_back(self) -> None:
        """Undo the begin of a new run that has trained nothing to keep: what it was to overwrite is there again."""
        for name in (CONFIG, TAKEN, CHECKPOINTS):
            remove(self.path / name)
        aside = self.path / OVERWRITTEN
        for path in sorted(aside.iterdir()) if aside.is_dir() else ():
            remove(self.path / path.name)
            path.rename(self.path / path.name)
        remove(aside)

    def remove_leftovers(self) -> None:
        """Remove checkpoints that killed processes left half-written; for whoever holds the leases."""
        for path in (self.path / CHECKPOINTS).glob(f".{LAST}.tmp-*"):
            path.unlink(missing_ok=True)

    def forget_overwritten(self) -> None:
        """Remove the run that was overwritten, once there is something of the new one."""
        remove(self.path / OVERWRITTEN)

    def _put_aside(self) -> None:
        """Keep the former run until there is something of the new one; one that was kept already is the former run."""
        aside, names = self.path / OVERWRITTEN, [name for name in OF_A_RUN if os.path.lexists(self.path / name)]
        if aside.is_dir():
            for name in names:
                remove(self.path / name)
            return
        aside.mkdir(parents=True)
        for name in names:
            (self.path / name).rename(aside / name)

    def _keep_as_part(self, config: Mapping[str, Any]) -> None:
        tasks = [task for task in _definitions(config) if task not in self.taken()]
        part = self.part(tasks)
        part.path.mkdir(parents=True, exist_ok=True)
        write_text(part.path / CONFIG, yaml_of(config))
        (self.path / CHECKPOINTS).rename(part.path / CHECKPOINTS)
        part.finish_part(tasks)

    def _parts_hold(self, config: Mapping[str, Any]) -> bool:
        return set(_definitions(config)) <= set(self.trained_tasks(config))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, with both values, except those that only say where and how a run runs."""
    return [f"{key} ({before!r} before, {now!r} now)" for key, (before, now) in differing(old, new).items()]


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The same keys, with the two values of each."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if not _is_free(key)
        and _plain(key, before.get(key)) != _plain(key, after.get(key))
        and not (key == "data.init_args.date" and None in (before.get(key), after.get(key)))  # then it is the run's
    }


def _definitions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of each task, by name; nothing where its data call something else ``tasks``."""
    tasks = config.get("data", {}).get("init_args", {}).get("tasks")
    names = names_of_tasks(tasks)
    return dict(zip(names, tasks, strict=True)) if names else {}


def names_of_tasks(tasks: Any) -> list[str]:
    """The names in a list of tasks, as names or mappings with one; none where it is no such list."""
    entries = tasks if isinstance(tasks, list | tuple) else []
    names: list[Any] = [each.get("name") if isinstance(each, Mapping) else each for each in entries]
    return names if all(isinstance(name, str) for name in names) else []


def _adds_tasks(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether all that differs is that tasks came in, or what is fused and scored afterwards."""
    if any(not change.startswith(_NOT_TRAINING) for change in changed_keys(before, now)):
        return False
    old, new = _definitions(before), _definitions(now)
    return old.keys() < new.keys() and all(new[task] == old[task] for task in old)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value) + "\n")


def _plain(key: str, value: Any) -> Any:
    """A value as it counts: a class of ours is one class by whichever of its paths it was named."""
    ours = key.endswith("class_path") and isinstance(value, str) and value.startswith("fusionlab.")
    return value.rpartition(".")[2] if ours else value


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

"""Which tasks of lm-eval are asked for, and their result rows."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.evaluation.loop import evaluating
from fusionlab.evaluation.rows import LM_EVAL, ROW_FIELDS, Row
from fusionlab.files import path_of
from fusionlab.harness.bridge import Scored, bridged

_YAML = (".yaml", ".yml")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-eval, read with their data.

    Args:
        loaded: tasks and groups, as lm-eval makes them.
        limit: documents of each task at most; None for all.
    """

    loaded: Mapping[str, Any]
    limit: int | None = None

    @property
    def tasks(self) -> Mapping[str, Any]:
        """The tasks by name, those of groups too."""
        return self.loaded["tasks"]

    @classmethod
    def load(
        cls, given: Iterable[str | dict[str, Any]], limit: int | None = None, num_fewshot: int | None = None
    ) -> HarnessTasks:
        """Read the tasks.

        Args:
            given: names that lm-eval knows, YAML files of its format, or their content as mappings.
            limit: documents of each task at most.
            num_fewshot: examples before a question; None for what each task says.

        Raises:
            InputError: lm-eval is not installed, no such task or file, one name for two tasks, or a task or its data
                cannot be read.
        """
        given = list(given)
        if not given:
            raise InputError("harness: no task; give names of lm-eval's, YAML files, or mappings")
        if limit is not None and limit < 1:
            raise InputError(f"harness_limit must be at least 1, got {limit}")
        if num_fewshot is not None and num_fewshot < 0:
            raise InputError(f"harness_num_fewshot must be at least 0, got {num_fewshot}")
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("harness needs lm-eval: install fusionlab[harness]")
        from lm_eval.tasks import TaskManager

        for entry in given:
            _check(entry)
        manager = TaskManager(include_defaults=any(map(_needs_known, given)))  # reading what it knows takes long
        for entry in given:
            if isinstance(entry, str) and not entry.endswith(_YAML) and entry not in manager.all_tasks:
                raise InputError(f"harness: lm-eval has no task {entry!r}; {did_you_mean(entry, manager.all_tasks)}")
        with _seeded():
            loaded = _together([_loaded(manager, entry) for entry in given])
        _set_shots(loaded["tasks"], num_fewshot)
        return cls(loaded, limit)

    def check(self, tasks: Iterable[str], *, linearized: bool) -> None:
        """Raise if they cannot be scored beside ``tasks``, or under whole-network tangents.

        Raises:
            InputError: one name for two tasks, or a task that generates and weights that are ``linearized``.
        """
        if twice := [name for name in tasks if name in self.tasks]:
            raise InputError(f"harness: {name_list(twice)} is a task of the data too; give it another name there")
        generated = [name for name, task in self.tasks.items() if task.get_config("output_type") == "generate_until"]
        if linearized and generated:
            raise InputError(
                f"harness: {name_list(generated)} generates answers by transformers' own loop, which whole-network "
                f"tangents do not pass through; leave it out, or score it as a task of ChatTasks"
            )

    def rows(self, module: Scored, batch_size: int, **labels: Any) -> list[Row]:
        """Score the module's active weights by lm-eval, standard errors by its default bootstrap.

        Args:
            module: the module; its mode is put back.
            batch_size: requests in a batch.
            labels: further fields of the rows.

        Returns:
            A row per task (or group), metric and filter; the field ``lm_eval`` holds what is lm-eval's own.
        """
        from lm_eval.evaluator import evaluate

        model = bridged(module, batch_size)
        with evaluating(module), _seeded():
            found = evaluate(model, self.loaded, limit=self.limit)
        values = {**found["results"], **found.get("groups", {})}
        return [
            dict.fromkeys(ROW_FIELDS) | labels | {"task": name} | row
            for name, of_task in values.items()
            for row in self._rows_of(name, of_task, found, model.spanned)
        ]

    def _rows_of(
        self, name: str, values: Mapping[str, Any], found: Mapping[str, Any], spanned: Mapping[str, set[int]]
    ) -> Iterator[Row]:
        members = [task for task in self._members(name, found) if task in self.tasks]
        hashes = [
            f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}"
            for task in members
            for sample in found["samples"][task]
        ]
        common = {
            "split": "test" if all(self.tasks[task].has_test_docs() for task in members) else "validation",
            "num_samples": sum(found["n-samples"][task]["effective"] for task in members),
            "data_version": hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16],
        }
        own = {
            "lm_eval_version": metadata.version("lm_eval"),
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "apply_chat_template": False,
            "limit": self.limit,
            "other_border_tokens": sum(len(spanned.get(task, ())) for task in members),
        }
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            told = {"stderr": error if isinstance(error, float) else None, "task_known": False}
            told["higher_is_better"] = found["higher_is_better"].get(name, {}).get(metric)
            yield {**common, **told, "metric": metric, "value": float(value), LM_EVAL: {**own, "filter": filtered}}

    def _members(self, name: str, found: Mapping[str, Any]) -> list[str]:
        """The tasks below a group, or the task itself."""
        if name in self.tasks:
            return [name]
        below = found.get("group_subtasks", {}).get(name, [])
        return [task for child in below for task in self._members(child, found)]


def _check(entry: str | dict[str, Any]) -> None:
    if isinstance(entry, dict):
        if not any(isinstance(entry.get(key), str) for key in ("task", "group")):
            raise InputError(f"harness: a mapping needs a task, its name; got the keys {name_list(map(str, entry))}")
    elif entry.endswith(_YAML) and not path_of(entry).is_file():
        raise InputError(f"harness: no file {entry!r}")


def _needs_known(entry: str | dict[str, Any]) -> bool:
    """Whether an entry names a task that comes with lm-eval, or changes one."""
    return "dataset_path" not in entry if isinstance(entry, dict) else not entry.endswith(_YAML)


@contextmanager
def _seeded() -> Iterator[None]:
    """The random states that lm-eval's own command starts from; afterwards they are as before."""
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    with isolate_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        set_torch_seed(DEFAULT_OTHER_SEED)
        yield


def _loaded(manager: Any, entry: str | dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One entry's tasks and groups, as lm-eval makes them.

    Raises:
        InputError: it makes none of it, with what it said.
    """
    said = _Said()
    log = logging.getLogger("lm_eval")
    log.addHandler(said)
    try:
        return dict(manager.load([_place(entry)]))
    except Exception as error:  # a task holds templates and code, which can raise whatever they like
        told = [f"{type(error).__name__}: {error}", *said.errors]
        reason = "; ".join(" ".join(text.split()) for text in dict.fromkeys(told))
        raise InputError(f"harness: {_name(entry)} cannot be read: {reason}") from error
    finally:
        log.removeHandler(said)


class _Said(logging.Handler):
    """The errors that lm-eval logs, which tell more than what it raises afterwards."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.errors.append(record.getMessage())


def _together(loaded: Iterable[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What the entries hold, in the form of one.

    Raises:
        InputError: a name for two tasks, of which lm-eval would score the last.
    """
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for entry in loaded:
        if twice := [name for name in entry["tasks"] if name in found["tasks"]]:
            raise InputError(
                f"harness: {name_list(twice)} is given twice; leave one out, or call it otherwise by its key task"
            )
        for part, of in found.items():
            of |= entry[part]
    return found


def _set_shots(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Examples before questions, as lm-eval's own command sets them: a task that says 0 keeps it."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    kept = [name for name, task in tasks.items() if num_fewshot and task.get_config("num_fewshot") == 0]
    if kept:
        _log.warning("harness_num_fewshot %d does nothing for %s, which says 0 itself", num_fewshot, name_list(kept))
    for name, task in tasks.items():
        if name not in kept and (num_fewshot is not None or task.get_config("num_fewshot") is None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _place(entry: str | dict[str, Any]) -> str | dict[str, Any]:
    return str(path_of(entry)) if isinstance(entry, str) and entry.endswith(_YAML) else entry


def _name(entry: str | dict[str, Any]) -> str:
    return str(entry.get("task") or entry.get("group")) if isinstance(entry, dict) else Path(entry).name

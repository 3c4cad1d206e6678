"""What ``data.tasks`` may say: the fields of a task, and how names and mappings become tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from fusionlab.contracts import Data, Module, check_task_names
from fusionlab.errors import InputError, did_you_mean, name_list

Samples = Literal["images", "texts", "conversations"]
"""What a data module gives, and a module reads."""
_LISTS = ("class_names", "templates", "input_columns", "label_words")
_MAPPINGS = ("class_aliases",)
_HUB_LAYOUT = ("config", "revision", "train", "validation", "test", "image_column", "label_column")
# a task that says one of the first takes none of the second from its definition
_TOGETHER = (
    (("input_columns", "template"), ("input_columns", "template")),
    (("target_column",), ("label_words", "metric")),
    (("label_words",), ("target_column", "metric")),
)


@dataclass(frozen=True)
class Task:
    """One task: where its samples are and how they read as a classification (or a score).

    Args:
        name: how the task is called in results, folders and log keys.
        path: hub id, or a local folder or file of parquet, csv, tsv, json or images in one folder per class.
        config: the hub set's configuration.
        revision: the hub set's commit or tag.
        train: name of the training split, a slice of one such as ``train[:80%]``, or a file below ``path``. Splits are
            the folders and tables called train, validation or test (training, val, valid, dev, testing, eval; in any
            case; ``train-00000-of-00002.parquet``); no other name makes a split.
        validation: the same for validation; where there is none, a tenth of training is kept for it.
        test: the same for test; where there is none, another tenth of training is kept for it.
        label_column: column of the label: class index or class name; by default ``label``, else the only one with
            classes, else labels, class, target or fine_label.
        class_names: the classes in label order; needed where labels are integers, which then are these names, or places
            in them from 0, or exactly as many values as there are names, in their order.
        class_aliases: class name in the data to the name that prompts use.
        image_column: column of the image, or of paths to images.
        templates: prompts with one ``{}`` for the class name.
        input_columns: text columns, in the order in which they are read; a cell is the text that the file has.
        template: text input with the names of its columns in braces, e.g. ``"review: {text}"``.
        label_words: answer of each class, in label order.
        target_column: column of a numeric score, in place of a label; it is answered with one decimal.
        metric: what text answers are scored by.
    """

    name: str
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    label_column: str | None = None
    class_names: tuple[str, ...] | None = None
    class_aliases: Mapping[str, str] | None = None
    image_column: str | None = None
    templates: tuple[str, ...] | None = None
    input_columns: tuple[str, ...] | None = None
    template: str | None = None
    label_words: tuple[str, ...] | None = None
    target_column: str | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        """Lists become tuples, and every field is checked for its type."""
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _checked(field.name, value, self.name))
        check_task_names([self.name])
        for template in self.templates or ():
            if template.count("{}") != 1:
                raise InputError(f"template {template!r} of task {self.name!r} must hold {{}} once, for the class name")
        check_duplicates(self.class_names or (), f"class_names of task {self.name!r}")

    def completed(self, definition: Task | None) -> Task:
        """This task with what it leaves open taken from ``definition``, as far as that fits.

        A path of one's own has its own layout, so names of columns, splits and configurations are then not taken over.
        Class names never are: the data may say them itself, in another order.
        """
        if definition is None:
            return self
        own_path = self.path is not None and self.path != definition.path
        skipped = {"class_names", *(_HUB_LAYOUT if own_path else ())}
        for decisive, group in _TOGETHER:
            if any(getattr(self, key) is not None for key in decisive):
                skipped.update(group)
        return replace(
            self,
            **{
                field.name: getattr(definition, field.name)
                for field in fields(self)
                if getattr(self, field.name) is None and field.name not in skipped
            },
        )


def parse_tasks(entries: Iterable[str | Mapping[str, Any] | Task], known: Mapping[str, Task]) -> dict[str, Task]:
    """Tasks by name, completed by their definitions.

    Args:
        entries: names known to the package, or mappings (or :class:`Task`) of the fields of :class:`Task`.
        known: definitions by name.

    Raises:
        InputError: no tasks; an unknown name without a path; an unknown key; a name used twice; a bad value.
    """
    if isinstance(entries, str | Mapping):
        raise InputError(f"tasks must be a list of names or mappings, got {entries!r}")
    tasks: dict[str, Task] = {}
    for entry in entries:
        task = _task(entry)
        if task.path is None and task.name not in known:
            raise InputError(
                f"unknown task {task.name!r}; {did_you_mean(task.name, known)}; for a task of your own say where it "
                f"is: {{name: {task.name}, path: FOLDER or hub id}}"
            )
        check_task_names([*tasks, task.name])
        tasks[task.name] = task.completed(known.get(task.name))
    if not tasks:
        raise InputError("tasks is empty; give at least one name or {name: ..., path: ...}")
    return tasks


def _task(entry: str | Mapping[str, Any] | Task) -> Task:
    if isinstance(entry, Task):
        return entry
    if isinstance(entry, str):
        return Task(name=entry)
    if not isinstance(entry, Mapping):
        raise InputError(f"a task is a name or a mapping {{name: ..., path: ...}}, got {entry!r}")
    known = [field.name for field in fields(Task)]
    for key in entry:
        if key not in known:
            raise InputError(
                f"unknown key {key!r} in task {entry.get('name', entry)!r}; {did_you_mean(str(key), known)}"
            )
    if "name" not in entry:
        raise InputError(f"task {dict(entry)!r} has no name; add name: ...")
    return Task(**entry)


def _checked(key: str, value: Any, task: object) -> Any:
    if value is None and key != "name":
        return None
    if key in _LISTS:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not values or not all(isinstance(item, str) for item in values):
            raise InputError(f"{key} of task {task!r} must be a list of strings, got {value!r}")
        return tuple(values)
    if key in _MAPPINGS:
        if not isinstance(value, Mapping) or not all(isinstance(item, str) for pair in value.items() for item in pair):
            raise InputError(f"{key} of task {task!r} must map strings to strings, got {value!r}")
        return dict(value)
    if not isinstance(value, str):
        raise InputError(f"{key} of task {task!r} must be a string, got {value!r}")
    return value


def check_duplicates(names: Iterable[str], what: str) -> None:
    """Raise if a name comes twice.

    Raises:
        InputError: the message begins with ``what`` and lists the repeated names.
    """
    seen: set[str] = set()
    repeated = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if repeated:
        raise InputError(f"{what} repeat {name_list(dict.fromkeys(repeated))}; every class needs a name of its own")


def without_classes(tasks: Mapping[str, Any]) -> list[str]:
    """The tasks whose answers are scores or texts: what has neither classes nor label words."""
    return [name for name, task in tasks.items() if getattr(task, "label_words", ()) is None]


@runtime_checkable
class Reading(Protocol):
    """A module that says what it reads."""

    reads: ClassVar[Samples]


@runtime_checkable
class Giving(Protocol):
    """A data module that says what it gives."""

    gives: ClassVar[Samples]


def check_samples(module: Module, data: Data) -> None:
    """Refuse data of another kind than the module reads, where both say.

    Raises:
        InputError: naming both, and what goes together.
    """
    if isinstance(module, Reading) and isinstance(data, Giving) and module.reads != data.gives:
        raise InputError(
            f"{type(module).__name__} reads {module.reads}, and {type(data).__name__} gives {data.gives}; ClipModule "
            f"and ViTModule go with ImageTasks, T5Module with TextTasks, CausalModule with ChatTasks (--data)"
        )

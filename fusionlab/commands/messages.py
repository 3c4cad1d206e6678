"""jsonargparse's messages in one line: what was expected, what came, and the nearest known name."""

from __future__ import annotations

import inspect
import re

from lightning.pytorch import Trainer

from fusionlab import data, modules
from fusionlab.callbacks import FusionCallback
from fusionlab.data import ImageTasks
from fusionlab.errors import did_you_mean
from fusionlab.modules import ClipModule

QUOTED = r"'([^']+)'"


def readable(message: str) -> str:
    """One line out of a parser's message: the unknown key with its nearest, or what was expected and what came."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
    option = re.search(r"Option '([\w.]+)' is not accepted", message)
    nested = re.search(r"NestedArg\(key='([\w.]+)'", message)
    if unknown or option:
        key = (unknown or option).group(1)
        known = _known_options()
        return f"unknown key {key!r}; {did_you_mean(key, known if unknown else [k.split('.')[-1] for k in known])}"
    if wrong := _wrong_class(message):
        return wrong
    key = nested or re.search(r'arser key "([\w.]+)"', message)
    kinds = dict.fromkeys(re.findall(r"Expected an? (<class '.+?'>|typing\.\w+\[.+?\](?=\.|\s|$))", message))
    value = re.search(r"(?:Got value|Given value): (.+)", message)
    if key and kinds and value and "NestedArg" not in value.group(1):
        return f"{key.group(1)}: {_expected(list(kinds), value.group(1).strip())}"
    if nested and kinds:
        got = re.search(r"Got value: (.+)", message)
        return f"{nested.group(1)}: {_expected(list(kinds), got.group(1).strip() if got else '?')}"
    return re.sub(r"\s+", " ", message)


def _wrong_class(message: str) -> str | None:
    """One line of a class that is none, is not there, or is of another kind; None for another error."""
    given = re.search(r'arser key "(model|data)"', message), re.search(r"Given value: (.+)", message)
    if not all(given):
        return None
    key, value = (found[1].strip() for found in given)
    if kind := re.search(r"Import path does not correspond to a subclass of (\w+)", message):
        return f"{key}: {value} is no {kind[1]}"
    if "Expected a dot import path string" in message:
        known = did_you_mean(value, (modules if key == "model" else data).__all__)
        return f"{key}: no class {value!r}; {known} A class of your own is given by its path, such as my_package.Mine"
    refused = refused_class(message)
    return None if refused is None else f"{key}: {refused}"


def _expected(kinds: list[str], value: str) -> str:
    choices = [choice for kind in kinds if kind.startswith("typing.Literal[") for choice in re.findall(QUOTED, kind)]
    if choices:
        return f"no such choice {value!r}; {did_you_mean(value, choices)}"
    names = [re.sub(r"<class '(.+?)'>", r"\1", kind) for kind in kinds]
    return f"expected {' or '.join(name for name in names if name != 'NoneType')}, got {value!r}"


def _known_options() -> list[str]:
    sections = {"trainer": Trainer, "model": ClipModule, "data": ImageTasks, "fusion": FusionCallback}
    names = [f"{prefix}.{name}" for prefix, owner in sections.items() for name in inspect.signature(owner).parameters]
    own = (
        "config",
        "seed_everything",
        "overwrite",
        "output",
        "train_only",
        "dry_run",
        "harness",
        "harness_limit",
        "harness_num_fewshot",
        "checkpoint_every_n_steps",
        "start_timeout",
    )
    return [*names, *sections, *own]


def refused_class(message: str) -> str | None:
    """One line of a class that could not be made, such as a logger whose package is missing; None for another error."""
    found = re.search(r"Problem with given class_path '([\w.]+)':\s*(.+?)(?:\n  - Expected|$)", message, re.DOTALL)
    return None if found is None else f"{found[1]}: {' '.join(found[2].split())}"

"""What travels with a model's weights: the other files of its folder that are needed to load it, and its licence."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_file, is_there
from fusionlab.foreign import InnerModule, read_json_list
from fusionlab.tensors.weight_files import WEIGHT_SUFFIXES, is_outside, looks_like_weights

# about the model, not of it, but for licences, which are documents too
_DOCUMENTS = (".rst", ".html", ".pdf", ".ipynb", ".log")
_DATA = (
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".mp3", ".wav", ".jsonl", ".csv", ".tsv", ".parquet",
    ".arrow", ".zip", ".tar", ".tar.gz", ".tgz", ".bz2", ".xz", ".7z",
)  # fmt: skip
# what fusionlab and trainers write of a folder itself, and cards
_RECORDS = re.compile(
    r"^(adapter_config|fusion|fusionlab|results|trainer_state|(all|train|eval|predict|test)_results|modelcard)\.json$"
    r"|fusion_stats\.json$|\.md$|^events\.out\.|^(training_args|optimizer|scheduler|scaler|rng_state)[\w-]*\.",
    re.IGNORECASE,
)
_LICENCE = re.compile(
    r"licen[cs]e|notice|copying|copyright|use.policy|acceptable.use|terms|third.party|patents", re.IGNORECASE
)
_LICENCES = ("LICENSES", "LICENCES", "LICENSE", "LICENCE", "licenses", "licences", "license", "licence")
_MODULES = "modules.json"
_NAMED_FOLDERS = ("additional_chat_templates", "custom_generate", *_LICENCES)
# for the hub: everything of the folder itself but what can be seen by its ending not to travel
NOT_FETCHED = (*(f"*{suffix}" for suffix in (*WEIGHT_SUFFIXES, *_DATA)), "*/*")


def carried_files(folder: Path) -> list[str]:
    """What of a model's folder belongs beside other weights of the same model, by relative path, sorted.

    That is: every file of the folder itself but weights, cards, records of training, documents and data; licences; the
    folders that ``modules.json`` names, whole, and those of chat templates; where a configuration names custom code,
    all Python files, which are copied and never run.

    Raises:
        InputError: ``modules.json`` names a folder outside.
    """
    custom = has_custom_code(folder)
    with accessed(folder):
        found = {path for path in folder.iterdir() if is_file(path) and _travels(path.name, custom)}
    if custom:
        found |= {path for path in _files_below(folder) if path.suffix == ".py"}
    for named in named_folders(folder):
        found |= set(_files_below(folder / named))
    for path in found:
        with accessed(path), open(path, "rb"):  # a link whose target is gone is told now, not when it is copied
            pass
    return sorted(path.relative_to(folder).as_posix() for path in found)


def carry(folder: Path, output: Path, without: Collection[str] = ()) -> None:
    """Copy :func:`carried_files` to ``output``, but for what is there already and for files and folders ``without``.

    Links are followed; the copies have the permissions of new files.

    Raises:
        InputError: as there.
    """
    for name in carried_files(folder):
        if name.partition("/")[0] not in without and not (output / name).exists():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, output / name)
    for named in named_folders(folder):  # some are empty
        if named not in without and (folder / named).is_dir():
            (output / named).mkdir(parents=True, exist_ok=True)


def named_folders(folder: Path) -> list[str]:
    """The folders below that travel whole: of the modules that ``modules.json`` names, chat templates and licences.

    Raises:
        InputError: ``modules.json`` names a folder outside.
    """
    inner = [path for module in _modules(folder) if isinstance(path := module.get("path"), str) and path]
    if outside := [path for path in inner if is_outside(path)]:
        raise InputError(f"{str(folder / _MODULES)!r} points outside its folder: {name_list(outside)}.")
    return [*_NAMED_FOLDERS, *inner]


def has_custom_code(folder: Path) -> bool:
    """Whether the folder's configurations name Python classes of its own: by ``auto_map``, or as modules."""
    own = (str(module.get("type")).partition(".")[0] != "sentence_transformers" for module in _modules(folder))
    return any(own) or any(b'"auto_map"' in _content(path) for path in folder.glob("*config*.json"))


def _content(path: Path) -> bytes:
    with accessed(path):
        return path.read_bytes() if is_file(path) else b""


def _modules(folder: Path) -> list[dict[str, Any]]:
    """What ``modules.json`` lists; nothing where it is absent, or another tool's."""
    path = folder / _MODULES
    return read_json_list(path, InnerModule) if is_there(path) else []


def _travels(name: str, custom: bool) -> bool:
    if name.startswith(".") or name.lower().startswith("readme") or looks_like_weights(name):
        return False
    if _LICENCE.search(name):
        return True
    return not (
        _RECORDS.search(name) or name.lower().endswith(_DOCUMENTS + _DATA) or (name.endswith(".py") and not custom)
    )


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in files if is_file(path := Path(parent) / name))

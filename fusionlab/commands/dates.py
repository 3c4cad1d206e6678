"""The date that chat templates write: one for a run, and for all that is done with it later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date as day
from pathlib import Path
from typing import Any

from fusionlab.data import ChatTasks
from fusionlab.files import path_of
from fusionlab.layout import ADAPTERS, CONFIG, FINETUNED, FUSED, PARTS
from fusionlab.runs.folder import RunFolder
from fusionlab.search.workbench import class_given


def settle_date(command: str, config: Any, *, overwrite: bool) -> None:
    """Put the date of the run into a command's configuration where it gives none, else today's.

    Args:
        command: ``fit`` has to do with the run that it writes, the others with that of the weights they are given.
        config: the command's configuration, with its run folder.
        overwrite: whether the run begins anew.
    """
    if not _writes_dates(config.data) or config.data.init_args.get("date") is not None:
        return
    folders = [] if overwrite else [Path(config.trainer.default_root_dir)]
    if command != "fit":
        weights = config.model.init_args.get("weights")
        place = path_of(weights).parent if isinstance(weights, str) else Path()
        folders = [place.parent] if place.name in (ADAPTERS, FINETUNED, FUSED) else []
    config.data.init_args.date = date_of(folders)


def dated(config: Mapping[str, Any], folders: Iterable[Path]) -> dict[str, Any]:
    """A configuration of ``fit`` with a date where its data's templates may write one.

    Args:
        config: what a run is fitted with.
        folders: of the runs that are to have one date.
    """
    data = dict(config.get("data") or {})
    arguments = dict(data.get("init_args") or {})
    if not _writes_dates(data) or arguments.get("date") is not None:
        return dict(config)
    return {**config, "data": {**data, "init_args": {**arguments, "date": date_of(folders)}}}


def date_of(folders: Iterable[Path]) -> str:
    """The date that runs, or parts of them, were begun with; today's where none was."""
    for folder in folders:
        for path in (folder, *sorted((folder / PARTS).glob("*"))):
            config = RunFolder(path).config() if (path / CONFIG).is_file() else {}
            arguments = dict((config.get("data") or {}).get("init_args") or {})
            if _writes_dates(config.get("data") or {}) and arguments.get("date") is not None:
                return str(arguments["date"])
    return day.today().isoformat()


def _writes_dates(data: Mapping[str, Any]) -> bool:
    """Whether data of this configuration go through chat templates."""
    given = class_given("data", data) if "class_path" in data else None
    return isinstance(given, type) and issubclass(given, ChatTasks)

"""Whether the runs of a sweep are scored alike: one module and one data module score them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusionlab.commands.sweep.sources import RunSource
from fusionlab.contracts import Module, as_module
from fusionlab.errors import InputError, name_list
from fusionlab.keys import key_of, plain
from fusionlab.modules import FusionModule
from fusionlab.runs.folder import differing
from fusionlab.search.workbench import Workbench, attached_module, class_given, parser_of, trainer_of

_OF_MODULES = ("evaluation", "ranking", "max_new_tokens", "dtype")  # what decides a score; the rest only trains
_OF_TRAINING = ("batch_size", "eval_batch_size", "packing", "cache_dir", "seed")  # what of data decides none


def check_scored_alike(sources: Sequence[RunSource], bench: Workbench) -> None:
    """Raise if a run asks to be scored in another way than the first one, by whose settings all are scored.

    Args:
        sources: the runs.
        bench: module and data of the first.

    Raises:
        InputError: the keys that differ, with both values.
    """
    first = sources[0].configs[0]
    own, seen = _deciding(sources[0], first), {_model_of(first)}
    for source, config in ((each, config) for each in sources for config in each.configs):
        found = differing(own, _deciding(source, config))
        if not found and _is_foreign(config) and (key := _model_of(config)) not in seen:
            seen.add(key)
            found = differing(_settings(bench.module, bench), _settings(as_module(attached_module(config)), bench))
        if found:
            told = [f"{key} ({before!r} of {sources[0].name}, {now!r})" for key, (before, now) in found.items()]
            raise InputError(
                f"{source.name} would be scored in another way than the other runs: {name_list(told)}; give all the "
                f"same, or sweep them apart"
            )


def _deciding(source: RunSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides scores, defaults filled in; of a given run's data the rows tell the version."""
    model, precision = _filled("model", config), (config.get("trainer") or {}).get("precision")
    found: dict[str, Any] = {"trainer": {"precision": trainer_of({"trainer": {"precision": precision}}).precision}}
    if not _is_foreign(config):
        found["model"] = {name: value for name, value in model.items() if name in _OF_MODULES}
    if source.config is not None:
        data = _filled("data", config)
        found["data"] = {name: value for name, value in data.items() if name not in _OF_TRAINING}
        found["classes"] = {key: class_given(key, config.get(key) or {}).__name__ for key in ("model", "data")}
        found |= {} if _is_foreign(config) else {"backbone": model["backbone"]}
    return found


def _filled(key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get(key) or {}
    defaults: dict[str, Any] = parser_of(class_given(key, given))[0].get_defaults().as_dict()
    return defaults | (given.get("init_args") or {})


def _is_foreign(config: Mapping[str, Any]) -> bool:
    return not issubclass(class_given("model", config["model"]), FusionModule)


def _model_of(config: Mapping[str, Any]) -> str:
    return key_of(plain(_filled("model", config)))


def _settings(module: Module, bench: Workbench) -> dict[str, Any]:
    """What a module of another package says that decides its scores."""
    if module is not bench.module:
        module.prepare_tasks(bench.data.tasks)
    return {"scoring_settings": {task: plain(module.scoring_settings(task)) for task in bench.data.tasks}}

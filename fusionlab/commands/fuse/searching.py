"""Rules that look at data, for ``fuse``: the models are run on data that the recipe names, then fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionlab import rules
from fusionlab.commands.fuse.offline import UNTUNED, Prepared, prepare
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.commands.fuse.routing import Made, check_routed
from fusionlab.errors import InputError, name_list
from fusionlab.layout import HEADS
from fusionlab.memory import parse_size
from fusionlab.rules.config import known_rules, known_task_known_rules
from fusionlab.rules.routed import RoutedMlps
from fusionlab.tensors.masked import MaskedVectors
from fusionlab.tensors.stats import adapter_files

if TYPE_CHECKING:
    from fusionlab.fusion.finetuned import Finetuned
    from fusionlab.search import Search, TrainingRuns
    from fusionlab.search.workbench import Workbench

_STAND_IN = rules.to_config(rules.TaskArithmetic(UNTUNED))
"""What is checked in the place of a rule that is not found yet."""


def search_of(recipe: Recipe) -> Search | None:
    """The search that the recipe's rule names, or that an open rule becomes where there is something to look at.

    None for rules that look at no data; nothing heavy is imported for those.

    Raises:
        InputError: a search, or an open rule, without model or data; or these beside a rule that looks at none.
    """
    given = [name for name in ("model", "data") if getattr(recipe, name) is not None]
    missing = [name for name in ("model", "data") if name not in given]
    name = recipe.rule if isinstance(recipe.rule, str) else str(recipe.rule.get("class_path"))
    if name.rpartition(".")[2] not in _names_of_rules():
        from fusionlab.search import is_search, search_from_config

        if is_search(recipe.rule):
            if missing:
                raise InputError(
                    f"rule {name} looks at data; give {' and '.join(missing)}, as fit has them "
                    f"(--model ClipModule --data ImageTasks --data.tasks ...)."
                )
            return search_from_config(recipe.rule)
    rule = rules.from_config(recipe.rule)
    without = isinstance(rule, rules.Tall) and rule.mask_threshold is None
    if given and not (rules.is_open(rule) or without):
        raise InputError(f"{' and '.join(given)}: rule {name} looks at no data; leave them out.")
    if not given:
        return None
    if missing:
        raise InputError(f"{missing[0]}: needed beside {given[0]} to choose the coefficient of {name} on validation.")
    from fusionlab.search import Validated, ValidatedMasks

    return ValidatedMasks() if without else Validated(rule)


def with_rule_found(recipe: Recipe, search: Search) -> Prepared:
    """Run the search on the recipe's models and data; the recipe with the rule that it found, ready to be fused.

    Raises:
        InputError: what :func:`fusionlab.commands.fuse.offline.prepare` refuses; models that do not fit into the memory
            budget beside one another; a model or data that do not fit the inputs.
    """
    from fusionlab.search import ValidationProblem, to_config, validation_rows

    looking = look(recipe, search)
    bench, finetuned = looking.bench, looking.finetuned
    problem = ValidationProblem(
        finetuned.tasks,
        finetuned,
        bench.module,
        bench.data,
        lambda tried: validation_rows(bench.module, bench.data, finetuned, tried),
        looking.training,
    )
    found = search.search(problem)
    record = {"search": to_config(search) | found.looked_at}
    if isinstance(found.rule, RoutedMlps):
        made = Made(finetuned.inputs(finetuned.tasks).fuse(found.rule), bench.module.backbone)
        return replace(looking.prepared, found=record, made=made, as_adapter=False, carried=())
    return replace(prepare(recipe, found.rule), found=record)


def _names_of_rules() -> set[str]:
    known = known_rules() | known_task_known_rules()
    return {*known, *(rule.__name__ for rule in known.values())}


@dataclass(frozen=True)
class Looking:
    """What a search looks at.

    Args:
        prepared: the recipe with a rule in the search's place.
        bench: module and data.
        finetuned: the fine-tuned weights in memory.
        needed: bytes that the models take beside one another.
        split: of the data, that is looked at.
        training: the models on training inputs, for a search that looks at those.
    """

    prepared: Prepared
    bench: Workbench
    finetuned: Finetuned
    needed: int
    split: str
    training: TrainingRuns | None

    def describe(self) -> str:
        """What is looked at, for ``--dry_run``."""
        sizes = {task: len(self.bench.data.splits[task][self.split]) for task in self.finetuned.tasks}
        told = ", ".join(f"{size} of {task}" for task, size in sizes.items())
        return (
            f"looks at        {self.split} samples: {told}; models in memory {self.needed:,} bytes; the rule above "
            f"stands in the place of what is found"
        )


def look(recipe: Recipe, search: Search) -> Looking:
    """Open and check all that the search looks at; see :func:`with_rule_found`."""
    from fusionlab.commands.arguments import check_arguments
    from fusionlab.fusion.by_task import weights_of
    from fusionlab.fusion.finetuned import Finetuned
    from fusionlab.runs.loading import load_weights
    from fusionlab.search import Running, TrainingRuns, Wemoe, check_data, check_module
    from fusionlab.search.workbench import workbench

    if isinstance(search, Wemoe):
        check_routed(recipe)
    prepared = prepare(replace(recipe, rule=_STAND_IN))
    needed = _bytes_in_memory(prepared)
    _check_budget(recipe, needed)
    config = {"model": _model_of(recipe), "data": _with_class(recipe.data)}
    check_arguments(config)
    bench = workbench(config, _runs(prepared))
    missing = [task for task in prepared.inputs if task not in bench.data.tasks]
    if missing or len(bench.data.tasks) != len(prepared.inputs):
        raise InputError(
            f"data: the tasks are {name_list(bench.data.tasks)}, and finetuned has {name_list(prepared.inputs)}; they "
            f"must be the same."
        )
    check_data({"rule": search}, bench.data)
    check_module({"rule": search}, bench.module, bench.data)
    base, name = bench.module.base_model, bench.module.backbone.name
    insist = recipe.allow_other_base
    weights = {
        task: load_weights(each.path, base, base_name=name, allow_other_base=insist).weights
        for task, each in prepared.inputs.items()
    }
    weights = {
        task: weights_of(each, task, base) if isinstance(each, MaskedVectors) else each
        for task, each in weights.items()
    }
    finetuned, training = Finetuned(bench.module, weights), None
    if isinstance(search, Running):
        training = TrainingRuns(finetuned, bench.module, bench.data)
        needed += search.bytes_needed(training)
        _check_budget(recipe, needed)
    return Looking(prepared, bench, finetuned, needed, search.split, training)


def _check_budget(recipe: Recipe, needed: int) -> None:
    budget = parse_size(recipe.memory_budget, "memory_budget")
    if needed > budget:
        raise InputError(
            f"memory_budget: the models that are run on data take {needed:,} bytes beside one another, and the budget "
            f"is {budget:,}; raise it, or find the coefficients in fit or sweep."
        )


def _bytes_in_memory(prepared: Prepared) -> int:
    """The base, each input and one fused model, in float32."""
    base = 4 * sum(info.numel for info in prepared.base.weights.tensors.values())
    adapters = [each for each in prepared.inputs.values() if each.adapter is not None]
    files = sum(file.stat().st_size for each in adapters for file in adapter_files(each.path))
    return base * (2 + len(prepared.inputs) - len(adapters)) + files


def _runs(prepared: Prepared) -> list[Path]:
    """The run folders that the inputs lie in, whose heads belong to them."""
    parents = dict.fromkeys(each.path.resolve().parents[1] for each in prepared.inputs.values())
    return [parent for parent in parents if (parent / HEADS).is_dir()]


def _with_class(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    return {"class_path": given} if isinstance(given, str) else dict(given or {})


def _model_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's module on the recipe's base."""
    model = _with_class(recipe.model)
    own = dict(model.get("init_args") or {})
    if own.setdefault("backbone", recipe.base) != recipe.base:
        raise InputError(f"model.backbone: {own['backbone']!r} is not the recipe's base {recipe.base!r}; leave it out.")
    return model | {"init_args": own}

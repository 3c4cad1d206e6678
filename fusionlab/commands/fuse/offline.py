"""A recipe from files to a folder: everything is opened and checked first, then fused and written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusionlab import rules
from fusionlab.commands.fuse import report
from fusionlab.commands.fuse.chat import chat_notes
from fusionlab.commands.fuse.checks import check_disk, check_memory, tie_notes, try_rule
from fusionlab.commands.fuse.inputs import (
    check_vocabularies,
    fused_parts,
    of_one_base,
    open_base,
    open_input,
    with_adapter,
)
from fusionlab.commands.fuse.kept_norms import keep_sums, known_sums
from fusionlab.commands.fuse.masks import check_masks, unified_dtype, unified_tensors, write_masks
from fusionlab.commands.fuse.matrix_rules import (
    check_ranks,
    fuse_cores,
    in_core_space,
    names_on_disk,
    transposed,
)
from fusionlab.commands.fuse.opened import Opened
from fusionlab.commands.fuse.prepared import Prepared
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.commands.fuse.routing import write_made
from fusionlab.engine import (
    CastWeights,
    Job,
    Outcome,
    Resources,
    TensorInfo,
    make_plan,
    run,
)
from fusionlab.engine.job import cache_bytes_of
from fusionlab.errors import InputError
from fusionlab.files import check_writable, path_of, write_folder
from fusionlab.fusion.streamed import adapted_units, output_dtype, write_weights
from fusionlab.fusion.units import UnitWeights
from fusionlab.memory import parse_size
from fusionlab.rules import LinearRule, StreamedRule, TaskKnownRule
from fusionlab.rules.by_tensor import ByTensor
from fusionlab.rules.matrix_rule import has_core
from fusionlab.tensors.dtypes import dtype_of
from fusionlab.tensors.identity import Ties
from fusionlab.tensors.lazy import NamedWeights
from fusionlab.tensors.parts import ignored

UNTUNED = 0.3


def prepare(recipe: Recipe, found: StreamedRule | None = None) -> Prepared:
    """Open and check everything that can be checked from headers; nothing is written.

    Args:
        recipe: what is to be done.
        found: the rule in the place of the recipe's, which is a search that found it.

    Raises:
        InputError: inputs that are missing, corrupt or do not fit, a rule that does not fit them, an output that
            exists, or too little disk or memory.
    """
    output = path_of(recipe.output)
    check_writable(output)
    rule, notes = _rule(recipe.rule if found is None else found, recipe)
    base = open_base(recipe.base, recipe.variant)
    budget = parse_size(recipe.memory_budget, "memory_budget")
    cache_bytes = cache_bytes_of(budget, len(recipe.finetuned))
    inputs = {
        task: open_input(task, name, base, cache_bytes, recipe.variant, allow_other_base=recipe.allow_other_base)
        for task, name in recipe.finetuned.items()
    }
    inputs = of_one_base(inputs, base)
    notes += [note for opened in inputs.values() for note in opened.notes]
    base, inputs, written = _one_vocabulary(recipe, base, inputs, notes)
    if recipe.mismatched_tensors == "error":
        check_vocabularies(base, inputs)
    if recipe.hash and not recipe.dry_run:
        base = replace(base, with_content=True)
        inputs = {task: replace(opened, with_content=True) for task, opened in inputs.items()}
    job, untied = _job(recipe, rule, base, inputs)
    inputs = fused_parts(job, inputs)
    tensors = _output_tensors(job, base)
    resources = Resources(recipe.threads or len(os.sched_getaffinity(0)), budget)
    as_adapter = _as_adapter(recipe, rule, inputs)
    prepared = Prepared(recipe, base, inputs, job, tensors, as_adapter, resources, untied, tuple(notes))
    prepared = replace(prepared, tokenizer=written[0], chat_template=written[1])
    check_memory(rule, prepared.peak, resources)
    check_disk(output, prepared.output_bytes)
    try_rule(job)
    check_ranks(job, inputs)
    if has_core(rule) and prepared.in_core_space and rule.over_adapters:
        notes.append(rule.over_adapters)
    if isinstance(rule, ByTensor):
        notes += [f"{line}: it is for none of the tensors" for line in rule.unused(job.statistics({}))]
    notes += [*tie_notes(base, untied), *report.unread_notes(base, inputs), *report.tokenizer_notes(base, inputs)]
    notes += chat_notes(recipe, base, inputs, as_adapter=as_adapter)
    return replace(prepared, notes=tuple(notes), carried=report.carried(prepared))


def _one_vocabulary(
    recipe: Recipe, base: Opened, inputs: dict[str, Opened], notes: list[str]
) -> tuple[Opened, dict[str, Opened], tuple[Any, str | None]]:
    """The models with the rows of one vocabulary, where that is asked for; and the tokenizer and template to write."""
    if recipe.tokenizer is None and recipe.chat_template is None:
        return base, inputs, (None, None)
    from fusionlab.commands.fuse.tokens import aligned, chat_template  # imports transformers, which takes seconds

    template = None if recipe.chat_template is None else chat_template(recipe.chat_template, {"": base, **inputs})
    if recipe.tokenizer is None:
        return base, inputs, (None, template)
    found = aligned(recipe.tokenizer, base, inputs)
    notes.append(found.note)
    return found.base, dict(found.inputs), (found.tokenizer, template)


def fuse_folder(prepared: Prepared, advance: Callable[[int], None] | None = None) -> str:
    """Fuse and write the output folder, whole or not at all; returns a summary for the terminal.

    Raises:
        InputError: NaN or Inf in an input, task vectors that are all zero, an output that appeared, a full disk.
    """
    started = time.monotonic()
    resources = replace(prepared.resources, on_bytes=advance)
    with write_folder(prepared.output) as staging:
        outcome: report.Fusion
        if prepared.made is not None:
            outcome, details = write_made(prepared.made, staging)
        elif prepared.as_adapter:
            outcome, details = _write_adapter(prepared, staging, resources)
        elif prepared.as_masks:
            outcome, details = write_masks(prepared, staging, resources)
        else:
            outcome, details = _write_weights(prepared, staging, resources), {}
        record = report.fusion_record(prepared, outcome, {**details, **prepared.found})
        report.write_reports(staging, prepared, record)
        if prepared.tokenizer is not None or prepared.chat_template is not None:
            from fusionlab.commands.fuse.tokens import write_tokenizer

            write_tokenizer(staging, prepared.tokenizer, prepared.chat_template)
    is_measured = prepared.recipe.input_dtype is None  # of the inputs as they are
    kept = isinstance(outcome, Outcome) and is_measured
    notes = keep_sums(prepared.base, prepared.inputs, prepared.job.plan, outcome) if kept else []
    return report.summary_text(prepared, record, time.monotonic() - started, notes)


def _rule(given: str | Mapping[str, Any] | StreamedRule, recipe: Recipe) -> tuple[StreamedRule, list[str]]:
    rule, notes = rules.from_config(given), []
    if isinstance(rule, TaskKnownRule):
        check_masks(recipe, rule)
        whole = rules.with_usual_threshold(rule)
        usual = "no mask_threshold was given: 0.4, the usual one without a search, was taken"
        return whole, [usual] if whole != rule else []
    if rules.is_open(rule):
        rule = rules.with_coefficient(rule, UNTUNED)
        notes.append(f"no scaling_coefficient was given: {UNTUNED}, the usual one without tuning, was taken")
    return rule, notes


def _job(
    recipe: Recipe, rule: StreamedRule, base: Opened, inputs: Mapping[str, Opened]
) -> tuple[Job, Mapping[str, str]]:
    dtype, input_dtype = dtype_of(recipe.dtype, "dtype"), dtype_of(recipe.input_dtype, "input_dtype")
    task_inputs = {task: opened.task_input for task, opened in inputs.items()}
    names = dict.fromkeys(name for opened in (base, *inputs.values()) for name in opened.weights.tensors)
    ties = Ties.between(base.architecture.may_be_tied(names), base.weights, task_inputs)
    stored = NamedWeights(base.weights, ties.names(base.weights, task_inputs))
    weights = stored
    if input_dtype is not None:
        weights = NamedWeights(CastWeights(base.weights, input_dtype), stored.names)
        task_inputs = {
            task: item if item.is_task_vector else replace(item, weights=CastWeights(item.weights, input_dtype))
            for task, item in task_inputs.items()
        }
    units = UnitWeights(weights)
    if all(opened.adapter is not None for opened in inputs.values()):
        adapters = {task: (opened.adapter, opened.names) for task, opened in inputs.items()}
        cache_bytes = cache_bytes_of(parse_size(recipe.memory_budget, "memory_budget"), len(inputs))
        units, task_inputs = adapted_units(weights, adapters, cache_bytes)
    how, is_ignored = recipe.mismatched_tensors, ignored(base.architecture)
    plan = make_plan(units, task_inputs, mismatched_tensors=how, ties=ties, is_ignored=is_ignored)
    infos = {name: stored.tensors[units.place(name)[0]] for name in units.tensors}
    if isinstance(rule, TaskKnownRule):
        dtypes = {name: unified_dtype(info, dtype) for name, info in infos.items()}
    else:
        dtypes = {name: output_dtype(info, dtype) for name, info in infos.items()}
    looked_up = input_dtype is None and not (recipe.hash and recipe.dry_run)  # a dry run reads no content
    known = known_sums(base, inputs, plan) if looked_up else {}
    sides = transposed(rule, base, plan)
    return Job(rule, units, task_inputs, plan, dtypes, known, recipe.cosines, sides), ties.apart


def _output_tensors(job: Job, base: Opened) -> dict[str, TensorInfo]:
    """What to write: all names of the base, but for those that only a pickle holds twice and loading ties again.

    Of a rule that needs the task, what is fused.
    """
    if isinstance(job.rule, TaskKnownRule):
        return unified_tensors(job)
    dropped = job.plan.aliases if base.files[0].suffix != ".safetensors" else {}
    assert isinstance(job.base, UnitWeights)
    kept = {name: info for name, info in job.base.stored.tensors.items() if name not in dropped}
    return {name: TensorInfo(info.shape, job.dtypes[job.base.first_unit(name)]) for name, info in kept.items()}


def _as_adapter(recipe: Recipe, rule: StreamedRule, inputs: Mapping[str, Opened]) -> bool:
    full = [task for task, opened in inputs.items() if opened.adapter is None]
    possible = not full and (isinstance(rule, LinearRule) or in_core_space(rule, inputs))
    if recipe.save == "adapter" and not possible:
        why = f"{full[0]!r} is a full model" if full else f"{rules.rule_name(rule)} makes none of adapters"
        raise InputError(
            f"save: an adapter needs adapters and a linear rule, or one on matrices, but {why}; say save: weights."
        )
    as_adapter = possible and recipe.save != "weights"
    if as_adapter and recipe.chat_template is not None:
        raise InputError("chat_template: a fused adapter has its base's; say save: weights to merge it into weights.")
    if as_adapter and (recipe.dtype or recipe.input_dtype):
        raise InputError("dtype: a fused adapter is float32; say save: weights to merge it into weights of a dtype.")
    if recipe.rank is not None and not as_adapter:
        raise InputError("rank: only a fused adapter can be cut down to a rank; here full weights are written.")
    return as_adapter


def _write_weights(prepared: Prepared, staging: Path, resources: Resources) -> Outcome:
    shard, job, of_cores = parse_size(prepared.recipe.max_shard_size, "max_shard_size"), prepared.job, None
    if prepared.in_core_space:
        adapter, of_cores = fuse_cores(job, prepared.inputs, resources)
        first, names = next(iter(prepared.inputs.values())), names_on_disk(prepared.inputs)
        merged = with_adapter(first, adapter, names, resources.memory_budget // 4)
        job, _ = _job(prepared.recipe, rules.TaskArithmetic(1.0), prepared.base, {"fused": merged})
    outcome = write_weights(job, prepared.tensors, staging, shard, resources)
    if of_cores is None:
        return outcome
    return replace(of_cores, updated=outcome.updated, survived=outcome.survived, exact=outcome.exact)


def _write_adapter(prepared: Prepared, staging: Path, resources: Resources) -> tuple[Outcome, dict[str, Any]]:
    from fusionlab.adapters import combine, save_fused_adapter
    from fusionlab.adapters.same_base import layers_hash, layers_of

    names = names_on_disk(prepared.inputs)
    if prepared.in_core_space:
        fused, outcome = fuse_cores(prepared.job, prepared.inputs, resources)
    else:
        outcome = run(prepared.job, None, resources)
        own_names = {on_disk: name for name, on_disk in names.items()}
        coefficients = {own_names.get(name, name): of for name, of in outcome.coefficients.items()}
        fused = combine({task: opened.adapter for task, opened in prepared.inputs.items()}, coefficients)
    assert isinstance(prepared.job.base, UnitWeights)
    details: dict[str, Any] = {"base_hash": layers_hash(layers_of(prepared.job.base.stored, fused, names))}
    fused = replace(fused, base_model=fused.base_model or prepared.recipe.base)
    ranks, error = save_fused_adapter(staging, fused, prepared.recipe.rank)
    if prepared.recipe.rank is not None:
        details["truncation_error"] = error
    every = sorted(set(ranks.values()))
    details["rank"] = every[0] if len(every) == 1 else every
    return outcome, details

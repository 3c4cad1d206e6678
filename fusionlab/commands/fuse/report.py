"""What a fusion says of itself: the plan, ``fusion.json``, the model card, the files carried over, the summary."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from fusionlab import rules
from fusionlab.cards import Origin, routed, write_card
from fusionlab.cards.masks import sizes_text
from fusionlab.commands.fuse.opened import Opened
from fusionlab.commands.fuse.prepared import Prepared
from fusionlab.commands.fuse.vocabulary import new_tokens
from fusionlab.engine.job import num_reads
from fusionlab.errors import name_list
from fusionlab.foreign import read_json
from fusionlab.layout import FUSION
from fusionlab.rules.by_tensor import ByTensor
from fusionlab.tensors.companions import carried_files, carry
from fusionlab.tensors.dtypes import say_dtype
from fusionlab.tensors.weight_files import EXPLICIT

_SERVED_RANK = 16  # vLLM's max_lora_rank
_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")


class Fusion(Protocol):
    """What is told of a fusion, streamed or in memory."""

    @property
    def scaling_coefficients(self) -> Mapping[str, Any]: ...

    @property
    def norms(self) -> Mapping[str, float]: ...

    @property
    def cosines(self) -> Mapping[str, Mapping[str, float]]: ...

    @property
    def remarks(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def rounding(self) -> Mapping[str, Any]: ...


def plan_text(prepared: Prepared) -> str:
    """What would be done, with every number that was checked."""
    plan, tensors = prepared.job.plan, prepared.job.base.tensors
    elements = sum(tensors[name].numel for name in plan.fused)
    needed, what = prepared.peak
    lines = [
        f"rule            {_rule_text(prepared)}",
        *(f"by tensor       {line}" for line in _by_tensor(prepared)),
        f"base            {prepared.base.name}: {len(tensors)} tensors, {_size(tensors)}",
        *(f"finetuned       {task}: {_input_text(opened)}" for task, opened in prepared.inputs.items()),
        f"fused           {len(plan.fused)} tensors, {elements:,} elements",
        *(f"averaged        {name_list(plan.averaged)}: BatchNorm's statistics" for _ in plan.averaged[:1]),
        *(f"from the base   {text}" for text in _reasons(plan.copied)),
        *(f"tied            {name} is {first}" for name, first in plan.aliases.items()),
        *(f"not used        {task}: {name_list(names)}" for task, names in plan.ignored.items()),
        f"reads           {num_reads(prepared.job)} over the inputs, {prepared.bytes_to_read / 1e9:.2f} GB",
        f"writes          {prepared.output}: {_output_text(prepared)}",
        *([f"carries         {name_list(prepared.carried, 20)}"] if prepared.carried else []),
        f"memory          at least {needed:,} bytes for {what}, budget {prepared.resources.memory_budget:,}",
        *([f"forecast        {prepared.forecast}"] if prepared.forecast is not None else []),
        *(f"note            {note}" for note in prepared.notes),
        "not yet checked what only values tell: NaN and Inf, norms of zero",
        "everything fits; nothing was written (--dry_run).",
    ]
    return "\n".join(lines)


def fusion_record(prepared: Prepared, outcome: Fusion, details: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``fusion.json``."""
    plan = prepared.job.plan
    name = rules.rule_name(prepared.rule)
    row = {
        "model": "fused",
        "rule": name,
        "scaling_coefficients": outcome.scaling_coefficients,
        "fused_tasks": list(prepared.inputs),
    }
    if prepared.as_masks:
        row["task_known"] = True
    record = {
        "schema": 1,
        "rule": rules.to_config(prepared.rule),
        "base": _provenance(prepared.base),
        "finetuned": {task: _provenance(item) for task, item in prepared.inputs.items()},
        "scaling_coefficients": outcome.scaling_coefficients,
        "norms": outcome.norms,
        "cosines": outcome.cosines,
        "tensors": {
            "fused": len(plan.fused),
            "elements": sum(prepared.job.base.tensors[name].numel for name in plan.fused),
            "from_base": dict(plan.copied),
            "averaged": list(plan.averaged),
            "tied": dict(plan.aliases),
            "not_used": {task: list(names) for task, names in plan.ignored.items()},
            "counted": "norms count every fused tensor once, embeddings included; integer buffers are not fused, "
            "and statistics of BatchNorm are averaged, whatever the rule is",
        },
        "carried": list(prepared.carried),
        "space": "delta_weight",
        **details,
        "notes": list(prepared.notes),
        "remarks": outcome.remarks,
        "row": row,
        "versions": {name: version(name) for name in ("fusionlab", "torch")} | {"python": platform.python_version()},
    }
    if prepared.recipe.allow_other_base:
        record["allow_other_base"] = True
    if not prepared.as_adapter:
        record |= outcome.rounding
    return record


def write_reports(folder: Path, prepared: Prepared, record: Mapping[str, Any]) -> None:
    """Write ``fusion.json`` and the card beside the weights, and what full weights need from the base's folder."""
    (folder / FUSION).write_text(json.dumps(record, indent=2) + "\n")
    source = _model_folder(prepared)
    if source is not None:
        _write_companions(folder, prepared, source)
    write_card(folder, _origin(prepared))


def _write_companions(folder: Path, prepared: Prepared, source: Path) -> None:
    """Write what full weights need from the base's folder."""
    carry(source, folder)
    config = folder / "config.json"
    if config.is_file():
        own = dict(prepared.base.config) if prepared.base.is_remade else read_json(config)
        content = prepared.base.architecture.untied_config() if prepared.untied else own
        content.pop(EXPLICIT, None)  # names the base's own weights
        if content != read_json(config):
            config.write_text(json.dumps(content, indent=2) + "\n")
    say_dtype(folder, prepared.dtype)


def carried(prepared: Prepared) -> tuple[str, ...]:
    """What travels from the base's folder, by relative path.

    Raises:
        InputError: ``modules.json`` there names a folder outside.
    """
    source = _model_folder(prepared)
    return () if source is None else tuple(carried_files(source))


def _model_folder(prepared: Prepared) -> Path | None:
    """The base's folder, whose other files travel with full weights; None for a lone file and what lies over it."""
    path = prepared.base.path
    folder = path if path.is_dir() else path.parent
    over_base = prepared.as_adapter or prepared.as_masks or prepared.made is not None
    return None if over_base or not (path.is_dir() or prepared.base.config) else folder


def unread_notes(base: Opened, inputs: Mapping[str, Opened]) -> list[str]:
    """What looks like weights beside the files that are read; ``fusion.json`` has all of it."""
    every = {"the base": base, **{repr(task): opened for task, opened in inputs.items()}}
    return [f"not read in {what}: {name_list(opened.unread, 20)}" for what, opened in every.items() if opened.unread]


def tokenizer_notes(base: Opened, inputs: Mapping[str, Opened]) -> list[str]:
    """Inputs whose tokenizers differ from the base's, which is the one that is kept."""
    notes = []
    for task, opened in inputs.items():
        if not (opened.path.is_dir() and base.path.is_dir()):
            continue
        pairs = [(base.path / name, opened.path / name) for name in _TOKENIZER]
        both = [(ours, theirs) for ours, theirs in pairs if ours.is_file() and theirs.is_file()]
        different = [ours.name for ours, theirs in both if ours.read_bytes() != theirs.read_bytes()]
        if more := new_tokens(opened.path, base.path):
            notes.append(
                f"the tokenizer of {task!r} knows {len(more)} tokens that the base's, which is kept, does not: "
                f"{name_list(more)}"
            )
        elif different and opened.adapter is None:
            notes.append(f"{name_list(different)} of {task!r} differs from the base's, which is carried over")
    return notes


def summary_text(prepared: Prepared, record: Mapping[str, Any], seconds: float, notes: Iterable[str]) -> str:
    """The result in a few lines."""
    lines = [f"fused {len(prepared.inputs)} models by {_rule_text(prepared)} in {seconds:.1f} s"]
    coefficients = record["scaling_coefficients"]
    for task, norm in record["norms"].items():
        value = coefficients.get(task)
        text = f", coefficient {value:.4f}" if isinstance(value, float) else ""
        lines.append(f"  {task}: norm {norm:.4g}{text}")
    if "rounding" in record and not prepared.as_masks:
        lines.append(f"  {record['rounding']['survived']:.1%} of the updated weights differ from the base as stored")
    rank = max(record["rank"]) if isinstance(record.get("rank"), list) else record.get("rank", 0)
    if "truncation_error" in record:
        lines.append(f"  rank {rank}: relative truncation error {record['truncation_error']:.3g}")
    elif rank > _SERVED_RANK:
        lines.append(f"  rank {rank}: an engine that allots {_SERVED_RANK} by default must be given as much; or --rank")
    if prepared.as_masks:
        lines.append(f"  {sizes_text(record['masks'])}")
    if prepared.made is not None:
        lines.append(f"  {routed.sizes_text(record['routed'])}")
    if record["remarks"]:
        lines.append(f"  note: fusion.json has remarks on {name_list(record['remarks'], 3)}")
    lines += [f"  note: {note}" for note in (*prepared.notes, *notes)]
    return "\n".join([*lines, f"wrote {prepared.output}"])


def _provenance(opened: Opened) -> dict[str, Any]:
    kind = "masks" if opened.is_masked else "weights"
    kind = kind if opened.adapter is None else f"adapter ({opened.adapter.method})"
    found = {"name": opened.name, "kind": kind, "fingerprint": opened.fingerprint, "files": opened.records}
    return found | ({"not_read": list(opened.unread)} if opened.unread else {})


def _origin(prepared: Prepared) -> Origin:
    """What the card tells beside the folder's own files."""
    path = prepared.base.path
    folder = path if path.is_dir() else None
    models = {task: opened.name for task, opened in prepared.inputs.items()}
    return Origin(prepared.base.name, folder, prepared.output.name, models=models)


def _by_tensor(prepared: Prepared) -> list[str]:
    rule = prepared.job.rule
    return rule.table(prepared.job.statistics({})) if isinstance(rule, ByTensor) else []


def _rule_text(prepared: Prepared) -> str:
    config = rules.to_config(prepared.rule)
    given = {key: value for key, value in config["init_args"].items() if value is not None}
    return f"{rules.rule_name(prepared.rule)} {json.dumps(given)}" if given else rules.rule_name(prepared.rule)


def _input_text(opened: Opened) -> str:
    if opened.adapter is None:
        return f"{opened.name}: {len(opened.weights.tensors)} tensors, {_size(opened.weights.tensors)}"
    ranks = sorted(set(opened.adapter.ranks.values()))
    return f"{opened.name}: {opened.adapter.method} adapter of {len(opened.adapter.factors)} modules, rank {ranks}"


def _output_text(prepared: Prepared) -> str:
    what = "an adapter" if prepared.as_adapter else f"{len(prepared.tensors)} tensors"
    if prepared.as_masks:
        what = f"a unified vector of {what} and masks of {len(prepared.inputs)} bits an entry"
    return f"{what}, {prepared.output_bytes / 1e9:.2f} GB"


def _size(tensors: Mapping[str, Any]) -> str:
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in tensors.values()})
    return f"{sum(info.nbytes for info in tensors.values()) / 1e9:.2f} GB, {name_list(dtypes)}"


def _reasons(copied: Mapping[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in copied.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{name_list(names)}: {reason}" for reason, names in by_reason.items()]

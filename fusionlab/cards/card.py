"""The card of a folder of weights, made of what the folder and its maker say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusionlab.cards.facts import Facts, Origin
from fusionlab.cards.loading import how_to_load
from fusionlab.cards.metadata import metadata_of
from fusionlab.layout import CARD, FUSION


def write_card(folder: Path, origin: Origin) -> None:
    """Write ``README.md``: metadata, how to load the weights, recipe, coefficients, scores, norms and lost update.

    All of it comes from the other files of the folder, which must be there, and from ``origin``; no path of this
    machine is told. ``huggingface_hub.ModelCard`` reads it back without loss.

    Args:
        folder: with an adapter or a full model.
        origin: what its maker tells.

    Raises:
        InputError: a configuration in the folder that cannot be read.
    """
    facts = Facts.of(folder, origin)
    name = origin.name or folder.name
    sections = {
        "How to load it": how_to_load(facts),
        "Recipe": "\n".join(_recipe(facts)),
        "Coefficients and norms": "\n".join(_norms(facts)),
        "Update kept by rounding": "\n".join(_rounding(facts)),
        "Scores": "\n".join(_scores(facts)),
        "Licence": _licence(facts),
    }
    text = [f"# {name}", _summary(facts), *(f"## {title}\n\n{body}" for title, body in sections.items() if body)]
    head = metadata_of(facts, name).to_yaml()
    (folder / CARD).write_text(f"---\n{head}\n---\n\n" + "\n\n".join(text) + "\n", encoding="utf-8")


def _summary(facts: Facts) -> str:
    what = "An adapter" if facts.adapter is not None else "A full model"
    what = "Masks of one vector" if facts.masks else what
    what = "Experts and routers" if facts.routed else what
    by = f" by {facts.method}" if facts.method else ""
    if facts.is_fused:
        tasks = list(facts.row.get("fused_tasks") or facts.record.get("norms") or ())
        done = f"{len(tasks)} models fused by {facts.row.get('rule')}"
        fine_tuned = f", each fine-tuned{by} on one task" if by else ""
        did = f"{done}{fine_tuned} ({', '.join(tasks)})" if tasks else done
    else:
        did = f"fine-tuned{by} on the task {facts.row['finetuned_on']}" if facts.row.get("finetuned_on") else "saved"
    return f"{what} on top of `{facts.base_shown}`: {did}, with fusionlab {version('fusionlab')}."


def _recipe(facts: Facts) -> Iterator[str]:
    for key, value in facts.origin.recipe.items():
        yield f"- {key}: {json.dumps(value)}"
    if facts.adapter is not None:
        adapter = facts.adapter
        yield f"- adapter: r {adapter.get('r', 8)}, lora_alpha {adapter.get('lora_alpha', 8)}"
    if facts.is_fused and isinstance(rule := facts.record.get("rule"), Mapping):
        yield f"- rule: `{json.dumps(rule)}`"
    if found := next((row["search"] for row in facts.scores() if row.get("search")), None):
        yield f"- found by a search that looked at data: {json.dumps(found)}"


def _norms(facts: Facts) -> Iterator[str]:
    norms: Mapping[str, float] = facts.record.get("norms") or {}
    if not norms:
        return
    coefficients = facts.record.get("scaling_coefficients") or {}
    yield "| task | model | norm of the task vector | coefficient |"
    yield "|---|---|---|---|"
    for task, norm in norms.items():
        model = facts.origin.models.get(task)
        yield f"| {task} | {_shown(model)} | {norm:.4g} | {_coefficient(coefficients.get(task))} |"
    largest, smallest = max(norms.values()), min(norms.values())
    if len(norms) > 1:
        ratio = f"{largest / smallest:.3g}" if smallest > 0 else "not defined, one is zero"
        yield f"\nRatio of the largest norm to the smallest: {ratio}. Unequal norms hurt most rules."
    yield f"\n`{FUSION}` has the rule with all its arguments, cosines and versions."


def _shown(model: str | None) -> str:
    """A model's name; of a path its last part only."""
    if model is None:
        return "of the same run"
    return f"`{model if model.count('/') < 2 and not model.startswith(('/', '.', '~')) else Path(model).name}`"


def _coefficient(value: Any) -> str:
    if isinstance(value, float | int):
        return f"{value:.4f}"
    return "by parameter" if value else "none"


def _rounding(facts: Facts) -> Iterator[str]:
    if facts.masks:
        return
    if rounding := facts.record.get("rounding"):
        survived = rounding["survived"]
        yield (
            f"{survived:.1%} of the updated weights differ from the base as stored; {1 - survived:.1%} of the update "
            f"is lost to rounding ({rounding['updated_elements']:,} weights were updated)."
        )
    if shares := facts.record.get("rounded_shares"):
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        yield f"Of the updated weights: {told} by rounding to the stored dtype."


def _scores(facts: Facts) -> Iterator[str]:
    rows = facts.scores()
    if not rows:
        return
    yield "Of this run; ± is the standard error by samples alone.\n"
    yield "| task | split | samples | metric | this model | pretrained | fine-tuned on it alone |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        before, alone = facts.compared(row, "pretrained"), facts.compared(row, "finetuned")
        cells = (
            _task(row),
            row["split"],
            row["num_samples"],
            row["metric"],
            _value(row),
            _value(before),
            _value(alone),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"
    for task, limited in {row["task"]: row["limited"] for row in rows if row.get("limited")}.items():
        yield f"\n{task} is scored on a part: {limited}."
    if facts.kind in ("vit", "timm"):
        yield "\nThe heads that these scores use are not part of this folder: a run keeps them by task beside it."


def _task(row: Mapping[str, Any]) -> str:
    return f"{row['task']} (the model is told the task)" if row.get("task_known") else str(row["task"])


def _value(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    error = "" if row.get("stderr") is None else f" ± {row['stderr']:.3f}"
    return f"{row['value']:.4f}{error}"


def _licence(facts: Facts) -> str:
    known = facts.base_card.get("license_name") or facts.base_card.get("license")
    if known:
        return f"That of the base: {known}."
    why = facts.card_problem or "the base's card names none"
    return f"That of the base, which is not known here, since {why}. Add `license` above before you publish this."

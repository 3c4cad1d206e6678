"""The metadata at the head of a card, as huggingface_hub defines it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusionlab.cards.facts import Facts
from fusionlab.tensors.hub import is_hub_id

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_LICENCE = ("license", "license_name", "license_link")
_LANGUAGE_MODELS = "lm_eval"  # the further field of a row that lm-eval scored


def metadata_of(facts: Facts, name: str) -> ModelCardData:
    """What the hub reads of the model: its base, kind, licence, data sets and scores.

    Args:
        facts: of the folder.
        name: of the model.
    """
    from huggingface_hub import ModelCardData  # seconds, which commands that write no card need not wait for

    said = {key: facts.base_card[key] for key in (*_LICENCE, "language") if facts.base_card.get(key)}
    results = _results(facts)
    return ModelCardData(
        base_model=_base_models(facts),
        base_model_relation=relation_of(facts),
        datasets=sorted({data.path for data in facts.origin.datasets.values()}) or None,
        library_name=library_of(facts),
        pipeline_tag=facts.pipeline,
        tags=_tags(facts),
        model_name=name if results else None,
        eval_results=results or None,
        **said,
    )


def relation_of(facts: Facts) -> str:
    """What the model is to its base, by the hub's words."""
    if facts.adapter is not None:
        return "adapter"
    return "merge" if facts.is_fused else "finetune"


def library_of(facts: Facts) -> str:
    """The library that loads the folder as what it is."""
    if facts.is_linearized or facts.masks or facts.routed:
        return "fusionlab"
    if facts.adapter is not None:
        return "peft"
    return {"open_clip": "open_clip", "timm": "timm"}.get(facts.kind, "transformers" if facts.kind else "fusionlab")


def _base_models(facts: Facts) -> str | list[str] | None:
    """The base; of full weights fused on disk also the models on the hub that were fused."""
    fused = facts.origin.models.values() if facts.is_fused and facts.adapter is None else ()
    ids = [name.partition("@")[0] for name in fused if "/" in name and is_hub_id(name)]
    found = list(dict.fromkeys([*([facts.base_id] if facts.base_id else []), *ids]))
    return found[0] if len(found) == 1 else found or None


def _tags(facts: Facts) -> list[str]:
    rule = [str(facts.row["rule"])] if facts.row.get("rule") else []
    return ["fusionlab", *(["merge", "model-merging", *rule] if facts.is_fused else []), *filter(None, [facts.method])]


def _results(facts: Facts) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    counts = Counter((data.path, data.config) for data in facts.origin.datasets.values())
    found = []
    for row in facts.scores():
        data = facts.origin.datasets.get(row["task"])
        shared = data is not None and counts[data.path, data.config] > 1  # results are told apart by set and subset
        found.append(
            EvalResult(
                task_type=facts.pipeline or "other",
                dataset_type=row["task"] if data is None else data.path,
                dataset_name=row["task"],
                dataset_config=row["task"] if shared else getattr(data, "config", None),
                dataset_split=row["split"],
                dataset_revision=getattr(data, "revision", None),
                dataset_args=_counted(row),
                metric_type=row["metric"],
                metric_name=row["metric"],
                metric_value=row["value"],
                metric_args=None if row.get("stderr") is None else {"stderr": row["stderr"]},
            )
        )
    return found


def _counted(row: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: row.get(key) for key in ("num_samples", "limited", "data_version")}
    told["scored_by"] = "lm-eval" if row.get(_LANGUAGE_MODELS) else "fusionlab"
    return {key: value for key, value in told.items() if value is not None}

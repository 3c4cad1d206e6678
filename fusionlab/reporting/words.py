"""What methods, rules, criteria and protocols are called in a report, for people who do not know their identifiers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusionlab.errors import InputError

METHODS = {
    "lora": "LoRA",
    "l_lora": "L-LoRA",
    "tangent_lora": "tangent LoRA",
    "tangent": "tangent, all weights",
    "full": "full fine-tuning",
}
RULES = {
    "adamerging": "AdaMerging",
    "average": "average",
    "breadcrumbs": "Breadcrumbs",
    "consensus": "Consensus",
    "dare": "DARE",
    "della": "DELLA",
    "disjoint_mean": "disjoint mean",
    "emr": "EMR",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "karcher": "Karcher mean",
    "knots": "KnOTS",
    "lines": "LiNeS",
    "localize_and_stitch": "Localize-and-Stitch",
    "lorahub": "LoraHub",
    "metagpt": "MetaGPT",
    "metagpt_multiplier": "MetaGPT × multiplier",
    "model_stock": "Model Stock",
    "nuslerp": "NuSLERP",
    "sce": "SCE",
    "slerp": "SLERP",
    "tall": "TALL masks",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "trim": "Trim",
    "tsv_m": "TSV-M",
    "wemoe": "WEMoE",
    "wudi": "WUDI",
}
PROTOCOLS = {
    "strict": "coefficients chosen on validation",
    "published": "published protocol, coefficients chosen on test",
}
FLATTERS = (
    "Coefficients are chosen on the very test scores that are reported, as several papers did (arXiv 2310.04742). "
    "These numbers flatter: each is the best of all that were tried. Compare them with such papers only, never with "
    "the other sections of this page."
)


@dataclass(frozen=True)
class Criterion:
    """A measure of a fused model.

    Args:
        title: in words.
        axis: what an axis with it says, unit included.
        explained: what the number is, denominator and tasks included.
    """

    title: str
    axis: str
    explained: str


_OWN = "divided by the score of the same method's own fine-tuned model on that task, so that 1 is as good as it"
_FULL = "divided by the score of full fine-tuning on that task, so that 1 is as good as it"
_PARTS = {"sub": "the fused tasks", "all": "all tasks, fused or not"}
OVER = {
    "sub": "Means over the fused tasks: how much of each fused task the one model kept.",
    "all": "Means over all tasks, the ones that were not fused too: what the one model is worth on everything.",
}


def criterion(name: str, errors_only: bool = False) -> Criterion:
    """A criterion of :mod:`fusionlab.reporting.protocols` in words.

    Args:
        name: such as ``own_sub``.
        errors_only: all tasks are scored by errors, which are better where they are lower.

    Example:
        >>> criterion("own_sub").title
        "Share of the method's own single-task score"
        >>> criterion("abs_all").axis
        'mean score'
    """
    kind, _, part = name.partition("_")
    over = f"mean over {_PARTS[part]}"
    if kind == "abs" and errors_only:
        return Criterion("Error, lower is better", "mean error (lower is better)", f"The error itself; {over}.")
    if kind == "abs":
        return Criterion("Score", "mean score", f"The score itself, divided by nothing; {over}.")
    if kind == "own":
        title = "Share of the method's own single-task score"
        return Criterion(title, "share of own single-task score", f"Each task's score {_OWN}; {over}.")
    title = "Share of full fine-tuning's score"
    return Criterion(title, "share of full fine-tuning's score", f"Each task's score {_FULL}; {over}.")


def method_name(method: str | None) -> str:
    """A fine-tuning method in words; its own name where it has none."""
    return METHODS.get(method or "", method or "unknown method")


def rule_name(rule: str | None) -> str:
    """A fusion rule in words: the space and the rounding that its name tells stay with it.

    Example:
        >>> [rule_name(each) for each in ("task_arithmetic", "metagpt (factor)", "ties-bfloat16", "my_rule")]
        ['task arithmetic', 'MetaGPT (factor)', 'TIES, rounded to bfloat16', 'my rule']
    """
    name, bracket, rest = (rule or "unknown rule").partition(" (")
    kind, dash, dtype = name.rpartition("-")
    words = RULES.get(name, name.replace("_", " "))
    if dash and dtype in ("bfloat16", "float16", "float32"):
        words = f"{RULES.get(kind, kind.replace('_', ' '))}, rounded to {dtype}"
    return words + bracket + rest


def check_names(rules: Iterable[str]) -> None:
    """Raise if two rules are called the same in a report, which would take one for the other.

    Raises:
        InputError: naming both.
    """
    called: dict[str, str] = {}
    for rule in rules:
        if (before := called.setdefault(rule_name(rule), rule)) != rule:
            raise InputError(f"rules {before!r} and {rule!r} are both called {rule_name(rule)!r} in tables; rename one")


def model_name(row: dict[str, object]) -> str:
    """A row's model in words: pretrained, fine-tuned on its own task, or fused by a rule."""
    if row["model"] == "fused":
        return rule_name(str(row["rule"]))
    return {"pretrained": "pretrained", "finetuned": "fine-tuned, each on its task"}.get(
        str(row["model"]), str(row["model"])
    )


def metric_name(metric: str) -> str:
    """A metric in words."""
    return metric.replace("_", " ")


def count(number: int, noun: str) -> str:
    """A number and its noun.

    Example:
        >>> count(1, "seed"), count(3, "subset"), count(0, "match")
        ('1 seed', '3 subsets', '0 matches')
    """
    plural = noun + ("es" if noun.endswith(("s", "h", "x")) else "s")
    return f"{number} {noun if number == 1 else plural}"

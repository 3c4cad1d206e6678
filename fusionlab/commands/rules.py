"""``python -m fusionlab rules``: which rule for my models? A table of all rules and searches, made from the classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields

from fusionlab.errors import InputError
from fusionlab.rules import AnyRule, LinearRule, TaskArithmetic
from fusionlab.rules.config import known_rules, known_task_known_rules
from fusionlab.rules.routed import RoutedMlps
from fusionlab.rules.weighted_by_grams import makes_adapters
from fusionlab.search.base import known_searches

HEADER = ("rule", "what it makes", "λ", "looks at", "needs the task", "of adapters makes", "reads", "source")
NOTES = """\
- λ: `chosen` is found on validation data where there are some, else 0.3 (of `tall` 0.4); `given` is a number of yours,
  the one that is taken without stands beside it. The search `validated` finds it for any rule that has one.
- Looks at: unlabelled inputs, or labels, of the validation splits, or unlabelled training inputs; such rules need
  `--model` and `--data` in `fuse`.
- Of adapters makes: an adapter is exact and never becomes a dense matrix on the way; full weights, and one vector with
  masks of one bit an entry and task, are streamed. Experts and routers (`wemoe`) keep the MLPs' adapters as they are:
  one model, told no task, whose MLPs are weighed anew for every sample; no stock library reads it.
- Reads: passes over the inputs, one less where norms are known already; searches run models instead.
- Needs the task: such a rule makes weights for each task, and its scores are told the task of every input; rows say so
  (`task_known`), and tables keep them apart from those of one model for all.
"""


def main(argv: list[str]) -> int:
    """Print the table; returns 0.

    Raises:
        InputError: any argument but ``--help``.
    """
    if argv in (["--help"], ["-h"]):
        print(f"usage: python -m fusionlab rules\n\n{inspect.getdoc(inspect.getmodule(main))}")
    elif argv:
        raise InputError(f"rules takes no arguments, got {argv[0]!r}; python -m fusionlab rules prints the whole table")
    else:
        print(markdown(), end="")
    return 0


def markdown() -> str:
    """The table and what its columns mean."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows())]
    return "\n".join([*lines, "", NOTES])


def rows() -> Iterator[tuple[str, ...]]:
    """One row per rule, then per search, in the columns of :data:`HEADER`."""
    for name, rule_class in known_rules().items():
        rule = _instance(rule_class)
        transforms = "rule" in {item.name for item in fields(rule_class)}
        yield (
            name,
            _summary(rule_class),
            "that of the rule" if transforms else _coefficient(rule_class),
            "nothing",
            "no",
            "full weights" if transforms else _output(rule),
            f"{len(rule.passes) + 1}",
            _source(rule_class),
        )
    for name, rule_class in known_task_known_rules().items():
        chosen = "chosen" if "mask_threshold" in {item.name for item in fields(rule_class)} else "none"
        reads = f"{len(rule_class().passes) + 1}"
        yield name, _summary(rule_class), chosen, "nothing", "yes", "masks", reads, _source(rule_class)
    for name, search_class in known_searches().items():
        given = search_class.gives
        needs, made = "no", "that of the rule"
        if given is not None:
            needs, made = (
                ("yes", "masks") if given in known_task_known_rules().values() else ("no", _output(_instance(given)))
            )
        coefficient = "none" if hasattr(search_class, "bytes_needed") else "chosen"
        yield name, _summary(search_class), coefficient, search_class.looks_at, needs, made, "-", _source(search_class)


def _instance(rule_class: type) -> AnyRule:
    """The rule with its defaults; a transform around task arithmetic."""
    needed = [item.name for item in fields(rule_class) if item.default is item.default_factory is MISSING]
    return rule_class(**{name: TaskArithmetic(1.0) if name == "rule" else 0.5 for name in needed})


def _output(rule: AnyRule) -> str:
    if isinstance(rule, RoutedMlps):
        return "experts and routers"
    return "an adapter" if isinstance(rule, LinearRule) or makes_adapters(rule) else "full weights"


def _coefficient(rule_class: type) -> str:
    default = {item.name: item.default for item in fields(rule_class)}.get("scaling_coefficient", "none")
    return {"none": "none", None: "chosen"}.get(default, f"given; {default}")


def _summary(described: type) -> str:
    return (
        (inspect.getdoc(described) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`").replace("|", "\\|")
    )


def _source(described: type) -> str:
    found = re.search(r"arXiv (\d{4}\.\d{4,5})", (inspect.getdoc(described) or "").partition("Source:")[2])
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else "-"

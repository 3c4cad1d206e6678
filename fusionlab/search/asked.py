"""What searches and open rules ask of a module, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fusionlab.contracts import Data, Module
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation.loop import evaluating, to_device
from fusionlab.evaluation.primary import check_choice
from fusionlab.rules import AnyRule, is_open
from fusionlab.search.base import Search
from fusionlab.search.coefficients import MetagptMultiplier, Validated
from fusionlab.search.masks import ValidatedMasks
from fusionlab.search.training import plain_split


def check_module(
    rules: Mapping[str, AnyRule | Search],
    module: Module,
    data: Data,
    subsets: Sequence[Sequence[str]] | None = None,
) -> None:
    """Refuse rules that this module gives nothing to choose by.

    Args:
        rules: by name.
        module: whose tasks are prepared.
        data: set up, with samples in every split that a rule looks at.
        subsets: the tasks that are fused together, for every fused model; all of them by default.

    Raises:
        InputError: its metrics do not say what is better, or it scores no classes where a rule looks at those.
    """
    by_scores = [
        name for name, rule in rules.items() if is_open(rule) or isinstance(rule, Validated | MetagptMultiplier)
    ]
    if by_scores:
        check_choice(module, subsets or [list(data.tasks)], f"rules {name_list(by_scores)}")
    if by_task := [name for name, rule in rules.items() if isinstance(rule, ValidatedMasks)]:
        check_choice(module, [[task] for task in data.tasks], f"rules {name_list(by_task)}")
    for name, rule in rules.items():
        if isinstance(rule, Search) and rule.needs_classes:
            _check_classes(name, module, data, rule.split)


def _check_classes(name: str, module: Module, data: Data, split: str) -> None:
    """Let the module score the classes of one sample of each task."""
    for task in data.tasks:
        batch = to_device(plain_split(data, task, split).batch(torch.arange(1)), module.device)
        try:
            with evaluating(module):
                module.scored_classes(task, batch)
        except InputError as error:
            raise InputError(f"rule {name} needs the probabilities of classes, and {error}; leave it out") from error

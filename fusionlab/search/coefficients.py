"""One number chosen on validation: a rule's coefficient, or a factor on MetaGPT's; and a rule's other arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fusionlab.errors import InputError
from fusionlab.rules import Metagpt, Rule, TaskArithmetic, with_argument, with_coefficient
from fusionlab.search.base import Found, Problem
from fusionlab.search.looks import MEAN_LOOKS, NUM_STEPS, Looks, best, look, looks_for

START = 0.4
"""Where the best coefficient of task arithmetic is looked for first."""
Numbers = list | tuple | None


@dataclasses.dataclass(frozen=True)
class Validated:
    """A rule with the coefficient that scores best on validation; ties go to the smaller.

    Args:
        rule: with a ``scaling_coefficient``, by itself or inside transforms; task arithmetic by default.
        grid: coefficients that are all tried, beyond its largest value while that wins, up to 3; by default a few looks
            find the top, by steps of 0.05 between 0 and 3; models that are scored together are tried at every step.
        others: values of the rule's other arguments, such as ``{density: [0.1, 0.2]}``: each argument's are tried at
            the coefficient found, the best stays, and at the end the coefficient is looked for again.

    Source: Ilharco et al. 2023, section 2, for the grid.
    """

    rule: Rule = dataclasses.field(default_factory=TaskArithmetic)
    grid: Numbers = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    looks_at: ClassVar[str] = "labels"
    split: ClassVar[str] = "validation"
    needs_classes: ClassVar[bool] = False
    gives: ClassVar[type | None] = None

    def __post_init__(self) -> None:
        _check_numbers("validated.grid", self.grid)
        try:
            with_coefficient(self.rule, START)
            for name, values in self.others.items():
                _check_numbers(f"validated.others.{name}", values)
                for value in values:
                    with_argument(self.rule, name, value)
        except LookupError as error:
            raise InputError(f"validated: {error.args[0]}") from error

    def search(self, problem: Problem) -> Found:
        """A few looks, or the whole grid in one pass; no model is scored twice."""
        models: dict[str, float] = {}
        told: dict[str, float] = {}

        def scored(rules: Mapping[str, Rule]) -> list[float]:
            new = {repr(rule): rule for rule in rules.values() if repr(rule) not in models}
            models.update(zip(new, problem.scores(list(new.values())), strict=True))
            told.update({name: models[repr(rule)] for name, rule in rules.items()})
            return [models[repr(rule)] for rule in rules.values()]

        rule, settings = self.rule, ""

        def coefficient(start: float) -> float:
            looks: Looks = looks_for(self.grid, problem.at_once, start)
            found = look(lambda values: scored({f"{settings}{v}": with_coefficient(rule, v) for v in values}), looks)
            return best(found)

        chosen = coefficient(START)
        for name, values in self.others.items():
            tried = {value: with_coefficient(with_argument(rule, name, value), chosen) for value in values}
            named = {f"{settings}{name} {value}, {chosen}": rule for value, rule in tried.items()}
            value = best(dict(zip(tried, scored(named), strict=True)))
            rule, settings = with_argument(rule, name, value), f"{settings}{name} {value}, "
        if self.others:
            chosen = coefficient(chosen)
        return _found(with_coefficient(rule, chosen), told, problem, len(models))

    def expected_rows(self, num_samples: int) -> float:
        """All samples at every look."""
        return num_samples * self.expected_points(False)

    def expected_points(self, at_once: bool) -> float:
        """Every look."""
        looks = len(self.grid) if self.grid is not None else NUM_STEPS if at_once else MEAN_LOOKS
        return looks * (2 if self.others else 1) + sum(map(len, self.others.values()))


@dataclasses.dataclass(frozen=True)
class MetagptMultiplier:
    """MetaGPT with the multiplier that scores best on validation: Σλ is then no longer 1.

    Args:
        scope: of the norms, as in MetaGPT.
        grid: multipliers that are all tried, beyond its largest value while that wins; by default a few looks find the
            top, by steps of 0.1 between 0 and 3.
    """

    scope: str = "model"
    grid: Numbers = None

    looks_at: ClassVar[str] = "labels"
    split: ClassVar[str] = "validation"
    needs_classes: ClassVar[bool] = False
    gives: ClassVar[type] = Metagpt

    def __post_init__(self) -> None:
        Metagpt(self.scope)  # type: ignore[arg-type]
        _check_numbers("metagpt_multiplier.grid", self.grid)

    def search(self, problem: Problem) -> Found:
        """A few looks, or the whole grid in one pass."""

        def rule(value: float) -> Metagpt:
            return Metagpt(self.scope, value)  # type: ignore[arg-type]

        looks: Looks = looks_for(self.grid, problem.at_once, 1.0, 0.1)
        scores = look(lambda values: problem.scores([rule(value) for value in values]), looks)
        told = {str(value): score for value, score in sorted(scores.items())}
        return _found(rule(best(scores)), told, problem, len(scores))

    def expected_rows(self, num_samples: int) -> float:
        """All samples at every look."""
        return num_samples * self.expected_points(False)

    def expected_points(self, at_once: bool) -> float:
        """Every look; steps are twice as wide as those of coefficients."""
        return len(self.grid) if self.grid is not None else NUM_STEPS // 2 + 1 if at_once else MEAN_LOOKS


def _check_numbers(what: str, values: Numbers) -> None:
    if values is not None and not (
        isinstance(values, Sequence) and values and all(isinstance(value, (int, float)) for value in values)
    ):
        raise InputError(f"{what}: expected numbers, at least one, got {values!r}")


def _found(rule: Rule, scores: Mapping[str, float], problem: Problem, passes: int) -> Found:
    seen = problem.num_samples()
    return Found(rule, dict(scores), seen, seen, float(passes))

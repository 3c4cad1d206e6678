"""A rule whose arguments differ between tensors: of every tensor it is the rule with the values that hold there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

from torch import Tensor

from fusionlab import rules
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, LinearRule, Rule, StatisticsScope, unmeasured
from fusionlab.rules.settings import Entry, blocks_of, entries, settings_in, value_at, with_values


@dataclass(frozen=True)
class ByTensor:
    """The rule ``class_path`` with ``init_args`` of which some are settings, in the place of numbers.

    A setting is ``[0, 0.5, 1]``, spread evenly over the blocks of the model, the first value for what is outside of
    them; ``{filter: mlp, value: ...}`` for parameters whose name contains ``mlp``; or a list of those, of which the
    first that matches counts. Which block a parameter is in is counted over the model, whatever part of it is fused.

    Args:
        class_path: of the rule.
        init_args: its arguments; those of a rule inside may be settings too.

    Raises:
        InputError: a number that the rule refuses, or a rule that ranks or sums over the whole model; when fusing: a
            parameter without a value.
    """

    class_path: str
    init_args: Mapping[str, Any]

    def __post_init__(self) -> None:
        for rule in self._any:
            if rule.statistics_scope == "model":
                what = next(iter(self.settings))
                raise InputError(
                    f"{what}: the rule works over the whole model, where one value holds, got {self.settings[what]!r}; "
                    "give one number, or scope: tensor where the rule has it."
                )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting by the argument that it is of, such as ``slerp.t`` or ``dare.drop_rate.a``."""
        return dict(settings_in(self.init_args, rules.rule_name(self)))

    @cached_property
    def rule(self) -> Rule:
        """The rule inside, as it stands in the arguments, with its settings.

        Raises:
            AttributeError: there is none.
        """
        if "rule" not in self.init_args:
            raise AttributeError("rule")
        return rules.plain_rule(self.init_args["rule"], f"{rules.rule_name(self)}.rule")

    @cached_property
    def _any(self) -> list[Rule]:
        """The rule with every number of every setting once, beside some of the others that it takes together with it.

        Which of them meet in a tensor, :meth:`table` asks; so weights that cross, 0 to 1 and 1 to 0, are no fault here.
        """
        values = {
            what: [n for entry in entries(each, what) for n in entry.values] for what, each in self.settings.items()
        }
        longest = max(map(len, values.values()))
        steps = [
            {what: numbers[min(step, len(numbers) - 1)] for what, numbers in values.items()} for step in range(longest)
        ]
        return [
            self._taken([step | {what: number} for step in steps])
            for what, numbers in values.items()
            for number in dict.fromkeys(numbers)
        ]

    def _taken(self, choices: Sequence[Mapping[str, float]]) -> Rule:
        """The rule with the first of the choices that it takes.

        Raises:
            InputError: it takes none; why not the first.
        """
        faults = []
        for choice in choices:
            try:
                return self._build(partial(_chosen, choice))
            except InputError as error:
                faults.append(error)
        raise faults[0]

    @property
    def sample(self) -> Rule:
        """The rule with some of the values."""
        return self._any[0]

    @property
    def granularity(self) -> Granularity:
        """The rule's."""
        return self.sample.granularity

    @property
    def statistics_scope(self) -> StatisticsScope:
        """The rule's."""
        return self.sample.statistics_scope

    @property
    def measures_untransformed(self) -> bool:
        """The rule's."""
        return self.sample.measures_untransformed

    @cached_property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """Those of the rule with any of the values: what is measured k-th by some is, in the k-th pass."""
        steps = zip_longest(*dict.fromkeys(rule.passes for rule in self._any), fillvalue=())
        return tuple(tuple(dict.fromkeys(each for one in step for each in one)) for step in steps)

    def at(self, name: str, statistics: Statistics) -> Rule:
        """The rule of one parameter.

        Raises:
            InputError: a setting has no value for it, or the rule refuses the values together.
        """
        return statistics.once((id(self), name), lambda: self._at(name, statistics))

    def _at(self, name: str, statistics: Statistics) -> Rule:
        model = statistics.model or statistics.names or (name,)
        block = statistics.once("blocks", lambda: blocks_of(model)).get(name)
        return self._build(lambda what, setting: value_at(setting, name, block, what))

    def _build(self, choose: Callable[[str, Any], float]) -> Rule:
        init_args = with_values(self.init_args, choose, rules.rule_name(self))
        key = repr(init_args)
        if key not in self._built:
            self._built[key] = rules.plain_rule({"class_path": self.class_path, "init_args": init_args}, "rule")
        return self._built[key]

    @cached_property
    def _built(self) -> dict[str, Rule]:
        return {}

    def table(self, statistics: Statistics) -> list[str]:
        """What holds where, a line for each line of a setting, with the number of fused tensors that it is for.

        Raises:
            InputError: as :meth:`at`, of any of them.
        """
        for name in statistics.names:
            self.at(name, statistics)
        found = []
        for what, entry, chosen, blocks in self._lines(statistics):
            values = " .. ".join(f"{value:g}" for value in entry.values)
            where = f"blocks {min(blocks)}-{max(blocks)}" if blocks else "no block"
            found.append(f"{what}, {entry.pattern or '*'}: {values} ({where}, {len(chosen)} tensors)")
        return found

    def unused(self, statistics: Statistics) -> list[str]:
        """The patterns that no fused tensor has in its name where they are asked for, with the setting of each."""
        used: dict[str, bool] = {}
        for what, entry, chosen, _ in self._lines(statistics):
            if entry.pattern:
                told = f"{what}, {entry.pattern}"
                used[told] = used.get(told, False) or bool(chosen)
        return [told for told, is_used in used.items() if not is_used]

    def _lines(self, statistics: Statistics) -> Iterator[tuple[str, Entry, list[str], set[int]]]:
        """Of every line of a setting: the setting's name, the line, the tensors that it is for, and their blocks."""
        blocks = blocks_of(statistics.model or statistics.names)
        for what, setting in self.settings.items():
            names = list(statistics.names)
            for entry in entries(setting, what):
                chosen = [name for name in names if entry.matches(name, blocks.get(name))]
                names = [name for name in names if name not in chosen]
                yield what, entry, chosen, {blocks[name][0] for name in chosen if name in blocks}

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """What the rule of this parameter measures."""
        rule = self.at(name, earlier)
        return rule.measure(name, base, task_vectors, earlier) if unmeasured(rule, earlier) else {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """What the rule of this parameter makes of it."""
        return self.at(name, statistics).fuse(name, base, task_vectors, statistics)


def _chosen(values: Mapping[str, float], what: str, setting: Any) -> float:
    return values[what]


@dataclass(frozen=True)
class LinearByTensor(ByTensor):
    """The same for a rule θ₀ + Σ λ_t τ_t, so that it fuses adapters into one and reports its coefficients."""

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """λ_t of the rule of this parameter."""
        rule = self.at(name, statistics)
        assert isinstance(rule, LinearRule)
        return rule.coefficients(name, tasks, statistics)

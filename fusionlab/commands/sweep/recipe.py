"""A sweep's recipe, from a YAML file or flags."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fusionlab import rules as fusion_rules
from fusionlab.commands.bounds import RULES, check_finite
from fusionlab.commands.seeds import check_one_seed_in, check_seed, one_seed
from fusionlab.commands.written import as_written
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.files import path_of
from fusionlab.foreign import read_yaml
from fusionlab.reporting.words import check_names
from fusionlab.samplers import derive_seed
from fusionlab.search import Adamerging, Search, Validated, knows_the_task, rule_or_search

Protocol = Literal["strict", "published"]
Space = Literal["delta_weight", "factor"]
ScoredTasks = Literal["all", "merged"]
METHODS = ("lora", "l_lora", "tangent_lora", "tangent", "full")
# of the trainer, what would leave a sweep nothing to fuse or scores of another kind, with what to do
_NOT_HERE = {
    "fast_dev_run": "keeps no run to fuse; give a small max_steps, or leave it out",
    "limit_test_batches": "would score a part of what the sweep scores whole; give data.init_args.max_samples",
}


@dataclass(frozen=True)
class SweepRecipe:
    """Fuse every subset of tasks by every rule, for every method and seed; each point is computed once.

    Args:
        output: the sweep's folder: runs, ledger, results; several processes may share it.
        fit: what fit is given, as in its configuration (model, data, trainer), or the path of such a file; the
            embedded default where it is left out.
        by_method: what differs for a method, laid over fit, such as {full: {model: {init_args: {rank: 8}}}}; not how it
            is scored, which is one way for all.
        runs: folders of finished runs to take; with them nothing is trained, and methods and seeds are theirs.
        methods: fine-tuning methods; by default lora and l_lora, or of a module that takes no method its own.
        seeds: seeds of the runs.
        rules: rules or searches by name, the name being what tables call it; or a list of names. Searches:
            lorahub, adamerging, metagpt_multiplier, validated, validated_masks (tall without thresholds is that).
        space: delta_weight, or factor: A and B fused apart, as published LoRA results did; exact for l_lora, wrong by
            cross terms where A trains; for comparison only, and every rule's name says so.
        scaling_coefficients: coefficients that are all tried for task_arithmetic without one, and beyond the largest
            where that wins; by default a few looks find the best of 0..3 by 0.05.
        sizes: numbers of fused tasks; from 2 to all by default.
        subsets_per_size: this many subsets of each size, or by size as {2: 6, 4: 3}, a seeded choice; all by default.
        subset_seed: seed of that choice.
        protocols: strict (coefficients chosen on validation, reported on test) and published (chosen on test).
        scored_tasks: all, or merged: fused models are scored on the tasks that were fused alone, in a part of the time;
            what the others score is then not known, nor is the published protocol, which chooses by all.
        full_reference: folder of a full fine-tuning run that was scored as this sweep scores, for the denominator full;
            by default the sweep's own.
        processes: of this machine that share the work and torch's threads; by default one a thread, at most one a run,
            and one alone where models are scored on an accelerator.
        budget_minutes: begin nothing new after so long: seed after seed, some subsets of every size before the others;
            what is missing then is said, and computed when the sweep is run again.
        lease_seconds: work of another process that gave no sign of life for so long is taken over.
        dry_run: check everything, print the number of points and the estimated time, and stop.
    """

    output: str
    fit: str | dict[str, Any] = field(default_factory=dict)
    by_method: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    methods: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [42])
    rules: dict[str, Any] | list[str] = field(default_factory=lambda: ["average", "task_arithmetic", "metagpt", "ties"])
    space: Space = "delta_weight"
    scaling_coefficients: list[float] | None = None
    sizes: list[int] | None = None
    subsets_per_size: int | dict[int, int] | None = None
    subset_seed: int = 0
    protocols: list[Protocol] = field(default_factory=lambda: ["strict"])
    scored_tasks: ScoredTasks = "all"
    full_reference: str | None = None
    processes: int | None = None
    budget_minutes: float | None = None
    lease_seconds: float = 60.0
    dry_run: bool = False

    def __post_init__(self) -> None:
        as_written(self)
        for name in (each.name for each in fields(self) if each.name not in ("fit", "by_method", *RULES)):
            check_finite(getattr(self, name), name)
        for what in ("methods", "seeds", "protocols", "sizes", "scaling_coefficients"):
            given = getattr(self, what)
            if given is not None and not given:
                raise InputError(f"{what}: expected at least one, got none")
            if given is not None and len(set(given)) < len(given) and what != "scaling_coefficients":
                raise InputError(f"{what}: expected each once, got {name_list(map(str, given))}")
        for seed in self.seeds:
            check_seed("seeds", seed)
        per_size = self.subsets_per_size
        if per_size is not None and min(per_size.values() if isinstance(per_size, dict) else [per_size], default=0) < 1:
            raise InputError(f"subsets_per_size must be at least 1, got {per_size}")
        for name in ("lease_seconds", "budget_minutes", "processes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be positive, got {value}")
        if self.scored_tasks not in get_args(ScoredTasks):
            raise InputError(
                f"scored_tasks: expected one of {', '.join(get_args(ScoredTasks))}, got {self.scored_tasks!r}"
            )
        if self.scored_tasks == "merged" and "published" in self.protocols:
            raise InputError(
                "scored_tasks merged: expected protocols [strict], got published too, which chooses by the scores of "
                "all tasks; leave published out, or take scored_tasks all"
            )
        if not self.named_rules:
            raise InputError("rules: expected at least one, got none")
        check_names(self.named_rules)
        if self.space not in get_args(Space):
            raise InputError(f"space: no such space {self.space!r}; {did_you_mean(self.space, get_args(Space))}")
        other = [name.removesuffix(" (factor)") for name, rule in self.named_rules.items() if not is_sum(rule)]
        if self.space == "factor" and other:
            raise InputError(
                f"space factor: expected rules that are weighted sums (average, task_arithmetic, metagpt, lines, "
                f"lorahub, metagpt_multiplier), got {name_list(other)}; leave those out, or take space delta_weight"
            )

    @property
    def grid(self) -> tuple[float, ...] | None:
        """The coefficients that are all tried; None: a few looks find the best one."""
        return None if self.scaling_coefficients is None else tuple(dict.fromkeys(self.scaling_coefficients))

    @property
    def reference(self) -> Path | None:
        """The folder of ``full_reference``."""
        return None if self.full_reference is None else path_of(self.full_reference)

    @property
    def named_rules(self) -> dict[str, fusion_rules.AnyRule | Search]:
        """Rules and searches by the name that tables call them; it tells a space other than delta_weight."""
        suffix = "" if self.space == "delta_weight" else f" ({self.space})"
        named = self.rules if isinstance(self.rules, Mapping) else {name: name for name in self.rules}
        return {name + suffix: rule_or_search(value) for name, value in named.items()}

    def config(self, method: str = "") -> dict[str, Any]:
        """What fit is given, for a method, before the sweep says method, seed and folder itself.

        Raises:
            InputError: no such file, no keys, a number that is none, or what a sweep cannot do with.
        """
        config = overlay(self._fit(), self.by_method.get(method, {}))
        model = config.setdefault("model", {})
        for key in ("model", "data", "trainer"):
            if not isinstance(config.get(key, {}), Mapping):
                raise InputError(f"fit.{key}: expected keys, got {config[key]!r}; give some, or leave it out")
        check_finite(config, "fit")
        for name in ("dry_run", "train_only"):
            if config.get(name):
                raise InputError(f"fit.{name} leaves no scored run to fuse; leave it out")
        for name, advice in _NOT_HERE.items():
            given = config.get("trainer", {}).get(name)
            if given and str(given) != "1.0":
                raise InputError(f"fit.trainer.{name} {given!r} {advice}")
        return config | {"model": {"class_path": "ClipModule", **model}}

    def fit_config(self, method: str, seed: int, root: Path, *, chooses: bool = True) -> dict[str, Any]:
        """The configuration that one run is fitted with.

        Args:
            method: the fine-tuning method.
            seed: the run's.
            root: its folder.
            chooses: whether the module takes the method as an argument.
        """
        config = self.config(method)
        check_one_seed_in(config, "seeds", seed)
        return overlay(
            overlay(config, one_seed(config, seed)),
            {
                "model": {"init_args": {"method": method} if chooses else {}},
                "trainer": {"default_root_dir": str(root)},
                "fusion": {"rules": {}},
            },
        )

    def subsets(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """The task subsets, by size; within one in order.

        Raises:
            InputError: fewer than two tasks, or a size that they cannot fill.
        """
        if len(tasks) < 2:
            raise InputError(f"a sweep needs at least two tasks, got {', '.join(tasks) or 'none'}")
        found: list[tuple[str, ...]] = []
        sizes = self.sizes or range(2, len(tasks) + 1)
        if isinstance(self.subsets_per_size, dict) and (other := set(self.subsets_per_size) - set(sizes)):
            raise InputError(
                f"subsets_per_size: expected sizes of this sweep ({name_list(map(str, sizes))}), got "
                f"{name_list(map(str, sorted(other)))}; leave those out, or add them to sizes"
            )
        for size in sizes:
            if not 2 <= size <= len(tasks):
                raise InputError(f"sizes: expected 2 to {len(tasks)}, the number of tasks, got {size}")
            count, per_size = math.comb(len(tasks), size), self.subsets_per_size
            wanted = per_size.get(size) if isinstance(per_size, dict) else per_size
            if wanted is None or wanted >= count:
                found += itertools.combinations(tasks, size)
            else:
                every = list(itertools.combinations(tasks, size))
                chosen = random.Random(derive_seed(self.subset_seed, size)).sample(range(count), wanted)
                found += [every[index] for index in sorted(chosen)]
        return found

    def _fit(self) -> dict[str, Any]:
        if not isinstance(self.fit, str):
            return dict(self.fit)
        file = path_of(self.fit)
        if not file.is_file():
            raise InputError(f"fit: no file {self.fit!r}; give a configuration of fit, or its keys")
        return read_yaml(file)


def is_sum(rule: fusion_rules.AnyRule | Search) -> bool:
    """Whether its model is decided by coefficients that are found without dense task vectors."""
    if isinstance(rule, Search):
        if isinstance(rule, Validated):
            return fusion_rules.coefficients_by_norms(fusion_rules.with_coefficient(rule.rule, 1.0))
        # the gradients of AdaMerging go through θ₀ + Σ λτ
        return not (isinstance(rule, Adamerging) or knows_the_task(rule))
    return fusion_rules.coefficients_by_norms(rule)


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with the values of ``above``, mapping by mapping."""
    merged = dict(below)
    for key, value in above.items():
        is_both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "rules"
        merged[key] = overlay(merged[key], value) if is_both else value
    return merged

"""The work of a sweep: jobs under leases, until every point is in the ledger."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from fusionlab.commands.sweep.alike import check_scored_alike
from fusionlab.commands.sweep.checks import check_rules
from fusionlab.commands.sweep.choosing import (
    SPLITS,
    NotScoredError,
    Score,
    Tried,
    by_size,
    choose,
    choose_of_size,
    leading,
    score_of,
    start_of,
)
from fusionlab.commands.sweep.identity import Point, RunIdentity
from fusionlab.commands.sweep.jobs import Job, Work, works
from fusionlab.commands.sweep.ledger import Ledger
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.sources import RunSource, check_routed, load_finetuned, sources
from fusionlab.commands.sweep.worker import RunWorker, validation_point
from fusionlab.evaluation.rows import Row
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.keys import FORMULAS, key_of
from fusionlab.layout import LEDGER, SINGLE_TASK
from fusionlab.memory import peak_bytes
from fusionlab.reporting import check_reference, single_task_values
from fusionlab.rules import AnyRule, is_open, with_coefficient
from fusionlab.runs.leases import remove_unfinished
from fusionlab.search import START, Looks, Running, Search, Wemoe, looks_for, scored_at_once
from fusionlab.search.workbench import Workbench, workbench

_log = logging.getLogger(__name__)
Advance = Callable[[int], None]


class Sweep:
    """A sweep that is checked and ready to run, alone or beside other processes on the same output.

    Args:
        recipe: what to do.
        place: where among the runs to begin, as a share of them; several processes begin at different ones.

    Raises:
        InputError: what a user can mend; nothing was written then.
    """

    def __init__(self, recipe: SweepRecipe, place: float = 0.0) -> None:
        self.recipe, self._place = recipe, place
        self.output = Path(recipe.output).expanduser()
        self.rules = recipe.named_rules
        if recipe.reference is not None:
            single_task_values(recipe.reference)  # refuses a folder without results at once
        self.sources = sources(recipe)
        self.bench: Workbench = workbench(self.config, self._first_run())
        check_scored_alike(self.sources, self.bench)
        self.tasks = tuple(self.bench.data.tasks)
        if recipe.reference is not None:
            check_reference(recipe.reference, self.bench.module, self.bench.data, whole=True)
        self.subsets = recipe.subsets(self.tasks)
        methods = [source.method for source in self.sources]
        check_rules(self.rules, recipe.protocols, self.bench, methods, self.subsets)
        self.ledger = Ledger(self.output / LEDGER, recipe.lease_seconds)
        self._singles = Ledger(self.ledger.folder / SINGLE_TASK, recipe.lease_seconds)
        self.ledger.check_inputs(self._inputs(), write=False)
        self._loaded: dict[str, Finetuned] = {}
        self._at_work = ""  # the run whose heads the module has
        self._identities: dict[str, RunIdentity] = {}
        self._workers: dict[str, RunWorker] = {}
        self._size_starts: dict[tuple[str, str, int], dict[str, float]] = {}
        self._advance: Advance = lambda count: None
        loaded = {source.name: self.finetuned(source) for source in self.sources if source.is_finished}
        if any(isinstance(rule, Wemoe) for rule in self.rules.values()):
            check_routed(self.sources, loaded, self.bench)

    def scored(self, subset: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks whose test splits a fused model is scored on."""
        return self.tasks if self.recipe.scored_tasks == "all" else subset

    @property
    def fitted(self) -> list[RunSource]:
        """The runs that are finished: all, but where a budget was too short."""
        return [source for source in self.sources if source.is_finished]

    def _first_run(self) -> tuple[Path, ...]:
        """The first source's folders, where it is finished: its heads are put in."""
        first = self.sources[0]
        return first.folders if first.is_finished else ()

    @cached_property
    def config(self) -> dict:
        """The configuration that module and data are built from."""
        return dict(self.sources[0].configs[0])

    def _inputs(self) -> dict:
        versions = {f"task {task}": self.bench.versions(task) for task in self.tasks}
        return {"base": {"hash": self.bench.base_hash}} | versions

    def _tell_earlier(self) -> None:
        """Log how many records an earlier version wrote, whose keys no longer suffice; they stay, and count nowhere."""
        earlier = [record for record in self.ledger.records() if record.get("formulas") != FORMULAS]
        if count := sum(record["kind"] != "fit" for record in earlier):
            _log.warning(
                "%d records of the ledger in %r are of an earlier version: their keys lack what decides a score, or "
                "formulas have changed; they are computed anew",
                *(count, str(self.ledger.folder)),
            )

    def finetuned(self, source: RunSource) -> Finetuned:
        """The run's weights, read once; what it has beside them is checked too."""
        if source.name not in self._loaded:
            loaded = load_finetuned(source, self.bench, self.recipe.space)
            beside = self.bench.module.read_run(source.folders, self.bench.data.tasks)
            self._loaded[source.name], self._at_work = loaded, ""
            self._identities[source.name] = RunIdentity(source, loaded, self.bench, beside)
        return self._loaded[source.name]

    def at_once(self, source: RunSource) -> bool:
        """Whether many weighted sums of the run's weights are scored at about the cost of one."""
        return scored_at_once(self.bench.module, self.tasks, self.finetuned(source))

    def looks(self, source: RunSource, protocol: str) -> Callable[[float], Looks]:
        """What is looked at from a start to choose a coefficient; ``published`` keeps to a grid that is given."""
        grid, at_once = self.recipe.grid, self.at_once(source)
        return lambda start: looks_for(grid, at_once, start, beyond=protocol == "strict")

    def identity(self, source: RunSource) -> RunIdentity:
        """The keys of the run's points."""
        self.finetuned(source)
        return self._identities[source.name]

    def single_task(self, source: RunSource) -> dict[str, float]:
        """Each task's test score of the model fine-tuned on it, by its first metric, scored as the points are."""
        return self._begun(source).single_task(self._singles)

    def run(self, advance: Advance = lambda count: None) -> None:
        """Fit what is missing and compute every point, sharing the work with other processes."""
        self._advance = advance
        self.output.mkdir(parents=True, exist_ok=True)
        self.ledger.check_inputs(self._inputs())
        remove_unfinished(self.ledger.folder)
        self._tell_earlier()
        minutes = self.recipe.budget_minutes
        until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        for part in [self.sources] if minutes is None else _by_seed(self.sources):
            own = rotated(part, self._place)
            _until_done([source for source in own if not source.is_finished], self._fit, until)
            fitted = [source for source in own if source.is_finished]
            _until_done(fitted, self._score_singles, math.inf)
            every = works(fitted, list(self.rules), self.subsets, self.at_once, by_rounds=minutes is not None)
            _until_done(every, self._do, until)

    def _fit(self, source: RunSource) -> bool:
        with self.ledger.lease(f"fit-{source.name}") as held:
            if held and not source.is_finished:
                started = time.monotonic()
                source.fit(self.output)
                cost = {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}
                record = {"kind": "fit", "method": source.method, "seed": source.seed, "cost": cost}
                self.ledger.put(key_of({"fit": dict(source.config or {})}), record)
            return held

    def _score_singles(self, source: RunSource) -> bool:
        with self.ledger.lease(f"single-{source.name}") as held:
            if held:
                self.single_task(source)
            return held

    def _do(self, work: Work) -> bool:
        starts = [self._starts(job) for job in work.jobs]
        if None in starts:
            return False
        with self.ledger.lease(work.lease) as held:
            for job, start in zip(work.jobs, starts, strict=True) if held else ():
                self._score(job, start or {})
            return held

    def _score(self, job: Job, starts: Mapping[str, float]) -> None:
        """Score the job's points; ``starts`` says where an open rule's searches start, by protocol."""
        worker = self._begun(job.source)
        rule, name = self.rules[job.rule_name], job.rule_name
        if isinstance(rule, Search):
            points = (worker.search(name, rule, subset, self._test_point) for subset in job.subsets)
            for some in ([point] for point in points) if isinstance(rule, Running) else [list(points)]:
                worker.score(some)  # rules that carry statistics one by one
        elif not is_open(rule):
            worker.score([self._test_point(name, rule, subset) for subset in job.subsets])
        else:
            for protocol, start in starts.items():
                score = self._scored_by(worker.score, job, protocol)
                chosen = choose_of_size(job.subsets, score, self.looks(job.source, protocol)(start))
                worker.score([self._point(job, "test", subset, value) for subset, value in chosen.items()])

    def _starts(self, job: Job) -> dict[str, float] | None:
        """By protocol, where the job's searches start; None while smaller subsets are not searched yet."""
        if not is_open(self.rules[job.rule_name]):
            return {}
        if self.recipe.grid is not None or self.at_once(job.source):
            return dict.fromkeys(self.recipe.protocols, START)
        size = len(job.subsets[0])
        place = (job.source.name, job.rule_name, size)
        if place not in self._size_starts:
            sizes = by_size(self.subsets)
            before = [subset for other, of_size in sizes.items() if other < size for subset in leading(of_size)]
            known = self._worker(job.source).known
            try:
                self._size_starts[place] = {
                    protocol: start_of(
                        size,
                        sizes,
                        choose(before, self._scored_by(known, job, protocol), self.looks(job.source, protocol)),
                    )
                    for protocol in self.recipe.protocols
                }
            except NotScoredError:
                return None
        return self._size_starts[place]

    def _scored_by(self, score: Callable[[Sequence[Point]], list[list[Row]]], job: Job, protocol: str) -> Score:
        """What the protocol chooses by, of points that ``score`` gives the rows of."""
        single = {} if protocol == "strict" else self.single_task(job.source)

        def scores(tried: Sequence[Tried]) -> list[float]:
            points = [self._point(job, SPLITS[protocol], subset, value) for subset, value in tried]
            return [score_of(protocol, rows, single) for rows in score(points)]

        return scores

    def _point(self, job: Job, split: str, subset: tuple[str, ...], value: float) -> Point:
        """An open rule's point with a coefficient."""
        rule = with_coefficient(self.rules[job.rule_name], value)
        if split == "validation":
            return validation_point(job.rule_name, rule, subset)
        return self._test_point(job.rule_name, rule, subset)

    def _test_point(self, name: str, rule: AnyRule, subset: tuple[str, ...]) -> Point:
        return Point(name, rule, subset, "test", self.scored(subset))

    def _worker(self, source: RunSource) -> RunWorker:
        """What scores a run's points."""
        if source.name not in self._workers:
            self._workers[source.name] = RunWorker(
                source, self.finetuned(source), self.identity(source), self.bench, self.ledger, self._advance
            )
        return self._workers[source.name]

    def _begun(self, source: RunSource) -> RunWorker:
        """The same, with the run's heads in the module."""
        worker = self._worker(source)
        if self._at_work != source.name:
            worker.begin()
            self._at_work = source.name
        return worker


def rotated(sources: Sequence[RunSource], place: float) -> list[RunSource]:
    """The runs from another one on, so that processes begin at different ones.

    Args:
        sources: the runs.
        place: where to begin, as a share of them.
    """
    first = int(place * len(sources))
    return [*sources[first:], *sources[:first]]


def _by_seed(sources: Sequence[RunSource]) -> list[list[RunSource]]:
    return [[source for source in sources if source.seed == seed] for seed in dict.fromkeys(s.seed for s in sources)]


def _until_done(items: Sequence, do: Callable[..., bool], until: float) -> None:
    """Do all items; what another process has in hand is looked at again until it is done, or time is over."""
    waiting = list(items)
    while waiting:
        left = [item for item in waiting if time.monotonic() >= until or not do(item)]
        if time.monotonic() >= until:
            return
        if len(left) == len(waiting):
            time.sleep(1.0)
        waiting = left

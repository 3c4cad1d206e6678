"""The fusion callback: collect the adapters, call the rules, swap in and out, evaluate, export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from fusionlab import reporting, rules, search
from fusionlab.adapters import base_state
from fusionlab.callbacks.attached import attached_to_score
from fusionlab.callbacks.harness import causal, harness_rows
from fusionlab.callbacks.origin import origin_of
from fusionlab.callbacks.scoring import Made, Scorer, log_key, log_scores, row_of, with_bounds_of_choice
from fusionlab.cards import Origin
from fusionlab.contracts import Data, Module
from fusionlab.data.tasks import without_classes
from fusionlab.engine import try_rule
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation.rows import Row
from fusionlab.files import path_of, write_text
from fusionlab.fusion.by_task import acting
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.folders import export_finetuned, save_fused
from fusionlab.harness import HarnessTasks
from fusionlab.keys import keyed
from fusionlab.layout import FUSED, PLOTS, RESULTS, SCORES, TABLE
from fusionlab.linearize import LINEARIZED_METHODS
from fusionlab.reporting.diagnostics import Diagnostics, write_diagnostics
from fusionlab.reporting.words import check_names
from fusionlab.rules.by_tensor import ByTensor

DEFAULT_RULES = ("average", "task_arithmetic", "metagpt", "ties")


class FusionCallback(Callback):
    """Fuses the adapters by every rule, and scores pretrained, fine-tuned and fused models on every task.

    At the end of the fit on the test splits, with everything written to the run folder; every ``every_n_epochs`` on
    the validation splits, to the logger only. The training state is restored bit for bit.

    Args:
        rules: rules by name, the name being the folder and the rows' ``rule``; or a list of rule names. A rule is a
            lower-case name, or a mapping with ``class_path`` and ``init_args``; a rule that looks at data, such as
            lorahub, looks at the validation splits, or as regmean at unlabelled training inputs.
        every_n_epochs: also score during training, after every so many epochs; only at the end by default.
        finetuned_on: score each fine-tuned model on its ``own`` task, or on ``all`` tasks.
        full_reference: a run folder of full fine-tuning, whose single-task values become a second denominator.
        dtype: also round each fused model to this dtype; that one has rows and a folder of its own, RULE-DTYPE, and
            says what share of the update is kept, changed and lost. Without it nothing is rounded below float32.
        diagnostics: also measure, at the end, how the task vectors lie to one another and the plane of two of them;
            not by default.
    """

    def __init__(
        self,
        rules: dict[str, str | dict] | list[str] | None = None,
        every_n_epochs: int | None = None,
        finetuned_on: Literal["own", "all"] = "own",
        full_reference: str | None = None,
        diagnostics: Diagnostics | None = None,
        dtype: Literal["bfloat16", "float16"] | None = None,
    ) -> None:
        chosen = DEFAULT_RULES if rules is None else rules
        named = chosen if isinstance(chosen, Mapping) else {name: name for name in chosen}
        self.rules = {name: _rule(name, value) for name, value in named.items()}
        check_names(self.rules)
        if every_n_epochs is not None and every_n_epochs < 1:
            raise InputError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.dtype = dtype
        self._by_task = [name for name, rule in self.rules.items() if search.knows_the_task(rule)]
        self._routed = [name for name, rule in self.rules.items() if isinstance(rule, search.Wemoe)]
        for names, what in ((self._by_task, "masks"), (self._routed, "experts and routers")):
            if dtype is not None and names:
                raise InputError(f"fusion.dtype {dtype}: rules {name_list(names)} make {what}, which are not rounded")
        if taken := [name for name in self.rules if self._rounded_name(name) in self.rules]:
            raise InputError(f"rules {name_list(taken)}: the name of what is rounded is taken; choose another name")
        self.every_n_epochs = every_n_epochs
        self.finetuned_on = finetuned_on
        self.diagnostics = diagnostics
        self.harness: HarnessTasks | None = None
        """Tasks of lm-eval to score beside the data's at the end."""
        self._reference = None if full_reference is None else path_of(full_reference)
        self.full_reference = None if self._reference is None else reporting.single_task_values(self._reference)

    def should_fuse(self, trainer: Trainer) -> bool:
        """Whether to score after the epoch that just ended; override for another policy."""
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be had, before anything is trained."""
        module, data = attached_to_score(trainer, pl_module)
        if self.dtype is not None and module.method in LINEARIZED_METHODS:
            raise InputError(
                f"fusion.dtype {self.dtype}: models of method {module.method!r} act to first order about the base's "
                f"own weights, which rounding would move; leave it out"
            )
        if self._reference is not None:
            module.prepare_tasks(data.tasks)
            reporting.check_reference(self._reference, module, data)
        if trainer.limit_test_batches == 0:
            raise InputError(
                "trainer.limit_test_batches 0 leaves nothing to score; leave it out, or give --train_only to train only"
            )
        if self.harness is not None and self._by_task:
            raise InputError(
                f"harness: lm-eval's tasks have no mask of rules {name_list(self._by_task)}, which need to know the "
                f"task; leave out one or the other"
            )
        if self.harness is not None and self._routed:
            raise InputError(
                f"harness: models of rules {name_list(self._routed)} weigh each sample by its prompt, which lm-eval "
                f"does not tell; leave out one or the other"
            )
        if self._routed:
            search.check_mlps(module)
        for rule in self.rules.values():
            if not search.looks_at_data(rule) and not _names_parameters(rule):
                try_rule(rule, data.tasks)
        search.check_data(self.rules, data, [module.method])
        if any(map(search.looks_at_data, self.rules.values())):
            module.prepare_tasks(data.tasks)
            search.check_module(self.rules, module, data)
        if self.diagnostics is not None:
            self.diagnostics.check(list(data.tasks), without_classes(data.tasks))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score on the validation splits and log."""
        if self.should_fuse(trainer):
            with isolate_rng(include_cuda=torch.cuda.is_initialized()):
                rows, _ = self._score(trainer, *attached_to_score(trainer, pl_module), "validation")
            pl_module.log_dict({log_key(row): row["value"] for row in rows if log_key(row)}, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score on the test splits and write the run folder; where scoring fails, what was trained is written."""
        module, data = attached_to_score(trainer, pl_module)
        with isolate_rng(include_cuda=torch.cuda.is_initialized()), _trained_is_kept(trainer, module, data):
            rows, made = self._score(trainer, module, data, "test")
            rows += self._harness_rows(trainer, pl_module, data, made)
            diagnose = self._diagnosis(module, data)
        if trainer.is_global_zero:
            with _folder_to_write(trainer) as root:
                diagnose(root)
                log_scores(trainer, rows)
                self._write(root, module, data, rows, made, origin_of(trainer, module, data, rows))
        trainer.strategy.barrier("run folder written")

    def _harness_rows(
        self, trainer: Trainer, pl_module: LightningModule, data: Data, made: Mapping[str, Made]
    ) -> list[Row]:
        """Rows of pretrained, fine-tuned and fused models on lm-eval's tasks; of the first process alone."""
        if self.harness is None:
            return []
        module = causal(pl_module)
        labels, tasks = {"method": module.method, "seed": module.seed}, list(data.tasks)
        models: list[tuple[Any, dict[str, Any]]] = [(None, {"model": "pretrained"})]
        models += [(task, {"model": "finetuned", "finetuned_on": task}) for task in tasks]
        models += [(each.model.weights, row_of(name, each, tasks)) for name, each in made.items()]
        return harness_rows(self.harness, trainer, module, [(weights, row | labels) for weights, row in models])

    def _diagnosis(self, module: Module, data: Data) -> Callable[[Path], None]:
        """What is to be written into the run folder of how the task vectors lie; all ranks take part."""
        if self.diagnostics is None:
            return lambda root: None
        finetuned = Finetuned(module, {task: module.finetuned(task) for task in data.tasks}).weights
        plane = self.diagnostics.plane(module, data, finetuned)
        return lambda root: write_diagnostics(root, base_state(module.base_model), finetuned, plane)

    def _score(self, trainer: Trainer, module: Module, data: Data, split: str) -> tuple[list[Row], dict[str, Made]]:
        labels = {"method": module.method, "seed": module.seed}
        score = Scorer(module, data, trainer.progress_bar_callback)
        tasks = list(data.tasks)
        rows = score("pretrained", None, tasks, split, model="pretrained", **labels)
        for task in tasks:
            scored = [task] if self.finetuned_on == "own" else tasks
            rows += score(task, task, scored, split, model="finetuned", finetuned_on=task, **labels)
        made = self._make(Finetuned(module, {task: module.finetuned(task) for task in tasks}), score)
        for name, each in made.items():
            row = row_of(name, each, tasks)
            found = []
            for weights, scored in acting(each.model.weights, tasks, module):
                found += score(f"fused by {name}", weights, scored, split, **row, **labels)
            if each.found.scores:
                found = with_bounds_of_choice(found, data)
            sizes = {"masks": each.model.masks, "routed": each.model.routed}
            told = {key: value for key, value in sizes.items() if value}
            rows += [{**row, **each.more, **told} for row in found]
        return reporting.normalize(keyed(rows, module, data), self.full_reference), made

    def _make(self, finetuned: Finetuned, score: Scorer) -> dict[str, Made]:
        """Every rule's model by name, and what it is when rounded, where that is asked for."""
        inputs, made = finetuned.inputs(finetuned.tasks), {}
        for name, rule in self.rules.items():
            found = search.complete(rule, score.problem(f"choosing for {name}", finetuned))
            made[name] = Made(inputs.fuse(found.rule), found)
            if self.dtype is not None:
                model = inputs.fuse(found.rule, getattr(torch, self.dtype))
                shares = {"dtype": self.dtype, **model.rounding.get("rounded_shares", {})}
                made[self._rounded_name(name)] = Made(model, found, {"rounding": shares})
        return made

    def _rounded_name(self, name: str) -> str:
        return f"{name}-{self.dtype}"

    def _write(
        self, root: Path, module: Module, data: Data, rows: list[Row], made: dict[str, Made], origin: Origin
    ) -> None:
        tasks, backbone, labels = list(data.tasks), module.backbone, {"method": module.method, "seed": module.seed}
        export_finetuned(module, root, tasks, origin)
        for name, each in made.items():
            row = row_of(name, each, tasks) | labels
            searched = {"search": each.found.looked_at} if each.found.num_samples else {}
            save_fused(root / FUSED / name, each.model, backbone, row, searched, origin)
        title = f"{module.backbone.name}, {module.method}: {len(data.tasks)} tasks"
        write_text(root / TABLE, reporting.markdown(rows, title))
        reporting.plot_scores(rows, root / PLOTS / SCORES)
        reporting.write_results(root / RESULTS, rows)
        reporting.print_table(rows, title)


@contextmanager
def _trained_is_kept(trainer: Trainer, module: Module, data: Data) -> Iterator[None]:
    """Where the block fails, write what was trained, whole task by task; the run stays unfinished."""
    try:
        yield
    except Exception:
        if not trainer.fast_dev_run:
            export_finetuned(module, Path(trainer.default_root_dir), list(data.tasks), origin_of(trainer, module, data))
        raise


@contextmanager
def _folder_to_write(trainer: Trainer) -> Iterator[Path]:
    """The run folder; with ``fast_dev_run`` one that is gone afterwards."""
    if not trainer.fast_dev_run:
        yield Path(trainer.default_root_dir)
        print(f"run folder: {trainer.default_root_dir}")
        return
    with tempfile.TemporaryDirectory(prefix="fusionlab-") as folder:
        yield Path(folder)
    print("fast_dev_run: trained, fused, scored and written; nothing is kept")


def _names_parameters(rule: Any) -> bool:
    """Whether patterns of names decide, which only the model's own parameters can match."""
    while hasattr(rule, "rule") and not isinstance(rule, ByTensor):
        rule = rule.rule
    return isinstance(rule, ByTensor) or bool(getattr(rule, "by_name", None))


def _rule(name: str, value: Any) -> rules.AnyRule | search.Search:
    if not name or "/" in name or name.startswith("."):
        raise InputError(f"a rule's name is a folder's name, got {name!r}; use letters, digits, '-' and '_'")
    return search.rule_or_search(value)

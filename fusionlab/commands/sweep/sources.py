"""Where a sweep's models and data come from: runs, fitted or given; one module and one data module a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from fusionlab.adapters import Adapter, Method
from fusionlab.commands import fit
from fusionlab.commands.arguments import check_arguments
from fusionlab.commands.dates import dated
from fusionlab.commands.sweep.methods import methods_of
from fusionlab.commands.sweep.recipe import Space, SweepRecipe
from fusionlab.contracts import ModuleDefaults, as_module
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation.rows import read_rows
from fusionlab.files import named, path_of, write_text
from fusionlab.foreign import read_yaml, yaml_of
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.layout import ADAPTERS, CONFIG, FINETUNED, FITS, RESULTS, RUNS
from fusionlab.modules import FusionModule
from fusionlab.runs.folder import RunFolder, changed_keys
from fusionlab.runs.loading import load_weights
from fusionlab.search import TrainingRuns, check_mlps
from fusionlab.search.workbench import Workbench, class_given, module_of

# what may differ between the configuration that a run was fitted with, and the one that it is scored with
_SCORING = (
    "data.init_args.eval_batch_size", "fusion.",
    "model.init_args.seed", "data.init_args.seed",  # seed_everything decides
)  # fmt: skip
_SCORING_OF_OURS = ("model.init_args.evaluation", "model.init_args.max_new_tokens", "model.init_args.ranking")
ADAPTER_METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class RunSource:
    """One method and seed.

    Args:
        method: the fine-tuning method.
        seed: the run's seed.
        folders: where its adapters or weights are, or will be; several where each holds other tasks.
        config: what to fit it with; None for a given run.
    """

    method: str
    seed: int
    folders: tuple[Path, ...]
    config: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """What tables and leases call it."""
        return f"{self.method}-seed{self.seed}"

    @property
    def configs(self) -> tuple[Mapping[str, Any], ...]:
        """What it is, or was, fitted with; of a given run each folder's."""
        return (self.config,) if self.config is not None else tuple(map(run_config, self.folders))

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to fit."""
        return all(RunFolder(folder).state() == "finished" for folder in self.folders)

    def check_fitted(self, output: Path) -> None:
        """Raise if the run is finished and was fitted with another configuration, but for how it is scored.

        Raises:
            InputError: naming the keys that differ, with both values.
        """
        path = self._given(output)
        if self.config is None or not self.is_finished or not path.is_file():
            return
        before = read_yaml(path)
        is_ours = issubclass(class_given("model", self.config["model"]), FusionModule)
        free = (*_SCORING, *(_SCORING_OF_OURS if is_ours else ()))
        changes = [change for change in changed_keys(before, self.config) if not change.startswith(free)]
        if changes:
            raise InputError(
                f"the run in {str(self.folders[0])!r} was fitted with another configuration: {name_list(changes)}. "
                f"Give that one, or another --output."
            )

    def _given(self, output: Path) -> Path:
        return output / FITS / f"{self.name}.yaml"

    def fit(self, output: Path) -> None:
        """Run ``fit`` in this process; an unfinished run goes on."""
        path = self._given(output)
        write_text(path, yaml_of(self.config or {}))
        fit.main(["fit", "--config", str(path)])


def sources(recipe: SweepRecipe) -> list[RunSource]:
    """The runs of a sweep, in order.

    Raises:
        InputError: a given folder is no finished run, a run was fitted with another configuration, an argument that
            cannot be, or factor space and runs without adapters.
    """
    found = _of_one_date(_sources(recipe))
    whole = [source.name for source in found if source.method not in ADAPTER_METHODS]
    if recipe.space == "factor" and whole:
        raise InputError(
            f"space factor: expected runs that train adapters ({', '.join(ADAPTER_METHODS)}), got {name_list(whole)}; "
            f"leave those out, or take space delta_weight"
        )
    for source in found:
        source.check_fitted(path_of(recipe.output))
    fitted = {source.method: source.config for source in found if source.config is not None}
    for config in fitted.values() or found[0].configs[:1]:  # by a given run's the first one's module and data are made
        check_arguments(config)
    return found


def _sources(recipe: SweepRecipe) -> list[RunSource]:
    if not recipe.runs:
        root = path_of(recipe.output) / RUNS
        return [
            RunSource(method, seed, (root / f"{method}-seed{seed}",),
                      recipe.fit_config(method, seed, root / f"{method}-seed{seed}", chooses=chooses))
            for method, chooses in methods_of(recipe).items()
            for seed in recipe.seeds
        ]  # fmt: skip
    grouped: dict[tuple[str, int], list[Path]] = {}
    for given in recipe.runs:
        folder = path_of(given)
        config = run_config(folder)
        if RunFolder(folder).state() != "finished":
            raise InputError(f"runs: the run in {given!r} is not finished; finish it with fit, or leave it out")
        told = [row["method"] for row in read_rows(folder / RESULTS) if row["method"] is not None]
        method = told[0] if told else config["model"].get("init_args", {}).get("method", ModuleDefaults.method)
        grouped.setdefault((method, int(config["seed_everything"])), []).append(folder)
    return [RunSource(method, seed, tuple(folders)) for (method, seed), folders in grouped.items()]


def _of_one_date(found: list[RunSource]) -> list[RunSource]:
    """Runs that are fitted, with the date of those that were begun before; another day's samples would be others."""
    folders = [folder for source in found for folder in source.folders]
    return [
        source if source.config is None else replace(source, config=dated(source.config, folders)) for source in found
    ]


def check_routed(runs: Sequence[RunSource], loaded: Mapping[str, Finetuned], bench: Workbench) -> None:
    """Raise if a run has trained, or will train, no MLP that could be routed; ``loaded`` are the finished ones.

    Raises:
        InputError: which layers it trains instead.
    """
    for finetuned in loaded.values():
        TrainingRuns(finetuned, bench.module, bench.data).mlps()
    to_fit = {
        source.method: source.config for source in runs if source.name not in loaded
    }  # seeds train the same layers
    for config in to_fit.values():
        made = as_module(module_of(config or {}))
        made.add_adapters(list(bench.data.tasks)[:1])
        check_mlps(made)


def run_config(folder: Path) -> dict[str, Any]:
    """A run's resolved configuration.

    Raises:
        InputError: no run there, or its configuration is damaged.
    """
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"runs: no {CONFIG} in {str(folder)!r}; give the folder of a finished run of fit")
    with named("runs"):
        return RunFolder(folder).config()


def load_finetuned(source: RunSource, bench: Workbench, space: Space = "delta_weight") -> Finetuned:
    """The fine-tuned weights of a run, in the order of the data's tasks.

    Raises:
        InputError: another base, another A₀ for some tasks, a task twice, missing or unknown, other data, or adapters
            that cannot be fused in the space.
    """
    found: dict[str, tuple[Path, Any]] = {}
    for folder in source.folders:
        for parent in (folder / ADAPTERS, folder / FINETUNED):
            for path in sorted(item for item in parent.glob("*") if item.is_dir() and not item.name.startswith(".")):
                if path.name in found:
                    raise InputError(
                        f"runs: task {path.name!r} of {source.name} is in {str(found[path.name][0])!r} and in "
                        f"{str(path)!r}; give each once"
                    )
                module = bench.module
                found[path.name] = path, load_weights(path, module.base_model, base_name=module.backbone.name).weights
    missing = [task for task in bench.data.tasks if task not in found]
    unknown = [task for task in found if task not in bench.data.tasks]
    if missing or unknown:
        raise InputError(
            f"runs: {source.name} has the tasks {name_list(found)}, the data has {name_list(bench.data.tasks)}; they "
            f"must be the same"
        )
    weights = {task: found[task][1] for task in bench.data.tasks}
    starts = {task: each.a0_hash for task, each in weights.items() if isinstance(each, Adapter)}
    if len(set(starts.values())) > 1:
        shown = [f"{task} {start[:12] or 'unknown'}" for task, start in starts.items()]
        raise InputError(
            f"runs: the adapters of {source.name} started from different A₀ ({name_list(shown)}); fit them with one "
            f"seed, rank and target_modules, in one run or by adding tasks to it"
        )
    _check_scored_data(source, bench)
    try:
        return Finetuned(bench.module, weights, space)
    except InputError as error:
        raise InputError(f"runs: {source.name}: {error}") from error


def _check_scored_data(source: RunSource, bench: Workbench) -> None:
    for folder in source.folders:
        for row in read_rows(folder / RESULTS):
            known = bench.data.splits.get(row["task"], {}).get(row["split"])
            if known is not None and known.data_version != row["data_version"]:
                raise InputError(
                    f"runs: {str(folder)!r} was scored on other data: {row['task']} {row['split']} "
                    f"{row['data_version']} there, {known.data_version} now; give the data it was fitted with"
                )

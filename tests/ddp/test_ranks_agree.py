"""One, two and three processes: identical rows, parameters that stay equal, the loss curve of one process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from often import often

import fusionlab
from fusionlab.adapters import Adapter, base_state
from fusionlab.callbacks import FusionCallback
from fusionlab.data.images import ImageSplit
from fusionlab.data.text import TextTasks
from fusionlab.evaluation import linear_tasks, score_linear_sums
from fusionlab.evaluation.scores import evaluate
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.reporting.diagnostics import Diagnostics, cosines, gram_matrix, norm_shares
from fusionlab.search import Adamerging, Fisher, Regmean, RegmeanPlusPlus, ValidationProblem, Wemoe

SIZES = {"digits": 1, "signs": 2, "textures": 5, "colours": 7, "clutter": 101}
TASKS = ["digits", "signs"]
T5_KINDS: dict[str, dict[str, Any]] = {
    "label": {"label_words": ["negative", "positive"]},
    "score": {"target_column": "label", "metric": "spearman"},
}
STEPS = 3
METHODS = ["tangent_lora", "tangent", "full"]


def checksum(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Watch(Callback):
    """Notes the loss and the checksum of what is trained after each step, and what the wrapper left alone."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.checksums: list[str] = []
        self.ignored: set[str] = set()
        self.moved: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ignored = set(getattr(trainer.model, "parameters_to_ignore", ()))
        self.start = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        losses = {key: value.item() for key, value in trainer.logged_metrics.items() if key.startswith("train/")}
        self.losses.append(losses)
        self.checksums.append(checksum(value for of in pl_module.task_parameters.values() for value in of))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = pl_module.state_dict()
        self.moved = [name for name, value in self.start.items() if not value.equal(now[name])]


class WatchedFusion(FusionCallback):
    """Notes the checksum of every fused model on each rank, and the rows."""

    fused: dict[str, str]

    def _score(self, *arguments: Any) -> Any:
        rows, fused = super()._score(*arguments)
        self.fused = {}
        for name, made in fused.items():
            model = made.model
            if isinstance(model.weights, Adapter):
                tensors = [
                    part for factors in model.weights.factors.values() for part in (factors.lora_a, factors.lora_b)
                ]
            else:
                tensors = list(model.weights.values())
            self.fused[name] = checksum(tensors)
        self.rows = rows
        return rows, fused


def train(batch_size: int, world_size: int, folder: Path | None = None, **options: Any) -> dict[str, Any]:
    module = fusionlab.ClipModule(
        method=options.pop("method", "lora"), rank=4, seed=1, dropout=options.pop("dropout", 0.0)
    )
    data = fusionlab.ImageTasks(TASKS, batch_size=batch_size, max_samples=48, seed=1)
    watch = Watch()
    fusion = [] if folder is None else [WatchedFusion(["metagpt", "ties"])]
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=DDPStrategy() if world_size > 1 else "auto", max_steps=STEPS,
        max_epochs=-1, callbacks=[watch, *fusion], default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    parameters = [value for of in module.task_parameters.values() for value in of]
    name_of = {id(value): name for name, value in module.named_parameters()}
    start = [watch.start[name_of[id(value)]] for value in parameters]
    trained = {id(value) for value in parameters}
    names = {name for name, value in module.named_parameters() if id(value) in trained}
    others = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return {
        "fused": [(part.fused, part.rows) for part in fusion],
        "losses": watch.losses,
        "checksums": watch.checksums,
        "parameters": torch.cat([value.detach().float().flatten() for value in parameters]),
        "start": torch.cat([value.float().flatten() for value in start]),
        "only the frozen are ignored": world_size == 1 or watch.ignored == others - names,
        "only the trained moved": set(watch.moved) == names,
        "dtypes": {str(value.dtype) for value in parameters},
    }


def clip_rows() -> list[dict[str, Any]]:
    """Rows of one, two, five, seven and 101 samples; a batch holds four, so that some processes get none."""
    torch.manual_seed(5)
    module = fusionlab.ClipModule(rank=2, seed=3)
    data = fusionlab.ImageTasks(list(SIZES), eval_batch_size=4, image_size=module.backbone.image_size)
    data.setup("test")
    for task, size in SIZES.items():
        split = data.splits[task]["test"]
        rows = split.rows.numpy()[:size]
        labels = torch.zeros(int(rows.max()) + 1, dtype=torch.int64)
        labels[torch.from_numpy(rows)] = split.labels[:size]
        data.loaded[task]["test"] = ImageSplit(split.images, labels.numpy(), rows, split.image_size)
    module.prepare_tasks(data.tasks)
    return evaluate(module, data, split="test")


def diagnosed(method: str) -> dict[str, Any]:
    """Cosines, shares and the plane of the same fine-tuned weights; 3 batches a task, so that one rank has fewer."""
    module = fusionlab.ClipModule(method=method, rank=2, seed=3)
    module.add_adapters(TASKS)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameters in module.task_parameters.values():
            for parameter in parameters:
                parameter += 0.02 * torch.randn_like(parameter)
    data = fusionlab.ImageTasks(TASKS, eval_batch_size=4, max_samples=60, image_size=module.backbone.image_size)
    data.setup("validate")
    for task in TASKS:
        split = data.splits[task]["validation"]
        split.rows, split.labels = split.rows[:10], split.labels[:10]
    module.prepare_tasks(data.tasks)
    finetuned = {task: module.finetuned(task) for task in TASKS}
    base = base_state(module.base_model)
    plane = Diagnostics(grid_size=3).plane(module, data, finetuned)
    assert plane is not None
    shares = norm_shares(base, finetuned)
    found = {"cosines": cosines(gram_matrix(base, finetuned)), "shares": shares, **dataclasses.asdict(plane)}
    if linear := linear_tasks(module, TASKS, finetuned):
        sums = {str(value): (dict.fromkeys(TASKS, value), linear, {}) for value in (0.0, 0.5, 1.0)}
        found["sums"] = score_linear_sums(module, data, finetuned, sums, "validation")
    return found


def searched() -> dict[str, str]:
    """Rules that searches find on inputs, with the hashes of their statistics, of the same fine-tuned weights."""
    module = fusionlab.ClipModule(rank=2, seed=3, target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    module.add_adapters(TASKS)
    torch.manual_seed(5)
    for parameter in (each for task in TASKS for each in module.task_parameters[task]):
        parameter.data += 0.02 * torch.randn_like(parameter)
    data = fusionlab.ImageTasks(TASKS, eval_batch_size=4, max_samples=20, image_size=module.backbone.image_size)
    data.setup("fit")
    module.prepare_tasks(data.tasks)
    finetuned = Finetuned(module, {task: module.finetuned(task) for task in TASKS})
    problem = ValidationProblem(tuple(TASKS), finetuned, module, data, lambda rules: [])
    searches: list[Any] = [Regmean(num_samples=7), RegmeanPlusPlus(num_samples=3), Fisher(num_samples=3)]
    searches += [Wemoe(num_steps=3, batch_size=3), Adamerging(num_steps=2, batch_size=3)]
    return {type(search).__name__: repr(search.search(problem).rule) for search in searches}


def t5_rows(t5: Path, folder: Path) -> list[dict[str, Any]]:
    """The same sizes for T5, as label words by rank and as scores by generation."""
    module = fusionlab.T5Module(str(t5), rank=2, seed=3)
    tasks = [
        {"name": f"{kind}-{size}", "path": str(folder / f"{kind}-{size}"), "input_columns": ["text"], **options}
        for kind, options in T5_KINDS.items()
        for size in SIZES.values()
    ]
    data = TextTasks(tasks, eval_batch_size=4, cache_dir=str(folder / "cache"))
    attached = SimpleNamespace(lightning_module=SimpleNamespace(backbone=module.backbone))
    data.trainer = attached  # type: ignore[assignment]
    data.setup("test")
    module.prepare_tasks(data.tasks)
    return evaluate(module, data, split="test")


def write_texts(folder: Path) -> None:
    for size in SIZES.values():
        for kind in T5_KINDS:
            values = [row % 2 if kind == "label" else row % 3 * 2.5 for row in range(size)]
            rows = [{"text": "a good " * (row % 4) + f"{row}", "label": value} for row, value in enumerate(values)]
            (folder / f"{kind}-{size}").mkdir()
            for split in ("train", "test"):
                text = "\n".join(map(json.dumps, rows))
                (folder / f"{kind}-{size}" / f"{split}.jsonl").write_text(text + "\n")


def everything(world_size: int, folder: Path, t5: Path) -> dict[str, Any]:
    """All that is compared, in one process of ``world_size``."""
    results: dict[str, Any] = {"fit": train(24 // world_size, world_size, folder / f"run-{world_size}")}
    if world_size < 3:
        half = {"accumulate_grad_batches": 2, "gradient_clip_val": 10.0}
        results["accumulated"] = train(12 // world_size, world_size, **half)
        results["l_lora clipped"] = train(24 // world_size, world_size, method="l_lora", gradient_clip_val=0.01)
        for precision in ("bf16-mixed", "bf16-true") if world_size > 1 else ():
            results[precision] = train(24 // world_size, world_size, precision=precision, dropout=0.2)
        for method in METHODS:
            results[method] = train(24 // world_size, world_size, method=method)
        results["searched"] = searched()
    results["diagnostics"] = {method: diagnosed(method) for method in ("lora", "full", "tangent_lora")}
    results["clip rows"], results["t5 rows"] = clip_rows(), t5_rows(t5, folder)
    return results


def worker(rank: int, world_size: int, port: int, folder: Path, t5: Path) -> None:
    torch.set_num_threads(1)
    ranks.as_torchrun_does(rank, port, world_size)
    torch.save(everything(world_size, folder, t5), folder / f"{world_size}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=often([2, 3], "2"))
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, t5_folder: Callable[[str], Path]
) -> dict[int, list[dict[str, Any]]]:
    """By number of processes, what each of them found."""
    folder = tmp_path_factory.mktemp("ranks")
    write_texts(folder)
    t5 = t5_folder("tied")
    found = {1: [everything(1, folder, t5)]}
    for world_size in range(2, request.param + 1):
        ranks.start(worker, (world_size, ranks.free_port(), folder, t5), world_size)
        found[world_size] = [
            torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)
        ]
    for world_size, of in found.items():
        of[0]["results.json"] = (folder / f"run-{world_size}" / "results.json").read_text()
        files = sorted(path for path in (folder / f"run-{world_size}").rglob("*") if path.is_file())
        of[0]["files"] = [str(path.relative_to(folder / f"run-{world_size}")) for path in files]
    return found


def test_rows_are_identical_on_any_number_of_processes(results: dict[int, list[dict[str, Any]]]) -> None:
    rows = results[1][0]["clip rows"]
    assert {row["task"]: row["num_samples"] for row in rows} == SIZES
    assert 0 < sum(row["value"] for row in rows) < len(rows)
    texts = results[1][0]["t5 rows"]
    assert {row["num_samples"] for row in texts} == set(SIZES.values())
    assert {row["metric"] for row in texts} == {"accuracy", "spearman", "pearson", "unparsable"}
    for found in results.values():
        assert all(of["clip rows"] == rows and of["t5 rows"] == texts for of in found)


@pytest.mark.parametrize("mode", ["fit", "accumulated", "l_lora clipped", "bf16-mixed", "bf16-true", *METHODS])
def test_parameters_are_equal_on_all_ranks_after_every_step(
    results: dict[int, list[dict[str, Any]]], mode: str
) -> None:
    for found in [found for found in results.values() if mode in found[0]]:
        assert all(of[mode]["checksums"] == found[0][mode]["checksums"] for of in found)
        before_the_first_update = int(mode == "accumulated")
        assert len(set(found[0][mode]["checksums"])) == STEPS + before_the_first_update
        assert all(of[mode]["only the frozen are ignored"] and of[mode]["only the trained moved"] for of in found)


@pytest.mark.parametrize("mode", ["fit", "accumulated", "l_lora clipped", *METHODS])
def test_the_loss_curve_is_that_of_one_process(results: dict[int, list[dict[str, Any]]], mode: str) -> None:
    expected = results[1][0][mode]
    for of in [of[mode] for found in results.values() for of in found if mode in of]:
        assert len(of["losses"]) == len(expected["losses"])
        for ours, theirs in zip(of["losses"], expected["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        # AdamW divides by the root of the squared gradient: where that is rounding noise, so is the update
        torch.testing.assert_close(of["parameters"], expected["parameters"], rtol=1e-3, atol=1e-4)
        moved = (expected["parameters"] - expected["start"]).norm()
        assert (of["parameters"] - expected["parameters"]).norm() < 0.01 * moved


def test_diagnostics_are_identical_on_any_number_of_processes(results: dict[int, list[dict[str, Any]]]) -> None:
    expected = results[1][0]["diagnostics"]
    for found in expected.values():
        assert 0 < sum(found["disentanglement"].values()) / len(found["disentanglement"]) < 2
        assert len({str(values) for values in found["loss"].values()}) == 9
    assert [len(rows) for rows in expected["tangent_lora"]["sums"].values()] == [len(TASKS)] * 3
    assert all(of["diagnostics"] == expected for found in results.values() for of in found)


def test_statistics_of_searches_are_identical_on_any_number_of_processes(
    results: dict[int, list[dict[str, Any]]],
) -> None:
    [[one], two] = results[1], results[2]
    assert len(set(one["searched"].values())) == 5
    assert [rank["searched"] for rank in two] == [one["searched"]] * 2


def test_two_accumulated_batches_are_one_of_twice_the_size(results: dict[int, list[dict[str, Any]]]) -> None:
    whole, halves = results[1][0]["fit"], results[1][0]["accumulated"]
    torch.testing.assert_close(halves["parameters"], whole["parameters"], rtol=1e-3, atol=1e-4)
    for step, losses in enumerate(whole["losses"]):
        pairs = halves["losses"][2 * step : 2 * step + 2]
        assert {key: sum(pair[key] for pair in pairs) / 2 for key in losses} == pytest.approx(losses, rel=1e-5)


def test_fused_weights_and_their_rows_are_identical_on_all_ranks(results: dict[int, list[dict[str, Any]]]) -> None:
    for found in results.values():
        fused, rows = found[0]["fit"]["fused"][0]
        assert fused.keys() == {"metagpt", "ties"}
        assert len(rows) == 2 + 2 + 2 * 2
        assert all(of["fit"]["fused"] == [(fused, rows)] for of in found)


def test_precisions_are_what_they_say(results: dict[int, list[dict[str, Any]]]) -> None:
    assert results[2][0]["bf16-true"]["dtypes"] == {"torch.bfloat16"}
    assert results[2][0]["bf16-mixed"]["dtypes"] == {"torch.float32"}


def test_one_run_folder_is_written_whatever_the_number_of_processes(
    results: dict[int, list[dict[str, Any]]],
) -> None:
    rows = {world_size: json.loads(found[0]["results.json"])["rows"] for world_size, found in results.items()}
    assert len(rows[1]) == 2 + 2 + 2 * 2
    for world_size in results.keys() - {1}:
        assert results[world_size][0]["files"] == results[1][0]["files"]
        keys = ("model", "rule", "task", "metric", "num_samples")
        assert [[row[key] for key in keys] for row in rows[world_size]] == [
            [row[key] for key in keys] for row in rows[1]
        ]

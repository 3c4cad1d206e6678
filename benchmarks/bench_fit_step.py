"""Question: what does a step of ``fit`` cost beside a bare PyTorch loop that does the same work?

For each method: Lightning's Trainer with the callbacks of ``fit``, a CLIP from config and image tasks from disk,
against a loop of plain torch and stock PEFT (for ``full`` a plain copy of the tower per task): the same start, uint8
images from memory, autocast, one backward per task, fused AdamW. l_lora's opponent is PEFT's LoRA with A frozen, which
computes the same; the tangents have none and stand beside the fit of lora. Rounds are interleaved: the fit pauses while
the bare loop takes its steps. The clock (and on a GPU a synchronisation) is read at the ends of a round only, as one of
every step would hide what overlaps. Both sides take the same first batches, whose summed losses are compared. Not
counted: checkpoints. The drawn tasks are written to disk first, as users' tasks are, since embedded ones are resized
anew for each batch. With ``--grouped`` the opponent is the same fit with its tasks one after another
(``--model.samples_at_once 0``), round by round, in wall and processor time. On a GPU peak memory is what the tensors of
one side take; on the CPU it is left out. Prints one JSON record.

    python benchmarks/bench_fit_step.py --device cuda --precision bf16-mixed
    python benchmarks/bench_fit_step.py --device cpu --precision 32 --model tiny --batch_size 4 --steps 3 --rounds 2
    python benchmarks/bench_fit_step.py --grouped --methods lora l_lora --threads 1 --rounds 9 --steps 2
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning
import peft
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import fusionlab
from fusionlab.backbones import load_backbone
from fusionlab.backbones.clip import ClipBackbone
from fusionlab.callbacks import FusionProgressBar, StopOnSignal
from fusionlab.data.drawing import DRAWN_TASKS

CHECKED = 3  # steps whose losses are compared; no fewer are left out as warm-up
RATE = 1e-4
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TOWERS = {
    "vit-b-16": BASE | {"image_size": 224, "patch_size": 16},
    "vit-b-32": BASE | {"image_size": 224, "patch_size": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}
    | {"image_size": 32, "patch_size": 8},
}


def make_backbone(model: str) -> ClipBackbone:
    """Seeded random weights: the image tower as asked, text tower and tokenizer as tiny-clip has them."""
    tiny = load_backbone("tiny-clip")
    text = tiny.model.config.text_config.to_dict()
    config = transformers.CLIPConfig(text_config=text, vision_config=TOWERS[model], projection_dim=512)
    torch.manual_seed(0)
    return ClipBackbone(transformers.CLIPModel(config), tiny.tokenizer, name=model)


def write_tasks(folder: Path, names: list[str], num_images: int) -> list[str | dict]:
    """Drawn tasks as parquet files, as the hub has them."""
    for name in names:
        drawn = DRAWN_TASKS[name]
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=list(map(str, drawn.class_names)))
        )
        for split, count in (("train", num_images), ("validation", 8), ("test", 8)):
            images, labels = (part[:count] for part in drawn.draw(split))
            columns = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
            table = datasets.Dataset.from_dict(columns, features=features)
            (folder / name).mkdir(exist_ok=True)
            table.to_parquet(folder / name / f"{split}.parquet")
    return [{"name": f"drawn-{name}", "path": str(folder / name)} for name in names]


class Tower(nn.Module):
    """uint8 images to unit features."""

    def __init__(self, backbone: ClipBackbone) -> None:
        super().__init__()
        self.vision_model = copy.deepcopy(backbone.model.vision_model)
        self.visual_projection = copy.deepcopy(backbone.model.visual_projection)
        self.mean, self.std = backbone.mean.clone(), backbone.std.clone()

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() / 255 - self.mean) / self.std
        return F.normalize(self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output), dim=-1)


class BareLoop:
    """The opponent: what one would write by hand for several tasks."""

    def __init__(self, start: ClipBackbone, module: Any, data: Any, arguments: argparse.Namespace) -> None:
        self.tasks, self.batch_size, self.device = list(data.tasks), arguments.batch_size, module.device
        self.precision, self.method = arguments.precision, arguments.method
        self.heads = {task: head.clone() for task, head in module.heads.items()}
        self.logit_scale = module.backbone.logit_scale.detach().clone()
        splits = {task: data.splits[task]["train"] for task in self.tasks}
        self.images = {task: split.images[split.rows.numpy()] for task, split in splits.items()}
        self.labels = {task: split.labels for task, split in splits.items()}
        self.order = {task: torch.empty(0, dtype=torch.int64) for task in self.tasks}
        tower = Tower(start).to(self.device).requires_grad_(False).train()
        if self.method == "full":
            self.towers = {task: copy.deepcopy(tower).requires_grad_(True) for task in self.tasks}
            self.trained = [part for copied in self.towers.values() for part in copied.parameters()]
        else:
            self._adapt(tower, module, arguments)
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)

    def _adapt(self, tower: nn.Module, module: Any, arguments: argparse.Namespace) -> None:
        """Stock PEFT, one adapter per task, from the same A."""
        config = peft.LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(tower, config, adapter_name=self.tasks[0])
        for task in self.tasks[1:]:
            model.add_adapter(task, config)
        self.frozen: dict[str, list[nn.Parameter]] = {task: [] for task in self.tasks}
        self.trained = []
        for task in self.tasks:
            for name, factors in module.finetuned(task).factors.items():
                layer = model.base_model.model.get_submodule(name)
                layer.lora_A[task].weight.data.copy_(factors.lora_a)
                self.trained.append(layer.lora_B[task].weight)
                (self.frozen[task] if self.method == "l_lora" else self.trained).append(layer.lora_A[task].weight)
        self.towers = dict.fromkeys(self.tasks, model)

    def _batch(self, task: str) -> tuple[Tensor, Tensor]:
        while len(self.order[task]) < self.batch_size:
            self.order[task] = torch.cat([self.order[task], torch.randperm(len(self.labels[task]))])
        index, self.order[task] = self.order[task].tensor_split([self.batch_size])
        images = torch.from_numpy(self.images[task][index.numpy()])  # numpy copies whole rows: faster than torch here
        return images, self.labels[task][index]

    def step(self, given: dict[str, dict[str, Tensor]] | None = None) -> Tensor:
        """One update of every task; returns the summed loss."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for task in self.tasks:
            batch = self._batch(task) if given is None else (given[task]["images"], given[task]["labels"])
            pinned = [part.pin_memory() if self.device.type == "cuda" else part for part in batch]
            images, labels = (part.to(self.device, non_blocking=True) for part in pinned)
            if self.method != "full":
                self.towers[task].set_adapter(task)
                for parameter in self.frozen[task]:  # PEFT's switch lets all of it train
                    parameter.requires_grad_(False)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
                logits = self.logit_scale * self.towers[task](images) @ self.heads[task].T
                loss = F.cross_entropy(logits, labels)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return total


class Rounds(Callback):
    """Times a fit by rounds, and the bare loop in between.

    Args:
        arguments: of the command line.
        make_bare: makes the bare loop of module and data; None for none.
    """

    def __init__(self, arguments: argparse.Namespace, make_bare: Callable[[Any, Any], Any] | None) -> None:
        self.arguments, self.make_bare = arguments, make_bare
        self.cuda = arguments.device == "cuda"
        self.done, self.bare_bytes = 0, 0
        self.bare: Any = None
        self.losses: dict[str, list[Tensor]] = {"fit": [], "bare": []}
        self.seconds: dict[str, list[float]] = {"fit": [], "bare": []}
        self.peaks: dict[str, list[int]] = {"fit": [], "bare": []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.make_bare is not None:
            before = self._allocated()
            self.bare = self.make_bare(pl_module, trainer.datamodule)
            loader = trainer.datamodule.train_dataloader()
            for number in range(self.arguments.warmup):
                loss = self.bare.step(loader.batch(number))
                self.losses["bare"] += [loss] * (number < CHECKED)
            self.bare_bytes = self._allocated() - before
        self._open()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.done += 1
        if self.done <= CHECKED:
            self.losses["fit"].append(outputs["loss"])
        timed = self.done - self.arguments.warmup
        if timed < 0 or timed % self.arguments.steps:
            return
        if timed:
            self._close("fit", beside=self.bare_bytes)
            if self.bare is not None:
                beside = self._allocated() - self.bare_bytes
                self._open()
                for _ in range(self.arguments.steps):
                    self.bare.step()
                self._close("bare", beside)
        self._open()

    def figures(self) -> dict[str, Any]:
        """What was measured."""
        figures: dict[str, Any] = {}
        for side in ("fit", "bare") if self.bare else ("fit",):
            figures[f"{side}_steps_per_second"] = round(1 / statistics.median(self.seconds[side]), 4)
            figures[f"{side}_seconds_per_step"] = [round(value, 5) for value in self.seconds[side]]
            figures[f"{side}_peak_bytes"] = max(self.peaks[side]) if self.peaks[side] else None
        if self.bare:
            shares = [bare / fit for fit, bare in zip(self.seconds["fit"], self.seconds["bare"], strict=True)]
            figures |= {"share": round(statistics.median(shares), 4), "shares": [round(share, 4) for share in shares]}
            figures["bare_num_trained"] = sum(part.numel() for part in self.bare.trained)
            fit, bare = (torch.stack(self.losses[side]).double() for side in ("fit", "bare"))
            figures["largest_relative_difference_of_first_losses"] = ((fit - bare) / bare).abs().max().item()
        return figures

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def _open(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.opened = time.perf_counter()

    def _close(self, side: str, beside: int) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.peaks[side].append(torch.cuda.max_memory_allocated() - beside)
        self.seconds[side].append((time.perf_counter() - self.opened) / self.arguments.steps)


class Pairs(Callback):
    """Times a fit whose tasks go together and one after another in turn.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = argparse.Namespace(**vars(arguments) | {"rounds": 2 * arguments.rounds})
        self.steps = 0
        self.seconds: dict[str, list[tuple[float, float]]] = {"together": [], "apart": []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.together = pl_module.num_at_once

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        timed = self.steps - self.arguments.warmup
        if timed < 0 or timed % self.arguments.steps:
            return
        if self.arguments.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if timed:
            side = "together" if pl_module.num_at_once else "apart"
            wall, cpu = ((end - start) / self.arguments.steps for end, start in zip(now, self.opened, strict=True))
            self.seconds[side].append((wall, cpu))
            pl_module.num_at_once = 0 if pl_module.num_at_once else self.together
        self.opened = time.perf_counter(), time.process_time()

    def figures(self) -> dict[str, Any]:
        """Steps' seconds together over apart, medians of the pairs."""
        pairs = list(zip(self.seconds["together"], self.seconds["apart"], strict=True))
        found: dict[str, Any] = {"samples_at_once": self.together}
        for place, clock in enumerate(("wall", "processor")):
            ratios = [ours[place] / theirs[place] for ours, theirs in pairs]
            found[f"{clock}_together_over_apart"] = round(statistics.median(ratios), 4)
            found[f"{clock}_ratios"] = [round(ratio, 4) for ratio in ratios]
            least = [min(seconds[place] for seconds in self.seconds[side]) for side in ("together", "apart")]
            found[f"{clock}_least_seconds"] = [round(seconds, 4) for seconds in least]
        found["apart_seconds_per_step"] = round(statistics.median(wall for wall, _ in self.seconds["apart"]), 4)
        return found


def fit_in_rounds(module: Any, data: Any, rounds: Rounds | Pairs, folder: Path, precision: str = "32") -> None:
    """Fit with the callbacks of ``fit`` for as many steps as the rounds take."""
    arguments = rounds.arguments
    trainer = Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu", devices=1, precision=precision,
        max_steps=arguments.warmup + arguments.steps * arguments.rounds, max_epochs=-1, limit_val_batches=0,
        num_sanity_val_steps=0, log_every_n_steps=10, logger=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=str(folder),
        callbacks=[StopOnSignal(None), FusionProgressBar(), rounds],
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        trainer.fit(module, data)


def prepare_process(threads: int) -> None:
    """So many threads; no notices between the record's lines."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def beside_lora(methods: dict[str, dict[str, Any]]) -> None:
    """Add each fit's time over that of lora, where there is one."""
    if "lora" in methods:
        lora = methods["lora"]["fit_steps_per_second"]
        for figures in methods.values():
            figures["fit_time_over_lora_fit"] = round(lora / figures["fit_steps_per_second"], 4)


def where_measured(device: str) -> dict[str, Any]:
    """Versions, machine and commit, for a record."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "versions": {part.__name__: part.__version__ for part in (torch, lightning, transformers, peft)},
        "machine": f"{platform.machine()}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}",
        "commit": commit.stdout.strip(),
    }


def measure(method: str, tasks: list[str | dict], cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit by one method, the bare loop in between; the figures of both."""
    arguments = argparse.Namespace(**vars(arguments), method=method)
    start = make_backbone(arguments.model)
    module = fusionlab.ClipModule(
        copy.deepcopy(start), method=method, rank=arguments.rank, lora_alpha=2 * arguments.rank, learning_rate=RATE,
        lr_schedule="constant", samples_at_once=arguments.samples_at_once,
    )  # fmt: skip
    data = fusionlab.ImageTasks(tasks, batch_size=arguments.batch_size, cache_dir=str(cache))
    if arguments.grouped:
        pairs = Pairs(arguments)
        fit_in_rounds(module, data, pairs, cache, arguments.precision)
        return pairs.figures()
    has_bare = not method.startswith("tangent")
    make_bare = (lambda module, data: BareLoop(start, module, data, arguments)) if has_bare else None
    rounds = Rounds(arguments, make_bare)
    fit_in_rounds(module, data, rounds, cache, arguments.precision)
    trained = sum(part.numel() for of_task in module.task_parameters.values() for part in of_task)
    return {"num_trained": trained} | rounds.figures()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="vit-b-16" if on_gpu else "tiny", choices=list(TOWERS))
    parser.add_argument("--methods", nargs="+", default=["lora", "l_lora", "tangent_lora", "full"],
                        choices=["lora", "l_lora", "tangent_lora", "tangent", "full"])  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", default=["digits", "signs", "shapes", "textures"], choices=list(DRAWN_TASKS)
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images of each task in a step")
    parser.add_argument("--grouped", action="store_true", help="tasks together against one after another")
    parser.add_argument(
        "--samples_at_once", type=lambda value: value if value == "auto" else int(value), default="auto"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5, help=f"steps before the first round, at least {CHECKED}")
    parser.add_argument("--num_images", type=int, default=1000, help="training images of each task, at most")
    parser.add_argument("--precision", default="bf16-mixed" if on_gpu else "32", choices=["32", "bf16-mixed"])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    arguments.warmup = max(arguments.warmup, CHECKED)
    return arguments


def main() -> None:
    arguments = parse()
    prepare_process(arguments.threads)
    methods = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(Path(folder), arguments.tasks, arguments.num_images)
        for method in arguments.methods:
            methods[method] = measure(method, tasks, Path(folder) / "cache", arguments)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    if not arguments.grouped:
        beside_lora(methods)
    record = {
        "benchmark": "fit_step",
        "config": vars(arguments),
        "methods": methods,
        "compared": f"summed losses of the first {CHECKED} steps, same start and batches, updates between",
        "target": {"together_over_apart": {"32": 0.85}} if arguments.grouped else {"share": 0.95},
    } | where_measured(arguments.device)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""Question: what do a step of ``fit`` and the ranking of label words cost on a language model beside bare loops?

Steps: Lightning's Trainer with the callbacks of ``fit`` on instruction tasks against a loop of plain torch, stock
transformers and stock PEFT: the same start and first batches (their losses are compared), rows padded on the right with
an attention mask, the loss as transformers computes it, one backward per task, fused AdamW. l_lora's opponent is PEFT's
LoRA with A frozen. Rounds are interleaved as in ``bench_fit_step.py``.

Ranking: all label words of a task behind each question by one pass, against a bare forward of the model over as many
tokens as questions and answers have without padding, in as many rows of one length; logits of the answers' columns on
both sides, rounds in turn. Prints one JSON record.

``--bare lora`` puts the loop of plain LoRA beside every method, so that l_lora is paired with LoRA itself; the first
losses are not those of one model then, but for the very first.

    python benchmarks/bench_causal_step.py --backbone tiny-lm
    python benchmarks/bench_causal_step.py --backbone FOLDER_OF_SMOLLM2 --batch_size 4 --steps 1 --warmup 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bench_fit_step import CHECKED, RATE, Rounds, beside_lora, fit_in_rounds, prepare_process, where_measured
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fusionlab
from fusionlab.evaluation.loop import evaluating
from fusionlab.search.workbench import workbench

IGNORED = -100


class BareLoop:
    """The opponent: what one would write by hand for several instruction tasks."""

    def __init__(self, module: Any, data: Any, arguments: argparse.Namespace) -> None:
        self.tasks, self.batch_size, self.device = list(data.tasks), arguments.batch_size, module.device
        self.samples = {task: data.splits[task]["train"].samples for task in self.tasks}
        self.order = {task: torch.empty(0, dtype=torch.int64) for task in self.tasks}
        base = transformers.AutoModelForCausalLM.from_pretrained(own_folder(arguments.backbone)).to(self.device)
        config = peft.LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules=sorted({name.rpartition(".")[2] for name in module.finetuned(self.tasks[0]).factors}),
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(base.train(), config, adapter_name=self.tasks[0])
        for task in self.tasks[1:]:
            self.model.add_adapter(task, config)
        self.frozen: dict[str, list[nn.Parameter]] = {task: [] for task in self.tasks}
        self.trained: list[nn.Parameter] = []
        for task in self.tasks:
            for name, factors in module.finetuned(task).factors.items():
                layer = self.model.base_model.model.get_submodule(name)
                layer.lora_A[task].weight.data.copy_(factors.lora_a)
                self.trained.append(layer.lora_B[task].weight)
                frozen = arguments.method == "l_lora" and arguments.bare is None
                (self.frozen[task] if frozen else self.trained).append(layer.lora_A[task].weight)
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)

    def _rows(self, task: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, labels and mask, padded on the right."""
        samples = self.samples[task]
        ids = [torch.as_tensor(samples.input_ids[row]).long() for row in index.tolist()]
        labels = [torch.as_tensor(samples.labels[row]).long() for row in index.tolist()]
        lengths = torch.tensor([len(row) for row in ids])
        padded = pad_sequence(ids, batch_first=True)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return padded, pad_sequence(labels, batch_first=True, padding_value=IGNORED), mask

    def _next(self, task: str) -> Tensor:
        while len(self.order[task]) < self.batch_size:
            self.order[task] = torch.cat([self.order[task], torch.randperm(len(self.samples[task].answers))])
        index, self.order[task] = self.order[task].tensor_split([self.batch_size])
        return index

    def step(self, given: dict[str, dict[str, Tensor]] | None = None) -> Tensor:
        """One update of every task; returns the summed loss."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for task in self.tasks:
            index = self._next(task) if given is None else given[task]["index"]
            ids, labels, mask = (part.to(self.device) for part in self._rows(task, index))
            self.model.set_adapter(task)
            for parameter in self.frozen[task]:  # PEFT's switch lets all of it train
                parameter.requires_grad_(False)
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return total


def own_folder(backbone: str) -> str:
    """Where transformers finds the backbone."""
    from fusionlab.backbones import resolve_model

    return resolve_model(backbone)


def measure_steps(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit by one method, the bare loop in between; the figures of both."""
    arguments = argparse.Namespace(**vars(arguments), method=method)
    module = fusionlab.CausalModule(
        arguments.backbone, method=method, rank=arguments.rank, lora_alpha=2 * arguments.rank, learning_rate=RATE,
        lr_schedule="constant",
    )  # fmt: skip
    data = fusionlab.ChatTasks(arguments.tasks, batch_size=arguments.batch_size)
    rounds = Rounds(arguments, lambda module, data: BareLoop(module, data, arguments))
    with tempfile.TemporaryDirectory() as folder:
        fit_in_rounds(module, data, rounds, Path(folder))
    return rounds.figures()


def measure_ranking(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of ranking every ranked task's test questions, over those of the bare forward."""
    model = {"class_path": "CausalModule", "init_args": {"backbone": arguments.backbone}}
    limit = {} if arguments.max_samples is None else {"max_samples": arguments.max_samples}
    data = {"class_path": "ChatTasks", "init_args": {"tasks": arguments.tasks, "eval_batch_size": 32, **limit}}
    bench = workbench({"model": model, "data": data})
    module, found = bench.module, {}
    vocabulary = module.backbone.model.config.vocab_size
    with evaluating(module), module.use(None):
        for task in (name for name in bench.data.tasks if name in module.trees):
            batches = [b for b in bench.data.eval_batches(task, "test") if b["mask"].all()]
            tree, bare = module.trees[task], []
            for batch in batches:
                tokens = int(batch["prompt_mask"].sum()) + len(batch["index"]) * len(tree.inputs)
                shape = (len(batch["index"]), -(-tokens // len(batch["index"])))
                bare.append(torch.randint(vocabulary, shape, device=module.device))
            seconds: dict[str, list[float]] = {"ranking": [], "bare": []}
            for number in range(arguments.rounds + 1):
                started = time.perf_counter()
                for batch in batches:
                    module.log_likelihoods(task, batch)
                between = time.perf_counter()
                for ids in bare:
                    module.backbone.model(input_ids=ids, use_cache=False, logits_to_keep=tree.num_columns)
                if number:
                    seconds["ranking"].append(between - started)
                    seconds["bare"].append(time.perf_counter() - between)
            ratios = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
            found[task] = {"ratio": round(statistics.median(ratios), 4), "ratios": [round(r, 3) for r in ratios]}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny-lm", help="embedded name, folder or hub id")
    parser.add_argument("--methods", nargs="+", default=["lora", "l_lora"], choices=["lora", "l_lora"])
    parser.add_argument("--bare", choices=["lora"], help="the loop's method; that of fit by default")
    parser.add_argument("--tasks", nargs="+", default=["sorting", "counting", "legs", "mood"])
    parser.add_argument("--batch_size", type=int, default=32, help="samples of each task in a step")
    parser.add_argument("--max_samples", type=int, help="questions that are ranked, of a task; all by default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=5, help=f"steps before the first round, at least {CHECKED}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    arguments.warmup = max(arguments.warmup, CHECKED)
    return arguments


def main() -> None:
    arguments = parse()
    prepare_process(arguments.threads)
    methods = {method: measure_steps(method, arguments) for method in arguments.methods}
    beside_lora(methods)
    record = {
        "benchmark": "causal_step",
        "config": vars(arguments),
        "methods": methods,
        "ranking": measure_ranking(arguments),
        "target": {"fit_over_bare": 1.05, "fit_time_over_lora_fit": 1.0, "ranking": 1.2},
    } | where_measured(arguments.device)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

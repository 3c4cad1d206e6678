"""How much slower is a whole-network tangent LoRA step than a plain LoRA step? One JSON record, ratios of medians.

ViT-B/32 from config, adapters on q and v. Opponents run interleaved in one process: a plain LoRA step, the tangent step
of ``fusionlab.linearize``, and reverse-over-forward AD (``torch.func.jvp``, differentiated). Times are of one process's
CPU time on the CPU, of the wall clock on a GPU; a ratio is the median over rounds; peak memory is what a step adds, in
a fresh process on the CPU, on the device on a GPU.

    python benchmarks/bench_tangent_step.py [--batch_size 16] [--num_layers 12] [--device cpu] [--repeats 7]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusionlab import adapters
from fusionlab.linearize import linearized_call

STEPS = ("lora", "tangent_lora", "reverse_over_forward")


class Model(nn.Module):
    """The image tower and a frozen head of ten classes."""

    def __init__(self, num_layers: int, image_size: int, method: str) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=num_layers, num_attention_heads=12,
            image_size=image_size, patch_size=32,
        )  # fmt: skip
        self.tower = CLIPVisionModel(config).eval()
        self.head = nn.Linear(768, 10).requires_grad_(False)
        adapters.inject(self.tower, ["task"], method=method, rank=16)
        adapters.activate(self.tower, "task")
        self.trained = {name: p for name, p in self.tower.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)

    def features(self, pixels: Tensor) -> Tensor:
        return self.tower(pixel_values=pixels).pooler_output


def make_step(kind: str, model: Model, pixels: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A function that computes the gradients of one step."""
    trained = list(model.trained.values())
    point = {name: torch.zeros_like(parameter) for name, parameter in model.trained.items()}

    def features() -> Tensor:
        if kind == "lora":
            return model.features(pixels)
        if kind == "tangent_lora":
            return linearized_call(lambda: model.features(pixels), model.tower, model.trained, point)
        tangents = {name: parameter - point[name] for name, parameter in model.trained.items()}
        with sdpa_kernel(SDPBackend.MATH):
            primal, tangent = torch.func.jvp(
                lambda values: (
                    torch.func.functional_call(model.tower, values, (), {"pixel_values": pixels}).pooler_output
                ),
                (point,),
                (tangents,),
            )
        return primal + tangent

    def step() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(F.cross_entropy(model.head(features()), labels), trained)
        if pixels.is_cuda:
            torch.cuda.synchronize()
        return gradients

    return step


def prepare(kind: str, args: argparse.Namespace) -> Callable[[], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Model(args.num_layers, args.image_size, "lora" if kind == "lora" else "tangent_lora").to(args.device)
    pixels = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    return make_step(kind, model, pixels, torch.arange(args.batch_size, device=args.device) % 10)


def added_memory_mb(step: Callable[[], object]) -> float:
    """Peak resident memory during a first step above what was resident before, sampled every two milliseconds."""
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    step()
    done.set()
    sampler.join()
    return (peak - before) / 2**20


def peak_memory_mb(kind: str, args: argparse.Namespace) -> float:
    """What a step adds: on a GPU the device's peak above what was held before it, on the CPU a fresh process's."""
    if args.device == "cpu":
        command = [sys.executable, __file__, "--memory_of", kind, *sys.argv[1:]]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    step = prepare(kind, args)
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory_of", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    warnings.filterwarnings("ignore", message=".*torch.jit.*")
    if args.memory_of:
        print(added_memory_mb(prepare(args.memory_of, args)))
        return
    steps = {kind: prepare(kind, args) for kind in STEPS}
    first = {kind: step() for kind, step in steps.items()}
    scale = max(float(gradient.abs().max()) for gradient in first["tangent_lora"])
    pairs = zip(first["tangent_lora"], first["reverse_over_forward"], strict=True)
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {kind: [] for kind in STEPS}
    for _ in range(args.repeats):
        for kind, step in steps.items():
            start = clock()
            step()
            times[kind].append(clock() - start)
    seconds = {kind: statistics.median(values) for kind, values in times.items()}
    ratios = {
        kind: statistics.median(one / lora for one, lora in zip(values, times["lora"], strict=True))
        for kind, values in times.items()
    }
    memory = {kind: peak_memory_mb(kind, args) for kind in STEPS}
    print(
        json.dumps(
            {
                "benchmark": "tangent_step",
                "config": {key: value for key, value in vars(args).items() if key != "memory_of"},
                "torch": torch.__version__,
                "seconds": {kind: round(value, 4) for kind, value in seconds.items()},
                "ratio_to_lora": {kind: round(value, 3) for kind, value in ratios.items()},
                "spread": {kind: [round(min(v), 4), round(max(v), 4)] for kind, v in times.items()},
                "peak_memory_mb": {kind: round(value, 1) for kind, value in memory.items()},
                "max_gradient_difference_to_reverse_over_forward": difference / scale,
                "target": {"tangent_lora": 1.8},
            }
        )
    )


if __name__ == "__main__":
    main()

"""Question: what does a training step of l_lora cost beside plain LoRA and beside layers wrapped in a jvp?

One process, one ViT-B/32 image tower from config per method (same weights), steps interleaved, so that what disturbs
the machine disturbs all. A step is forward, backward and AdamW of the adapter. Memory is the peak above what was
allocated before the step. Beside wall-clock time stands the processor time of the process, which other processes on the
machine move less (on a GPU read the wall clock). Prints one JSON record.

    python benchmarks/bench_llora_step.py --rounds 20 --batch_size 16
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fusionlab import adapters

Step = Callable[[], None]


class JvpWrapped(nn.Module):
    """An adapted layer expanded by forward-mode differentiation, its initial parameters beside it: the opponent."""

    def __init__(self, layer: LoraLayer) -> None:
        super().__init__()
        self.layer = layer
        self.names = [name for name, _ in layer.named_parameters()]
        self.initial = nn.ParameterList([parameter.detach().clone() for parameter in layer.parameters()])
        self.initial.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        def call(*parameters: Tensor) -> Tensor:
            return functional_call(self.layer, dict(zip(self.names, parameters, strict=True)), (x,))

        current = tuple(self.layer.parameters())
        tangent = tuple(parameter - start for parameter, start in zip(current, self.initial, strict=True))
        value, tangent_output = jvp(call, tuple(self.initial), tangent)
        return value + tangent_output


def build(method: str, arguments: argparse.Namespace, base: nn.Module) -> tuple[Step, int]:
    """A training step of ``method`` on a copy of ``base``, and the number of parameters that it trains."""
    model = copy.deepcopy(base).to(arguments.device).train()
    adapters.inject(
        model,
        ["task"],
        method="l_lora" if method == "l_lora" else "lora",
        rank=arguments.rank,
        lora_alpha=2 * arguments.rank,
        dropout=arguments.dropout,
    )
    adapters.activate(model, "task")
    parameters = adapters.trainable_parameters(model, "task")
    if method == "jvp":
        for name, layer in [item for item in model.named_modules() if isinstance(item[1], LoraLayer)]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, JvpWrapped(layer))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    size = model.config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(arguments.batch_size, 3, size, size, generator=generator).to(arguments.device)

    def step() -> None:
        optimizer.zero_grad()
        model(pixel_values=pixels).image_embeds.square().mean().backward()
        optimizer.step()
        if pixels.is_cuda:
            torch.cuda.synchronize()

    return step, sum(parameter.numel() for parameter in parameters)


def peak_bytes(step: Step, device: str) -> int:
    """Peak of the bytes allocated during a step above those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def quartiles(values: list[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(values, n=4)]


def over_lora(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Quartiles of the ratio to plain LoRA's step of the same round."""
    return {
        method: quartiles([mine / lora for mine, lora in zip(times[method], times["lora"], strict=True)])
        for method in ("l_lora", "jvp")
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="interleaved steps of each method that are timed")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    torch.manual_seed(0)
    base = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32))
    steps, num_trainable = {}, {}
    for method in ("lora", "l_lora", "jvp"):
        steps[method], num_trainable[method] = build(method, arguments, base)
    memory: dict[str, int] = {}
    wall: dict[str, list[float]] = {method: [] for method in steps}
    processor: dict[str, list[float]] = {method: [] for method in steps}
    for method, step in steps.items():
        step()  # optimizer state and kernels
        memory[method] = peak_bytes(step, arguments.device)
    for number in range(arguments.rounds):
        order = list(steps) if number % 2 == 0 else list(steps)[::-1]
        for method in order:
            start, start_processor = time.perf_counter(), time.process_time()
            steps[method]()
            wall[method].append(time.perf_counter() - start)
            processor[method].append(time.process_time() - start_processor)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    record = {
        "benchmark": "llora_step",
        "model": "CLIP ViT-B/32 image tower from config, q_proj and v_proj adapted",
        "config": vars(arguments),
        "seconds_per_step_quartiles": {method: quartiles(values) for method, values in wall.items()},
        "time_over_lora_quartiles": over_lora(wall),
        "processor_time_over_lora_quartiles": over_lora(processor),
        "peak_bytes_of_a_step": memory,
        "memory_over_lora": {method: round(memory[method] / memory["lora"], 4) for method in ("l_lora", "jvp")},
        "num_trainable": num_trainable,
        "target": {"time_over_lora": 1.0, "memory_over_lora": 1.0},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "machine": f"{platform.machine()}, {torch.cuda.get_device_name() if arguments.device == 'cuda' else 'CPU'}",
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()

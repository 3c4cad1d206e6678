"""How much cheaper is a sweep's grid than its points one by one? 7 tasks, 120 subsets x 21 coefficients on tiny-clip.

Adapters are random (cost does not depend on training). Points one by one: module and data built, the adapters fused and
scored by ``fusionlab.evaluate``, for a sample of points, times the number of points; ``warm`` leaves the building out.

    python benchmarks/bench_sweep.py                       # the full grid
    python benchmarks/bench_sweep.py --samples 32 --subsets 6 --points 3   # a short trial
"""

import argparse
import itertools
import json
import platform
import time

import torch

import fusionlab
from fusionlab.adapters import base_state
from fusionlab.data.drawing import DRAWN_TASKS
from fusionlab.evaluation import Candidate, TangentOutputs, score_candidates
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.making import fuse_weights
from fusionlab.rules import TaskArithmetic

TASKS = sorted(DRAWN_TASKS)[:7]
AT_ONCE = 64
GRID = tuple(round(0.05 * step, 2) for step in range(21))


def build(samples: int) -> tuple[fusionlab.ClipModule, fusionlab.ImageTasks]:
    data = fusionlab.ImageTasks(TASKS, max_samples=samples, eval_batch_size=min(128, samples))
    module = fusionlab.ClipModule()
    data.image_size = module.backbone.image_size
    data.setup("test")
    module.prepare_tasks(data.tasks)
    return module.eval(), data


def random_adapters(method: str, base: dict[str, torch.Tensor]) -> Finetuned:
    trained = fusionlab.ClipModule(method=method)
    trained.add_adapters(TASKS)
    generator = torch.Generator().manual_seed(0)
    for parameter in (parameter for task in TASKS for parameter in trained.task_parameters[task]):
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return Finetuned(base, {task: trained.finetuned(task) for task in TASKS})


def seconds(function, *args) -> float:
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def grid(method: str, finetuned: Finetuned, module, data, points: list) -> None:
    plans = [finetuned.plan(TaskArithmetic(value), subset) for subset, value in points]
    if method == "tangent_lora":
        candidates = {str(number): (plan.by_task, TASKS, {}) for number, plan in enumerate(plans)}
        TangentOutputs(module, data, finetuned).score(candidates, "test")
        return
    models = list({plan.signature: plan for plan in plans}.values())
    for start in range(0, len(models), AT_ONCE):
        made = [finetuned.make(plan) for plan in models[start : start + AT_ONCE]]
        chunk = {str(number): Candidate(weights, TASKS, {}) for number, weights in enumerate(made)}
        score_candidates(module, data, chunk, "test")


def alone(finetuned: Finetuned, module, data, point: tuple) -> None:
    subset, value = point
    chosen = {task: finetuned.weights[task] for task in subset}
    with module.use(fuse_weights(TaskArithmetic(value), finetuned.base, chosen).weights):
        fusionlab.evaluate(module, data, TASKS, "test")


def measure(method: str, args: argparse.Namespace) -> dict[str, float]:
    module, data = build(args.samples)
    finetuned = random_adapters(method, base_state(module.base_model))
    subsets = [subset for size in range(2, 8) for subset in itertools.combinations(TASKS, size)]
    points = [
        (subset, value)
        for subset in subsets[:: max(1, len(subsets) // args.subsets)]
        for value in (0.05 * step for step in range(21))
    ]
    sampled = points[10 :: max(1, len(points) // args.points)][: args.points]
    grid(method, finetuned, module, data, points[:2])  # warm up
    whole = seconds(grid, method, finetuned, module, data, points)
    warm = [seconds(alone, finetuned, module, data, point) for point in sampled]
    cold = [seconds(lambda point=point: alone(finetuned, *build(args.samples), point)) for point in sampled]
    record = {
        "points": len(points),
        "grid_seconds": whole,
        "one_by_one_seconds": len(points) * sum(cold) / len(cold),
        "one_by_one_warm_seconds": len(points) * sum(warm) / len(warm),
    }
    if method == "tangent_lora":
        single = [seconds(alone, finetuned, module, data, ((task,), 1.0)) for task in TASKS]
        with module.use(None):
            base = seconds(fusionlab.evaluate, module, data, TASKS, "test")
        record["grid_over_passes"] = whole / (base + sum(single))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=256, help="test samples of each task")
    parser.add_argument("--subsets", type=int, default=120, help="subsets of the 120, evenly spread")
    parser.add_argument("--points", type=int, default=5, help="points that are evaluated by themselves")
    parser.add_argument("--methods", nargs="+", default=["tangent_lora", "l_lora"])
    args = parser.parse_args()
    results = {method: measure(method, args) for method in args.methods}
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(json.dumps({"bench": "sweep", "config": vars(args), "versions": versions, "results": results}))


if __name__ == "__main__":
    main()

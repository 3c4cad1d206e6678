"""Do a few looks find the coefficient that a whole grid finds? Every grid point is scored, the looks are then replayed.

For each run (method, seed) and subset of the embedded tasks: the validation score of task arithmetic at all multiples
of 0.05 from 0 to ``--limit``, and of the MetaGPT multiplier at those of 0.1. What ``ToTheTop`` would look at is
replayed from these; its choice is held against the best of the grid, on validation (loss) and on test.

    python benchmarks/study_looks.py --output FOLDER                       # clip: lora, l_lora, full, three seeds
    python benchmarks/study_looks.py --output FOLDER --fit configs/t5/embedded_lora.yaml --methods lora
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusionlab.commands.sweep.choosing import Subset, Tried, by_size, choose, choose_of_size
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.identity import Point
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.commands.sweep.worker import validation_point
from fusionlab.evaluation.rows import mean_score
from fusionlab.rules import Metagpt, Rule, TaskArithmetic
from fusionlab.search import Looks, ToTheTop, best

Table = dict[Subset, dict[float, float]]
STEPS = {"task_arithmetic": 0.05, "metagpt_multiplier": 0.1}


def rule_with(name: str, value: float) -> Rule:
    return TaskArithmetic(value) if name == "task_arithmetic" else Metagpt("model", value)


def replay(name: str, table: Table) -> tuple[dict[Subset, float], dict[Subset, int]]:
    """By subset what is chosen, and after how many looks."""
    looked = dict.fromkeys(table, 0)

    def score(tried: Sequence[Tried]) -> list[float]:
        for subset, _ in tried:
            looked[subset] += 1
        return [table[subset][value] for subset, value in tried]

    if name == "task_arithmetic":
        return choose(table, score, lambda start: ToTheTop(start)), looked
    looks: Looks = ToTheTop(1.0, 0.1)
    chosen = {}
    for of_size in by_size(table).values():
        chosen |= choose_of_size(of_size, score, looks)
    return chosen, looked


def of_run(sweep: Sweep, source: RunSource, name: str, limit: float) -> list[dict[str, float]]:
    worker = sweep._begun(source)
    step = STEPS[name]
    grid = [round(place * step, 10) for place in range(round(limit / step) + 1)]
    table: Table = {}
    for subset in sweep.subsets:
        points = [validation_point(name, rule_with(name, value), subset) for value in grid]
        table[subset] = dict(zip(grid, map(mean_score, worker.score(points)), strict=True))
    chosen, looked = replay(name, _with_zeros_beyond(table, step))

    def tested(subset: Subset, value: float) -> float:
        [rows] = worker.score([Point(name, rule_with(name, value), subset, "test", subset)])
        return mean_score(rows)

    found = []
    for subset, scores in table.items():
        top = best(scores)
        line = {"looks": looked[subset], "loss": scores[top] - scores.get(chosen[subset], 0.0)}
        line |= {"chosen": chosen[subset], "best": top, "num_tasks": len(subset)}
        line["test_loss"] = tested(subset, top) - tested(subset, chosen[subset])
        found.append(line)
    return found


def _with_zeros_beyond(table: Mapping[Subset, Mapping[float, float]], step: float) -> Table:
    """Beyond the grid, up to 3, nothing is known: taken as 0, so that a look there costs one and finds nothing."""
    places = [round(place * step, 10) for place in range(round(3 / step) + 1)]
    return {subset: dict.fromkeys(places, 0.0) | dict(scores) for subset, scores in table.items()}


def told(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    losses, tests = [line["loss"] for line in lines], [line["test_loss"] for line in lines]
    return {
        "subsets": len(lines),
        "mean_looks": statistics.fmean(line["looks"] for line in lines),
        "mean_loss": statistics.fmean(losses),
        "within_.01": sum(loss <= 0.01 for loss in losses) / len(losses),
        "worst_loss": max(losses),
        "mean_test_loss": statistics.fmean(tests),
        "stderr_test_loss": statistics.stdev(tests) / len(tests) ** 0.5 if len(tests) > 1 else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--fit", help="a configuration of fit; the embedded default where it is left out")
    parser.add_argument("--methods", nargs="+", default=["lora", "l_lora", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--subsets", type=int, default=10, help="of each size, at most")
    parser.add_argument("--limit", type=float, default=2.0, help="the grid's largest coefficient")
    args = parser.parse_args()
    recipe = SweepRecipe(
        args.output,
        fit=args.fit or {},
        methods=args.methods,
        seeds=args.seeds,
        rules=["average"],
        subsets_per_size=args.subsets,
    )
    sweep = Sweep(recipe)
    sweep.run()
    found: dict[str, dict[str, list]] = {name: {} for name in STEPS}
    for name in STEPS:
        for source in sweep.sources:
            found[name].setdefault(source.method, []).extend(of_run(sweep, source, name, args.limit))
            record = {name: {method: told(lines) for method, lines in of.items()} for name, of in found.items()}
            Path(args.output, "looks.json").write_text(json.dumps({"told": record, "lines": found}, indent=1) + "\n")
            print(source.name, name, told(found[name][source.method]), flush=True)


if __name__ == "__main__":
    main()

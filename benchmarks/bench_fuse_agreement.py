"""Do fused weights agree with mergekit's? The same mergekit configuration given to both, on small Llama checkpoints.

pip install --no-deps --target FOLDER mergekit immutables
python benchmarks/bench_fuse_agreement.py --mergekit FOLDER [--layers 4] [--width 128] [--dtype float32]

Two results a and b agree where |a - b| <= 1 ulp of the output + 4·2^-24·(|θ₀| + Σ|λτ|). For TIES, breadcrumbs and SCE
entries exactly at a threshold may differ, as mergekit's sort does not say which of them it keeps: they are counted.
DARE and DELLA are random and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_fuse
import torch
from bench_fuse import make_checkpoints, write_yaml

from fusionlab.__main__ import main as fusionlab
from fusionlab.tensors import open_checkpoint

TIES_DENSITY, CRUMBS_DENSITY, GAMMA, TOP = 0.2, 0.3, 0.02, 0.3
WEIGHTS = {"model0": 0.5, "model1": 0.3, "model2": 0.7}
GRADED = {"model0": [0.5, 0.1, 0.9], "model1": [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.3}], "model2": 0.7}
COPIED_RECIPE = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]  # the t of mergekit's own example of slerp

_MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for config, output in zip(sys.argv[1::2], sys.argv[2::2]):
    content = MergeConfiguration.model_validate(yaml.safe_load(open(config)))
    run_merge(content, output, MergeOptions(copy_tokenizer=False))
"""


def configurations(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Configurations by name; slerp takes the base and one model, nuslerp two."""
    base = {"base_model": str(folders["base"])}

    def of(method: str, names: list[str], weights: dict[str, Any] | None = None, **own: Any) -> dict[str, Any]:
        rows = [
            {"model": str(folders[name]), "parameters": ({"weight": weights[name]} if weights else {}) | own}
            for name in names
        ]
        return {"merge_method": method, "models": rows}

    def sliced(*rows: list[tuple[str, int, int]], **parameters: Any) -> dict[str, Any]:
        of_rows = [
            [
                {"model": str(folders[name]), "layer_range": [first, end], "parameters": parameters}
                for name, first, end in row
            ]
            for row in rows
        ]
        return {"slices": [{"sources": row} for row in of_rows]}

    every, two = list(WEIGHTS), ["model0", "model1"]
    crumbs = {"density": CRUMBS_DENSITY, "gamma": GAMMA}
    scaled = {"parameters": {"normalize": True, "lambda": 1.2}}
    return {
        "linear": of("linear", every, WEIGHTS),
        "linear, by tensor": of("linear", every, GRADED),
        "task_arithmetic": of("task_arithmetic", every, WEIGHTS) | base | scaled,
        "task_arithmetic, by tensor": of("task_arithmetic", every, GRADED) | base,
        "ties": of("ties", every, WEIGHTS, density=TIES_DENSITY) | base | {"parameters": {"int8_mask": True}},
        "ties, by tensor": of("ties", every, GRADED, density=TIES_DENSITY) | base,
        "breadcrumbs": of("breadcrumbs", every, WEIGHTS, **crumbs) | base,
        "breadcrumbs_ties": of("breadcrumbs_ties", every, WEIGHTS, **crumbs) | base,
        "slerp": of("slerp", ["base", "model0"]) | base | {"parameters": {"t": 0.3}},
        "slerp, by tensor": of("slerp", ["base", "model0"]) | base | {"parameters": {"t": COPIED_RECIPE}},
        "nuslerp": of("nuslerp", two, WEIGHTS) | base,
        "nuslerp, by tensor": of("nuslerp", two, GRADED) | base,
        "nuslerp without a base": of("nuslerp", two, WEIGHTS),
        "karcher": of("karcher", every),
        "model_stock": of("model_stock", every) | base,
        "sce": of("sce", every) | base,
        "slerp, slices": {"merge_method": "slerp"}
        | base
        | {"parameters": {"t": COPIED_RECIPE}}
        | sliced([("base", 0, 3), ("model0", 0, 3)], [("model0", 1, 4), ("base", 1, 4)]),
        "passthrough, slices": {"merge_method": "passthrough"}
        | sliced([("model0", 0, 3)], [("model1", 1, 4)])
        | {"parameters": {"scale": [{"filter": "o_proj", "value": [0.5, 1]}, {"value": 1}]}},
        "sce, select_topk": of("sce", every) | base | {"parameters": {"select_topk": TOP}},
    }


def at_threshold(method: str, vectors: list[torch.Tensor]) -> torch.Tensor:
    """Entries as large as one at the edge of what a method keeps of a tensor: there a sort decides."""
    size = vectors[0].numel()
    found = torch.zeros_like(vectors[0], dtype=torch.bool)
    if method == "sce":  # near the edge: mergekit's variances are float32
        spread = torch.stack(vectors).var(dim=0, unbiased=False)
        kept = int(TOP * int(spread.count_nonzero()))
        edge = spread.flatten().kthvalue(size - kept + 1).values
        return (spread - edge).abs() <= 1e-5 * edge
    kept = int((TIES_DENSITY if method == "ties" else CRUMBS_DENSITY) * size)
    skipped = 0 if method == "ties" else min(int(GAMMA * size), size - kept)
    for rank in (rank for rank in (skipped, max(1, skipped + kept)) if 0 < rank < size):
        for magnitudes in (vector.abs() for vector in vectors):
            found |= magnitudes == magnitudes.flatten().kthvalue(size - rank + 1).values
    return found


def compare(method: str, ours: Path, theirs: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Number of elements, of those beyond the bound, and of those beyond it where no sort decides."""
    checkpoints = {name: open_checkpoint(path).weights for name, path in folders.items()}
    left, right = open_checkpoint(ours).weights, open_checkpoint(theirs).weights
    counts: dict[str, Any] = {"elements": 0, "different": 0, "beyond_bound": 0, "beyond_bound_unexplained": 0}
    largest = 0.0
    for name in left.tensors:
        known = name in checkpoints["base"].tensors  # a stacked model has more blocks
        base = checkpoints["base"].read(name).float() if known else torch.zeros(left.tensors[name].shape)
        vectors = [checkpoints[task].read(name).float() - base for task in WEIGHTS if known] or [base]
        spread = sum(vector.double().abs() for vector in vectors)
        a, b = left.read(name), right.read(name)
        larger = torch.maximum(a.abs(), b.abs())
        ulp = (torch.nextafter(larger, torch.full_like(larger, torch.inf)) - larger).double()
        error, bound = (a.double() - b.double()).abs(), ulp + 4 * 2.0**-24 * (base.double().abs() + spread)
        beyond = error > bound
        counts["elements"] += a.numel()
        counts["different"] += int((a != b).sum())
        counts["beyond_bound"] += int(beyond.sum())
        if beyond.any() and method == "sce" and (beyond & at_threshold(method, vectors)).any():
            beyond.zero_()  # another choice at the threshold moves the weights of the models, and so every entry
        if beyond.any() and method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
            beyond &= ~at_threshold(method.removesuffix("_ties"), vectors)
        counts["beyond_bound_unexplained"] += int(beyond.sum())
        largest = max(largest, float((error / bound).max()))
    return counts | {"largest_in_bounds": round(largest, 3), "same_names": set(left.tensors) == set(right.tensors)}


def main() -> None:
    """Run every configuration in both and print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="folder that mergekit is installed in")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="hidden size; the vocabulary is four times it")
    parser.add_argument("--dtype", default="float32", help="type to compute in")
    parser.add_argument("--out_dtype", default="bfloat16", help="type of the output")
    parser.add_argument("--folder", default=None, help="where to make the checkpoints; a temporary one by default")
    options = parser.parse_args()
    width = options.width
    bench_fuse.HIDDEN, bench_fuse.INTERMEDIATE, bench_fuse.KEY_VALUE, bench_fuse.VOCABULARY = (
        width, 2 * width, width // 4, 4 * width
    )  # fmt: skip
    record: dict[str, Any] = {"benchmark": "fuse_agreement", **vars(options), "methods": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(options.folder or temporary)
        folders = make_checkpoints(scratch, options.layers, ["base", *WEIGHTS])
        paths: dict[str, tuple[str, Path, Path]] = {}
        for name, configuration in configurations(folders).items():
            config = configuration | {"dtype": options.dtype, "out_dtype": options.out_dtype}
            ours, theirs = scratch / "ours" / name, scratch / "theirs" / name
            paths[name] = write_yaml(scratch / f"{name}.yaml", config), ours, theirs
            for output in (ours, theirs):
                shutil.rmtree(output, ignore_errors=True)
        both = [each for config, _, theirs in paths.values() for each in (config, str(theirs))]
        there = os.environ | {"PYTHONPATH": options.mergekit}
        subprocess.run([sys.executable, "-c", _MERGEKIT, *both], check=True, capture_output=True, env=there)
        for name, (config, ours, theirs) in paths.items():
            assert fusionlab(["fuse", "--config", config, "--output", str(ours)]) == 0
            record["methods"][name] = compare(name.partition(",")[0], ours, theirs, folders)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""Do fused weights agree with mergekit's? The same mergekit configuration given to both, on small Llama checkpoints.

python benchmarks/bench_fuse_agreement.py --mergekit /path/to/mergekit-yaml [--layers 1] [--dtype float32]

Two results a and b agree where |a - b| <= 1 ulp of the output + 4·2^-24·(|θ₀| + Σ|λτ|). For TIES and breadcrumbs
entries exactly at a threshold may differ, as mergekit's sort does not say which of them it keeps: they are counted.
DARE is random and is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_fuse import make_checkpoints, run, write_yaml

from fusionlab.tensors import open_checkpoint

TIES_DENSITY, CRUMBS_DENSITY, GAMMA = 0.2, 0.3, 0.02
WEIGHTS = {"model0": 0.5, "model1": 0.3, "model2": 0.7}


def configurations(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """One configuration per method; slerp takes the base and one model."""

    def models(**parameters: float) -> list[dict[str, Any]]:
        rows = [(folders[name], {"weight": weight} | parameters) for name, weight in WEIGHTS.items()]
        return [{"model": str(path), "parameters": own} for path, own in rows]

    base = str(folders["base"])
    return {
        "linear": {"merge_method": "linear", "models": models()},
        "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": base, "models": models(),
                            "parameters": {"normalize": True, "lambda": 1.2}},
        "ties": {"merge_method": "ties", "base_model": base, "models": models(density=TIES_DENSITY),
                 "parameters": {"int8_mask": True}},
        "breadcrumbs": {"merge_method": "breadcrumbs", "base_model": base,
                        "models": models(density=CRUMBS_DENSITY, gamma=GAMMA)},
        "slerp": {"merge_method": "slerp", "base_model": base, "parameters": {"t": 0.3},
                  "models": [{"model": base}, {"model": str(folders["model0"])}]},
    }  # fmt: skip


def at_threshold(method: str, task_vector: torch.Tensor) -> torch.Tensor:
    """Entries as large as one at the edge of what a method keeps of a tensor: there a sort decides."""
    magnitudes = task_vector.abs()
    size = magnitudes.numel()
    found = torch.zeros_like(magnitudes, dtype=torch.bool)
    if method == "ties":
        ranks = [max(1, int(TIES_DENSITY * size))]
    elif method == "breadcrumbs":
        kept = int(CRUMBS_DENSITY * size)
        skipped = min(int(GAMMA * size), size - kept)
        ranks = [skipped, skipped + kept]
    else:
        ranks = []
    for rank in (rank for rank in ranks if 0 < rank < size):
        found |= magnitudes == magnitudes.flatten().kthvalue(size - rank + 1).values
    return found


def compare(method: str, ours: Path, theirs: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Number of elements, of those beyond the bound, and of those beyond it where no sort decides."""
    checkpoints = {name: open_checkpoint(path).weights for name, path in folders.items()}
    left, right = open_checkpoint(ours).weights, open_checkpoint(theirs).weights
    counts = {"elements": 0, "different": 0, "beyond_bound": 0, "beyond_bound_unexplained": 0}
    largest = 0.0
    for name in left.tensors:
        base = checkpoints["base"].read(name).float()
        vectors = [checkpoints[task].read(name).float() - base for task in WEIGHTS]
        spread = sum(vector.double().abs() for vector in vectors)
        a, b = left.read(name), right.read(name)
        larger = torch.maximum(a.abs(), b.abs())
        ulp = (torch.nextafter(larger, torch.full_like(larger, torch.inf)) - larger).double()
        error = (a.double() - b.double()).abs()
        beyond = error > ulp + 4 * 2.0**-24 * (base.double().abs() + spread)
        counts["elements"] += a.numel()
        counts["different"] += int((a != b).sum())
        counts["beyond_bound"] += int(beyond.sum())
        if beyond.any():
            sorted_out = torch.stack([at_threshold(method, vector) for vector in vectors]).any(dim=0)
            counts["beyond_bound_unexplained"] += int((beyond & ~sorted_out).sum())
        largest = max(largest, float(error.max()))
    return counts | {"largest_difference": largest, "same_names": set(left.tensors) == set(right.tensors)}


def main() -> None:
    """Run every method in both and print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="path of mergekit-yaml")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="type to compute in; the output is bfloat16 beside it")
    parser.add_argument("--folder", default=None, help="where to make the checkpoints; a temporary one by default")
    options = parser.parse_args()
    if not options.mergekit:
        parser.error("give --mergekit")
    record: dict[str, Any] = {"benchmark": "fuse_agreement", "dtype": options.dtype, "methods": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(options.folder or temporary)
        folders = make_checkpoints(scratch, options.layers, ["base", *WEIGHTS])
        for method, configuration in configurations(folders).items():
            config = configuration | {"dtype": options.dtype, "out_dtype": "bfloat16"}
            ours, theirs = scratch / "ours", scratch / "theirs"
            for output in (ours, theirs):
                shutil.rmtree(output, ignore_errors=True)
            path = write_yaml(scratch / "merge", config)
            run([options.mergekit, path, str(theirs), "--no-copy-tokenizer"])
            command = [sys.executable, "-m", "fusionlab", "fuse", "--config", path, "--output", str(ours)]
            subprocess.run(command, check=True, capture_output=True)
            record["methods"][method] = compare(method, ours, theirs, folders)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

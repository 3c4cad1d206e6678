"""Seeded runs of every command, and what they write: recorded before the house is rebuilt, compared after each step.

    python tests/helpers/recorded_runs.py FILE            # writes what the runs give
    python tests/helpers/recorded_runs.py FILE --compare  # tells where they differ

Bits depend on the processor and on torch, so that a record holds for one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fusionlab.__main__ import main
from fusionlab.rules.config import known_rules

METHODS = ("lora", "l_lora", "tangent_lora", "tangent", "full")
RULES = ["metagpt", {"class_path": "ties", "init_args": {"density": 0.3}}]
NEEDS: dict[str, dict[str, Any]] = {
    "dare": {"rule": "metagpt", "drop_rate": 0.4},
    "della": {"rule": "metagpt"},
    "trim": {"rule": "metagpt", "density": 0.3},
    "task_arithmetic": {"scaling_coefficient": 0.3},
    "wudi": {"num_steps": 3},
}
SIZES = ["--data.max_samples", "16", "--data.batch_size", "4", "--data.eval_batch_size", "8"]
STEPS = ["--trainer.max_steps", "5", "--trainer.enable_progress_bar", "false"]
TIMES = ("seconds", "fuse_seconds", "peak_bytes")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each run's name and arguments; all in one working folder, later ones read what earlier ones wrote."""
    images, texts = '["digits", "signs"]', '["sentiment", "inference"]'
    models = {
        "clip": ["--model", "ClipModule", "--data.tasks", images],
        "t5": ["--model", "T5Module", "--data", "TextTasks", "--data.tasks", texts],
        "vit": ["--model", "ViTModule", "--model.backbone", "vit", "--data.tasks", images],
    }
    named = json.dumps({"metagpt": RULES[0], "ties": RULES[1]})
    for model, flags in models.items():
        for method in METHODS:
            folder = f"{model}-{method}"
            own = [*flags, "--model.method", method, "--trainer.default_root_dir", folder, "--fusion.rules", named]
            yield folder, ["fit", *own, *SIZES, *STEPS]
    for kind, folder in (("adapters", "clip-lora/adapters"), ("full", "clip-full/finetuned")):
        for rule in known_rules():
            config = {"class_path": rule, "init_args": NEEDS.get(rule, {})}
            inputs = [f"--finetuned.{task}={folder}/{task}" for task in ("digits", "signs")]
            output = f"fuse-{kind}-{rule}"
            yield output, ["fuse", "--base", "tiny-clip", *inputs, "--rule", json.dumps(config), "--output", output]
    clip, weights = models["clip"], ["--model.weights", "clip-lora/fused/metagpt"]
    for command in ("validate", "test"):
        yield command, [command, *clip, *SIZES, *weights, "--trainer.default_root_dir", command]
    yield (
        "predict.csv",
        ["predict", *clip, *weights, "--data.images", "images", "--output", "predict.csv"],
    )
    yield "sweep", ["sweep", "--runs", '["clip-lora"]', "--rules", '["task_arithmetic", "ties"]', "--output", "sweep"]


def record() -> dict[str, Any]:
    """What all runs give: rows without times, and SHA-256 of weights and tables, by name."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, chdir(folder), open(os.devnull, "w") as nowhere:
        _inputs()
        for name, argv in commands():
            with redirect_stdout(nowhere):
                code = main(argv)
            found[name] = {"code": code} | _written(Path(name))
            print(name, code, file=sys.stderr, flush=True)
    return {"machine": machine(), "runs": found}


def machine() -> str:
    """What bits depend on."""
    return f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two records differ, keys that were added aside."""
    found = []
    for name, old in before["runs"].items():
        new = after["runs"].get(name, {})
        found += [f"{name}: {key}" for key in old if key != "rows" and old[key] != new.get(key)]
        rows = new.get("rows", [])
        if len(rows) != len(old.get("rows", [])):
            found.append(f"{name}: {len(rows)} rows")
        for number, (was, now) in enumerate(zip(old.get("rows", []), rows, strict=False)):
            found += [f"{name}: row {number}, {key}" for key in was if was[key] != now.get(key)]
    return found


def _inputs() -> None:
    """A small ViT, and pictures to label."""
    import numpy as np
    from PIL import Image
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained("vit")
    Path("images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(f"images/{number}.png")


def _written(path: Path) -> dict[str, Any]:
    if path.is_file():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix in (".safetensors", ".csv"):
            found[str(file.relative_to(path))] = hashlib.sha256(file.read_bytes()).hexdigest()
    results = [file for file in (path / "results.json", path / "validate.json") if file.is_file()]
    if results:
        rows = json.loads(results[0].read_text())["rows"]
        found["rows"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true", help="compare with the file, which stays as it is")
    arguments = parser.parse_args()
    made = record()
    if arguments.compare:
        told = differences(json.loads(arguments.file.read_text()), made)
        print("\n".join(told) or "the same")
        sys.exit(bool(told))
    arguments.file.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")

"""Fuse Llama-shaped checkpoints: fusionlab and mergekit in turn in one run, and the floor that cp sets.

python benchmarks/bench_fuse.py [--layers 22] [--models 3] [--mergekit /path/to/mergekit-yaml] [--curve]

22 layers are 1.1 billion parameters. Checkpoints are made in --folder (about 2.2 GB each) and read once, so that every
contestant finds them in the page cache where they fit. Every run is a whole process: wall time and peak resident memory
of it and its children. mergekit comes from an environment of its own; without --mergekit only fusionlab is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fusionlab.engine import TensorInfo
from fusionlab.tensors import WeightsWriter, open_checkpoint

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32000
DENSITY, COEFFICIENT = 0.2, 0.3


def llama_tensors(num_layers: int) -> dict[str, TensorInfo]:
    """Names and shapes of a Llama of this depth, in bfloat16."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (KEY_VALUE, HIDDEN) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}


def llama_config(num_layers: int) -> dict[str, Any]:
    """What transformers and mergekit want to know of it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": INTERMEDIATE, "num_attention_heads": 32, "num_key_value_heads": KEY_VALUE // 64,
        "num_hidden_layers": num_layers, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip


def make_checkpoints(root: Path, num_layers: int, names: list[str]) -> dict[str, Path]:
    """A base and fine-tuned models that differ from it by a tenth of its spread; made only where they are missing."""
    tensors = llama_tensors(num_layers)
    folders = {name: root / f"llama-{num_layers}-{name}" for name in names}
    for seed, (name, folder) in enumerate(folders.items()):
        if (folder / "config.json").is_file():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        base = None if name == "base" else open_checkpoint(folders["base"]).weights
        generator = torch.Generator().manual_seed(seed)
        with WeightsWriter(folder, tensors) as writer:
            for tensor, info in tensors.items():
                values = torch.randn(info.numel, generator=generator).mul_(0.02 if base is None else 0.002)
                if base is not None:
                    values += base.read(tensor).flatten()
                writer.write(tensor, 0, values.bfloat16())
        (folder / "config.json").write_text(json.dumps(llama_config(num_layers)))
    return folders


_CHILD = """
import os, resource, subprocess, sys, time
start = time.perf_counter()
with open(sys.argv[1], "wb") as log:
    code = subprocess.call(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, time.perf_counter() - start, used.ru_maxrss // 1024, used.ru_utime + used.ru_stime)
"""


def run(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds and peak resident megabytes of a command.

    It is started from a small process, as a child's peak includes what its parent held when it was forked.
    """
    with tempfile.NamedTemporaryFile() as log:
        starter = [sys.executable, "-S", "-c", _CHILD, log.name, *command]
        done = subprocess.run(starter, capture_output=True, text=True, check=True)
        code, seconds, peak, processor = done.stdout.split()
        if code != "0":
            raise RuntimeError(f"{command} failed:\n{log.read().decode()[-4000:]}")
    return {"seconds": round(float(seconds), 2), "cpu_seconds": round(float(processor), 2), "peak_mb": int(peak)}


def run_fusionlab(rule: Any, folders: dict[str, Path], tasks: dict[str, str], output: Path) -> dict[str, float]:
    """One fuse command, without the statistics of earlier ones."""
    for folder in folders.values():
        (folder / "fusion_stats.json").unlink(missing_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "base": str(folders["base"]),
        "finetuned": {task: str(folders[name]) for task, name in tasks.items()},
        "rule": rule,
        "output": str(output),
    }
    return run([sys.executable, "-m", "fusionlab", "fuse", "--config", write_yaml(output, recipe)])


def run_mergekit(executable: str, method: str, folders: dict[str, Path], output: Path) -> dict[str, float]:
    """One mergekit-yaml command."""
    shutil.rmtree(output, ignore_errors=True)
    own = {"weight": COEFFICIENT} if method == "task_arithmetic" else {"weight": 1.0, "density": DENSITY}
    recipe = {
        "merge_method": method,
        "base_model": str(folders["base"]),
        "models": [{"model": str(path), "parameters": own} for name, path in folders.items() if name != "base"],
        "dtype": "bfloat16",
    }
    return run([executable, write_yaml(output, recipe), str(output), "--no-copy-tokenizer"])


def write_yaml(output: Path, recipe: dict[str, Any]) -> str:
    """The recipe in a file beside the output; JSON is YAML."""
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(recipe))
    return str(path)


def floor(folders: dict[str, Path], output: Path, num_reads: int) -> dict[str, float]:
    """Seconds to read the inputs so many times and to write one output with cp, before and after a sync."""
    files = [str(path / "model.safetensors") for path in folders.values()]
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    os.sync()
    start = time.perf_counter()
    for _ in range(num_reads):
        for file in files:
            subprocess.run(["cp", file, "/dev/null"], check=True)
    subprocess.run(["cp", files[0], str(output)], check=True)
    written = time.perf_counter() - start
    os.sync()
    return {"seconds": round(written, 2), "seconds_synced": round(time.perf_counter() - start, 2)}


def rules_of(kinds: list[str]) -> dict[str, Any]:
    """The rules that are timed, as a recipe says them."""
    known: dict[str, Any] = {
        "task_arithmetic": {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": COEFFICIENT}},
        "metagpt": "metagpt",
        "ties": {"class_path": "ties", "init_args": {"density": DENSITY, "scope": "tensor"}},
    }
    return {kind: known[kind] for kind in kinds}


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every rule by fusionlab and, where it has it, by mergekit; and the floors."""
    names = ["base", *(f"model{k}" for k in range(options.models))]
    folders = make_checkpoints(scratch, options.layers, names)
    floor(folders, scratch / "warm-up", 1)
    tasks = {name: name for name in names[1:]}
    output = scratch / "fused"
    runs: dict[str, Any] = {}
    for kind, rule in rules_of(options.rules).items():
        runs[kind] = {"fusionlab": [], "mergekit": [], "floor": []}
        for _ in range(options.repeats):
            runs[kind]["fusionlab"].append(run_fusionlab(rule, folders, tasks, output))
            if options.mergekit and kind != "metagpt":
                runs[kind]["mergekit"].append(run_mergekit(options.mergekit, kind, folders, output))
            runs[kind]["floor"].append(floor(folders, output, 2 if kind == "metagpt" else 1))
    shutil.rmtree(output, ignore_errors=True)
    return {"parameters": sum(info.numel for info in llama_tensors(options.layers).values()), "runs": runs}


def ratios(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The best run of each contestant against the best of the other."""
    found: dict[str, dict[str, float]] = {}
    for kind, of in runs.items():
        ours = min(item["seconds"] for item in of["fusionlab"])
        memory = max(item["peak_mb"] for item in of["fusionlab"])
        found[kind] = {
            "over_floor": round(ours / min(item["seconds"] for item in of["floor"]), 2),
            "over_synced_floor": round(ours / min(item["seconds_synced"] for item in of["floor"]), 2),
        }
        if of["mergekit"]:
            found[kind] |= {
                "times_faster": round(min(item["seconds"] for item in of["mergekit"]) / ours, 2),
                "of_its_memory": round(memory / min(item["peak_mb"] for item in of["mergekit"]), 3),
            }
    return found


def curves(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Peak memory of MetaGPT over the size of the model, and over the number of models (the same one several times)."""
    points = []
    for layers, models in ((2, 3), (8, 3), (options.layers, 3), (2, 1), (2, 6), (2, 12)):
        folders = make_checkpoints(scratch, layers, ["base", "model0", "model1", "model2"])
        tasks = {f"task{k}": f"model{k % 3}" for k in range(models)}
        measured = run_fusionlab("metagpt", folders, tasks, scratch / "fused")
        points.append({"layers": layers, "models": models} | measured)
    return points


def main() -> None:
    """Measure and print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="44 million parameters each, beside 131 million")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--rules", nargs="+", default=["task_arithmetic", "metagpt", "ties"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="path of mergekit-yaml")
    parser.add_argument("--folder", default=None, help="where to make the checkpoints; a temporary one by default")
    parser.add_argument("--curve", action="store_true", help="also the memory over model size and number of models")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(options.folder or temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        record = {"benchmark": "fuse"} | compare(options, scratch)
        record["ratios"] = ratios(record["runs"])
        if options.curve:
            record["curve"] = curves(options, scratch)
    record["targets"] = {
        "task_arithmetic": {"times_faster": 3, "of_its_memory": 1 / 6},
        "ties": {"times_faster": 8},
        "metagpt": {"over_floor": 2.0},
    }
    record["cpus"] = len(os.sched_getaffinity(0))
    record["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""Core space at the size that it is for: 128 matrices of 4096 x 4096 and eight adapters of rank 16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fusionlab.adapters import load_adapter

WIDTH, LAYERS, RANK, TASKS = 4096, 32, 16, 8
MODULES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(LAYERS) for part in "qkvo"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose weights are a hole in its file, so that it takes no room, and real adapters."""
    root = tmp_path_factory.mktemp("large")
    size = WIDTH * WIDTH * 2
    header = {
        f"{module}.weight": {
            "dtype": "BF16", "shape": [WIDTH, WIDTH], "data_offsets": [number * size, (number + 1) * size]
        }
        for number, module in enumerate(MODULES)
    }  # fmt: skip
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    (root / "base").mkdir()
    with open(root / "base" / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + len(MODULES) * size)
    (root / "base" / "config.json").write_text(json.dumps(CONFIG))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj"], "bias": "none"}
    for task in range(TASKS):
        generator = torch.Generator().manual_seed(task)
        (root / f"task{task}").mkdir()
        tensors = {}
        for module in MODULES:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.01 * torch.randn(WIDTH, RANK, generator=generator)
        save_file(tensors, root / f"task{task}" / "adapter_model.safetensors", metadata={"format": "pt"})
        (root / f"task{task}" / "adapter_config.json").write_text(json.dumps(settings))
    return root


def run(root: Path, rule: str) -> tuple[float, int]:
    """Seconds of all cores, and the peak of resident memory, of a `fuse` in a process of its own."""
    argv = [sys.executable, "-m", "fusionlab", "fuse", "--base", str(root / "base"), "--rule", rule]
    argv += ["--output", str(root / f"out-{rule}"), "--threads", "2", "--cosines", "false"]
    argv += [part for task in range(TASKS) for part in (f"--finetuned.t{task}", str(root / f"task{task}"))]
    log = root / f"{rule}.log"
    with open(log, "w") as output:
        child = subprocess.Popen(argv, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, log.read_text()
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss


@pytest.mark.slow
def test_half_a_minute_of_two_cores_and_the_memory_of_any_fused_adapter(folder: Path) -> None:
    """Dense, it would be twelve decompositions of 4096² a matrix: 14 s each."""
    seconds, memory = run(folder, "tsv_m")
    _, of_average = run(folder, "average")
    print(f"{seconds:.0f} s of all cores, {memory / 2**20:.2f} GiB; average {of_average / 2**20:.2f} GiB")
    assert memory < 1.3 * of_average
    assert seconds < 60
    fused = load_adapter(folder / "out-tsv_m")
    assert set(fused.factors) == set(MODULES)
    assert set(fused.ranks.values()) == {TASKS * RANK}
    assert all(factors.lora_b.any() and factors.lora_b.isfinite().all() for factors in fused.factors.values())

"""One recipe, one model: every rule on every kind of model and method, by the run, ``fuse``, ``sweep`` and Python.

A run of two tasks and three steps is fitted once for each backbone and method. Its fused folders are held against what
``fuse`` writes from the run's own folders, what ``sweep`` scores and what Python gives, file by file and bit by bit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_bases import write_small_bases
from torch import Tensor

import fusionlab
from fusionlab import adapters, rules
from fusionlab.__main__ import main
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.folders import save_fused
from fusionlab.fusion.fused import FusedModel
from fusionlab.layout import MASKS
from fusionlab.rules.config import from_config, known_rules, known_task_known_rules, rule_name

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BACKBONES, METHODS = ("tiny-clip", "open_clip", "vit", "tiny-t5"), ("lora", "l_lora", "full")
# what runs every time, two rules of five: each method, and the layouts that differ most in memory and on disk
COVERING = (("tiny-clip", "lora"), ("open_clip", "full"), ("tiny-t5", "l_lora"))
CELLS = [pytest.param(*cell, "some") for cell in COVERING] + [
    pytest.param(backbone, method, "all", marks=pytest.mark.slow) for backbone in BACKBONES for method in METHODS
]


def of(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


RULES: dict[str, Any] = {
    "average": "average",
    "task_arithmetic": of("task_arithmetic", scaling_coefficient=0.3),
    "by_tensor": of("task_arithmetic", scaling_coefficient=[{"filter": "v", "value": [0.1, 0.7]}, {"value": 0.3}]),
    "passthrough": "passthrough",
    "by_name": of("task_arithmetic", scaling_coefficient=0.3, by_name={"*.0.*": 0.7}),
    "metagpt": "metagpt",
    "metagpt_layer": of("metagpt", scope="layer"),
    "metagpt_tensor": of("metagpt", scope="tensor"),
    "lines": of("lines", beta=0.4),
    "ties": of("ties", density=0.3),
    "disjoint_mean": of("disjoint_mean", scaling_coefficient=0.8),
    "trim_first": of("trim", density=0.3, at_threshold="first", rule=of("task_arithmetic", scaling_coefficient=0.4)),
    "trim_metagpt": of("trim", density=0.3, rule="metagpt"),
    "breadcrumbs": of("breadcrumbs", keep=0.5, gamma=0.01),
    "dare_metagpt": of("dare", drop_rate=0.4, seed=3, rule="metagpt"),
    "dare_l1_ties": of("dare", drop_rate=0.4, rescale="l1", rule="ties"),
    "dare_tsv_m": of("dare", drop_rate=0.4, rule="tsv_m"),
    "della_metagpt": of("della", density=0.6, rule="metagpt"),
    "consensus": of("consensus", mask_threshold=0.3),
    "localize_and_stitch": of("localize_and_stitch", density=0.3),
    "model_stock": "model_stock",
    "sce": of("sce", density=0.5),
    "slerp": of("slerp", t=0.3),
    "nuslerp": "nuslerp",
    "karcher": "karcher",
    "tsv_m": "tsv_m",
    "iso_c": "iso_c",
    "iso_cts": "iso_cts",
    "knots": of("knots", density=0.5),
    "wudi": of("wudi", num_steps=2),
    "emr": "emr",
    "tall": of("tall", mask_threshold=0.4),
}


def rules_of(backbone: str, method: str, which: str) -> dict[str, Any]:
    """All rules; or two of five and the average, others in each covering cell, so that each rule is in one at least."""
    if which == "all":
        return RULES
    cell = COVERING.index((backbone, method))
    return {
        name: rule
        for place, (name, rule) in enumerate(RULES.items())
        if (place + cell) % 5 in (0, 2) or name == "average"
    }


def test_all_rules_are_in_the_matrix() -> None:
    counts = Counter(name for cell in COVERING for name in rules_of(*cell, "some"))
    assert {name for name in RULES if not counts[name]} == set()

    def names(config: Any) -> set[str]:
        rule, found = from_config(config), set()
        while rule is not None:
            found.add(rule_name(rule))
            rule = getattr(rule, "rule", None)
        return found

    assert set().union(*map(names, RULES.values())) == {*known_rules(), *known_task_known_rules()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each backbone is called: two embedded ones, and two small ones written in their libraries' formats."""
    own = {name: str(path) for name, path in write_small_bases(tmp_path_factory.mktemp("bases")).items()}
    return {name: own.get(name, name) for name in BACKBONES}


def tasks_of(backbone: str) -> list[str]:
    return ["sentiment", "entailment"] if backbone == "tiny-t5" else ["digits", "signs"]


def data_flags(backbone: str) -> list[str]:
    model = {"tiny-t5": "T5Module", "vit": "ViTModule"}.get(backbone, "ClipModule")
    data = "TextTasks" if backbone == "tiny-t5" else "ImageTasks"
    sizes = ["--data.max_samples", "16", "--data.eval_batch_size", "16", "--data.batch_size", "4"]
    return ["--model", model, "--data", data, "--data.tasks", json.dumps(tasks_of(backbone)), *sizes]


@pytest.fixture(scope="module")
def run(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """The run of a backbone and method, fitted when it is first asked for."""
    root, fitted = tmp_path_factory.mktemp("runs"), {}

    def folder(backbone: str, method: str, which: str) -> Path:
        if (backbone, method, which) not in fitted:
            path = root / f"{backbone}-{method}-{which}"
            argv = ["fit", *data_flags(backbone), "--model.backbone", bases[backbone], "--model.method", method]
            argv += ["--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"]
            argv += ["--model.learning_rate", "0.01", "--fusion.rules", json.dumps(rules_of(backbone, method, which))]
            assert main([*argv, "--trainer.default_root_dir", str(path)]) == 0
            fitted[backbone, method, which] = path
        return fitted[backbone, method, which]

    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    found = {f"{file.stem}: {name}": tensor for file in files for name, tensor in load_file(file).items()}
    if not (folder / MASKS).is_file():
        return found
    return {name: tensor for name, tensor in found.items() if tensor.any()}  # `fuse` writes what no task has trained


def differences(found: Path, expected: Path) -> list[str]:
    """What differs between the tensors of two folders, and between what their records say of the rule."""
    one, other = weights_of(found), weights_of(expected)
    if one.keys() != other.keys():
        return [f"{expected.name}: names {sorted(one.keys() ^ other.keys())[:4]}"]
    different = [name for name in other if not torch.equal(one[name], other[name])]
    return [f"{expected.name}: {len(different)} of {len(other)} tensors, such as {different[0]}"] if different else []


def as_weights(fused: Path, backbone: Any, to: Path) -> Path:
    """A fused folder as full weights, where it holds an adapter."""
    if not adapters.is_adapter(fused):
        return fused
    merging = rules.Dare(rules.TaskArithmetic(1.0), 0.0)  # θ₀ + τ, by a rule that makes no adapter
    save_fused(to, fusionlab.fuse(merging, backbone, finetuned={"fused": fused}), backbone, {})
    return to


def finetuned_of(run: Path) -> dict[str, Path]:
    parent = next(folder for folder in (run / "adapters", run / "finetuned") if folder.is_dir())
    order = json.loads((run / "fused" / "average" / "fusion.json").read_text())["row"]["fused_tasks"]
    return {task: parent / task for task in order}


@pytest.mark.parametrize(("backbone", "method", "which"), CELLS)
def test_fuse_gives_the_model_of_the_run(
    backbone: str, method: str, which: str, run: Callable[[str, str, str], Path], bases: dict[str, str], tmp_path: Path
) -> None:
    folder, found = run(backbone, method, which), []
    finetuned = {task: str(path) for task, path in finetuned_of(folder).items()}
    for name, rule in rules_of(backbone, method, which).items():
        recipe = {"base": bases[backbone], "finetuned": finetuned, "rule": rule, "output": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        assert main(["fuse", "--config", str(tmp_path / f"{name}.yaml")]) == 0
        found += differences(tmp_path / name, folder / "fused" / name)
        records = [json.loads((at / "fusion.json").read_text()) for at in (tmp_path / name, folder / "fused" / name)]
        keys = ("scaling_coefficients", "norms", "cosines", "rule")
        found += [f"{name}: {key}" for key in keys if records[0][key] != records[1][key]]
    assert found == []


@pytest.mark.parametrize(("backbone", "method", "which"), CELLS)
def test_sweep_scores_the_model_of_the_run(
    backbone: str,
    method: str,
    which: str,
    run: Callable[[str, str, str], Path],
    bases: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, made, found = run(backbone, method, which), {}, []
    original = Finetuned.make

    def make(finetuned: Finetuned, fused: Any) -> Any:
        made[repr(fused.rule)] = fused.rule, original(finetuned, fused)
        return made[repr(fused.rule)][1]

    monkeypatch.setattr(Finetuned, "make", make)
    argv = ["sweep", "--runs", json.dumps([str(folder)]), "--rules", json.dumps(rules_of(backbone, method, which))]
    assert main([*argv, "--output", str(tmp_path / "sweep")]) == 0
    loaded = fusionlab.load_backbone(bases[backbone])
    for name, config in rules_of(backbone, method, which).items():
        rule, weights = made[repr(from_config(config))]
        masks = {"scales": weights.scales, **weights.sizes, "input_bytes": 0} if name in ("emr", "tall") else {}
        save_fused(tmp_path / name, FusedModel(rule, weights, {}, {}, {}, masks=masks), loaded, {})
        found += differences(tmp_path / name, folder / "fused" / name)
    assert found == []


@pytest.mark.parametrize(("backbone", "method", "which"), CELLS)
def test_python_gives_the_model_of_the_run(
    backbone: str, method: str, which: str, run: Callable[[str, str, str], Path], bases: dict[str, str], tmp_path: Path
) -> None:
    folder, loaded, found = run(backbone, method, which), fusionlab.load_backbone(bases[backbone]), []
    finetuned = {task: fusionlab.load(path) for task, path in finetuned_of(folder).items()}
    for name, rule in rules_of(backbone, method, which).items():
        save_fused(tmp_path / name, fusionlab.fuse(rule, loaded, finetuned=finetuned), loaded, {})
        found += differences(tmp_path / name, folder / "fused" / name)
    assert found == []


@pytest.mark.parametrize(("backbone", "method", "which"), [cell for cell in CELLS if "full" not in cell.values])
def test_full_weights_are_those_of_the_adapter_to_a_rounding(
    backbone: str, method: str, which: str, run: Callable[[str, str, str], Path], bases: dict[str, str], tmp_path: Path
) -> None:
    """The factors of a fused adapter are rounded to float32, and its product with them; the weights of `fuse` once."""
    folder, loaded = run(backbone, method, which), fusionlab.load_backbone(bases[backbone])
    finetuned = {task: str(path) for task, path in finetuned_of(folder).items()}
    of_rules = [name for name in rules_of(backbone, method, which) if adapters.is_adapter(folder / "fused" / name)]
    assert {"average", "metagpt", "lines", "tsv_m", "iso_c"} & set(rules_of(backbone, method, which)) < set(of_rules)
    for name in of_rules:
        recipe = {"base": bases[backbone], "finetuned": finetuned, "rule": RULES[name], "save": "weights"}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"output": str(tmp_path / name)}))
        assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
        expected = weights_of(as_weights(folder / "fused" / name, loaded, tmp_path / f"{name} merged"))
        found = weights_of(tmp_path / name)
        assert found.keys() == expected.keys()
        for each, value in found.items():
            torch.testing.assert_close(
                value, expected[each], rtol=2**-22, atol=1e-7, msg=lambda text, at=f"{name}: {each}": f"{at}: {text}"
            )

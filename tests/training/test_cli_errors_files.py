"""Bad data, models, adapters and runs: each one message on stderr, exit code 2, nothing written; one table.

``fit`` and ``test`` are started as a user would. Files lie in ``inputs``, and the working directory is another one.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, GPT2Config, GPT2Model

from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS

TINY = ASSETS / "tiny-clip"
Build = Callable[[Path], Any]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def images(inputs: Path, **classes: int) -> None:
    """``set/train`` with that many images of each class, ``set/test`` with two of each."""
    for number, (name, size) in enumerate(classes.items()):
        for split, count in (("train", size), ("test", 2)):
            (inputs / "set" / split / name).mkdir(parents=True)
            for index in range(count):
                (inputs / "set" / split / name / f"{index}.png").write_bytes(png(1000 * number + index))


def broken_images(inputs: Path) -> None:
    images(inputs, cat=20, dog=20)
    for index in (1, 3):
        (inputs / "set" / "train" / "dog" / f"{index}.png").write_bytes(png(index)[:40])


def table(labels: list, feature: Any = None) -> Build:
    """``set/train.parquet`` and ``set/test.parquet`` of that many images."""

    def build(inputs: Path) -> None:
        (inputs / "set").mkdir()
        rows = {"image": [{"bytes": png(index), "path": None} for index in range(len(labels))], "label": labels}
        features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.Value("int64")})
        for split in ("train", "test"):
            datasets.Dataset.from_dict(rows, features=features).to_parquet(inputs / "set" / f"{split}.parquet")

    return build


def csv_of(*lines: str) -> Build:
    def build(inputs: Path) -> None:
        (inputs / "0.png").write_bytes(png(0))
        (inputs / "set.csv").write_text("\n".join(lines) + "\n")

    return build


def folder(name: str, content: dict[str, str]) -> Build:
    def build(inputs: Path) -> None:
        (inputs / name).mkdir()
        for file, text in content.items():
            (inputs / name / file).write_text(text)

    return build


def tiny_clip(change: Callable[[Path], Any]) -> Build:
    """``model``, the embedded model with a change."""

    def build(inputs: Path) -> None:
        shutil.copytree(TINY, inputs / "model")
        change(inputs / "model")

    return build


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def without_a_layer(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    save_file({name: value for name, value in state.items() if ".layers.0." not in name}, model / "model.safetensors")


def narrowed(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["visual_projection.weight"] = state["visual_projection.weight"][:5].clone()
    save_file(state, model / "model.safetensors")


def gpt2(inputs: Path) -> None:
    GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)).save_pretrained(inputs / "model")


def no_weights(inputs: Path) -> None:
    (inputs / "model").mkdir()
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (inputs / "model" / "open_clip_config.json").write_text(json.dumps(config))


def adapter(change: Callable[[Path], Any] | None = None, **settings: Any) -> Build:
    """``adapter`` by stock PEFT for the embedded model, with a change."""

    def build(inputs: Path) -> None:
        config = LoraConfig(r=2, target_modules=settings.pop("target_modules", ["q_proj"]), **settings)
        get_peft_model(CLIPModel.from_pretrained(TINY), config).save_pretrained(inputs / "adapter")
        if change is not None:
            change(inputs / "adapter")

    return build


def configured(**settings: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | settings))

    return change


def renamed(path: Path) -> None:
    state = load_file(path / "adapter_model.safetensors")
    save_file(
        {name.replace("encoder", "encodre"): value for name, value in state.items()},
        path / "adapter_model.safetensors",
    )


def of_another_width(path: Path) -> None:
    state = load_file(path / "adapter_model.safetensors")
    widened = {name: torch.zeros(value.shape[0], 7) if "lora_A" in name else value for name, value in state.items()}
    save_file(widened, path / "adapter_model.safetensors")


def fused_for_another_base(inputs: Path) -> None:
    adapter()(inputs)
    (inputs / "adapter" / "fusion.json").write_text(json.dumps({"base_hash": "0" * 16, "row": {}}))


def a_run(inputs: Path, *, finished: bool) -> None:
    assert main([*RUN, "--trainer.default_root_dir", str(inputs / "run")]) == 0
    if not finished:
        (inputs / "run" / "results.json").unlink()


OWN = ["fit", "--data.tasks", "[{name: own, path: INPUTS/set}]"]
NAMES = datasets.ClassLabel(names=["cat", "dog"])
RUN = ["fit", "--data.tasks", "[digits]", "--data.max_samples", "16", "--trainer.max_steps", "1"]
RUN += ["--fusion.rules", "[average]", "--trainer.enable_progress_bar", "false"]
OTHER_RUN = [*RUN, "--trainer.default_root_dir", "INPUTS/run", "--model.rank", "8"]
MODEL = ["fit", "--model.backbone", "INPUTS/model"]
ADAPTER = ["test", "--data.tasks", "[digits]", "--model.weights", "INPUTS/adapter"]


def own(more: str, path: str = "INPUTS/set") -> list[str]:
    return ["fit", "--data.tasks", f"[{{name: own, path: {path}, {more}}}]"]


CASES: dict[str, tuple[Build | None, list[str], str]] = {
    "one class": (
        lambda i: images(i, cat=9),
        OWN,
        r"task 'own' has 1 class \(cat\); telling classes apart needs at least 2",
    ),
    "an image that does not decode": (
        broken_images,
        OWN,
        r"2 of 40 images of task 'own' \(train\) do not decode: .*dog/1\.png",
    ),
    "no images at all": (lambda i: (i / "set").mkdir(), OWN, r"could not be read: .*any data files"),
    "only a test split": (
        lambda i: images(i, cat=0, dog=0) or shutil.rmtree(i / "set" / "train"),
        OWN,
        r"task 'own' has no train split, only test",
    ),
    "label -1": (
        table([0, 1, -1] * 9, NAMES),
        OWN,
        r"label -1, which stands for none, in 9 of 27 rows of train; remove them",
    ),
    "labels without names": (
        table([0, 1, 2] * 9),
        OWN,
        r"integers without names; list the classes in label order: class_names",
    ),
    "a label beyond the names": (
        table([0, 1, 2] * 9),
        own("class_names: [a, b]"),
        r"label 2 of train is out of range, the task has 2 classes \(0\.\.1\); 9 of 27 rows",
    ),
    "a missing label": (table([0, 1, None] * 9, NAMES), OWN, r"9 of 27 rows of train have no label in 'label'"),
    "labels that are fractions": (
        table([0.5, 1.0] * 9, datasets.Value("float32")),
        OWN,
        r"column 'label' holds neither class indices nor class names",
    ),
    "duplicated class names": (
        table([0, 1] * 9),
        own("class_names: [a, a]"),
        r"class_names of task 'own' repeat a; every class needs a name of its own",
    ),
    "class names that lack one": (
        table([0, 1] * 9, NAMES),
        own("class_names: [cat, dgo]"),
        r"lacks dog of the data's 2 classes; did you mean 'dgo'",
    ),
    "an alias of no class": (
        table([0, 1] * 9, NAMES),
        own("class_aliases: {cta: x}"),
        r"no class 'cta'; did you mean 'cat'",
    ),
    "a label column that is not there": (
        table([0, 1] * 9, NAMES),
        own("label_column: lable"),
        r"no column 'lable' \(label\); did you mean 'label'",
    ),
    "an image column of labels": (
        table([0, 1] * 9, NAMES),
        own("image_column: label"),
        r"column 'label' holds neither images nor paths",
    ),
    "a split that is not there": (
        table([0, 1] * 9, NAMES),
        own("test: tets"),
        r"no split 'tets' for test; did you mean 'test'",
    ),
    "a template without a place": (
        table([0, 1] * 9, NAMES),
        own("templates: [a photo]"),
        r"template 'a photo' of task 'own' must hold \{\} once",
    ),
    "a table of files that are gone": (
        csv_of("image,label", "0.png,cat", "1.png,dog", "2.png,dog"),
        own("class_names: [cat, dog]", "INPUTS/set.csv"),
        r"2 of 3 images of task 'own' \(train\) do not decode: .*1\.png \(FileNotFoundError",
    ),
    "a table without columns that fit": (
        csv_of("a,b", "1,2", "3,4"),
        own("class_names: [cat, dog]", "INPUTS/set.csv"),
        r"none of its columns \(a, b\) looks like the label",
    ),
    "a file that is no table": (
        lambda i: (i / "set").write_bytes(png(1)),
        OWN,
        r"set of task 'own' is no table; expected \.parquet, \.csv",
    ),
    "a hub set without network": (
        None,
        own("train: train", "some/set"),
        r"hub set 'some/set' could not be read: .* Give a local copy",
    ),
    "one name twice": (None, ["fit", "--data.tasks", "[digits, digits]"], r"task name 'digits' is used twice"),
    "no task": (None, ["fit", "--data.tasks", "[]"], r"tasks is empty; give at least one name"),
    "no such way with bad images": (
        None,
        ["fit", "--data.on_bad_image", "skp"],
        r"on_bad_image: no such choice 'skp'; did you mean 'skip'",
    ),
    "empty batches": (None, ["fit", "--data.batch_size", "0"], r"batch_size must be at least 1, got 0"),
    "no samples": (None, ["fit", "--data.max_samples", "0"], r"max_samples must be at least 1, got 0"),
    "a folder without config.json": (
        folder("model", {"x.txt": ""}),
        MODEL,
        r"model' has no config\.json; give a folder saved by save_pretrained",
    ),
    "a config.json of nothing": (
        folder("model", {"config.json": "{"}),
        MODEL,
        r"model/config\.json' is not valid JSON",
    ),
    "another kind of model": (gpt2, MODEL, r"is of type 'gpt2'; expected 'clip'"),
    "a model cut short": (
        tiny_clip(lambda m: cut(m / "model.safetensors")),
        MODEL,
        r"could not be loaded: .*invalid header length",
    ),
    "a model without a layer": (
        tiny_clip(without_a_layer),
        MODEL,
        r"lacks weights, .*: text_model\.encoder\.layers\.0\.[\w.]+, .*; give a complete one",
    ),
    "a model of other shapes": (
        tiny_clip(narrowed),
        MODEL,
        r"other shapes than its config\.json says: visual_projection\.weight; give a complete one",
    ),
    "a model without weights": (
        tiny_clip(lambda m: (m / "model.safetensors").unlink()),
        MODEL,
        r"could not be loaded: .*no file named model\.safetensors",
    ),
    "a model without tokenizer": (
        tiny_clip(lambda m: [p.unlink() for p in m.glob("tokenizer*")]),
        MODEL,
        r"has no tokenizer files; put its tokenizer\.json beside config\.json",
    ),
    "a hub model without network": (
        None,
        ["fit", "--model.backbone", "some/model"],
        r"'some/model' does not exist here, and cannot be had from the hub: it is not in the local cache, and HF_HUB",
    ),
    "open_clip's architecture": (
        None,
        ["fit", "--model.backbone", "ViT-B-23:openai"],
        r"unknown open_clip architecture 'ViT-B-23' .* did you mean 'ViT-B-32'",
    ),
    "open_clip's tag": (
        None,
        ["fit", "--model.backbone", "ViT-B-32:openia"],
        r"'openia' is neither a pretrained tag of ViT-B-32 nor a file; did you mean 'openai'",
    ),
    "open_clip's folder": (
        None,
        ["fit", "--model.backbone", "local-dir:INPUTS/none"],
        r"no open_clip_config\.json in .*; give a folder in open_clip's format",
    ),
    "open_clip without weights": (no_weights, MODEL, r"could not be loaded: Required pretrained weights"),
    "no adapter in the folder": (
        folder("adapter", {"x.txt": ""}),
        ADAPTER,
        r"holds neither adapter_config\.json nor config\.json",
    ),
    "DoRA": (adapter(use_dora=True), ADAPTER, r"use_dora=True: DoRA rescales"),
    "biases": (adapter(bias="all"), ADAPTER, r"bias='all': biases are trained too"),
    "modules to save": (
        adapter(modules_to_save=["visual_projection"]),
        ADAPTER,
        r"modules_to_save=\['visual_projection'\]: whole modules are trained",
    ),
    "another PEFT type": (adapter(configured(peft_type="LOHA")), ADAPTER, r"is of PEFT type 'LOHA'; expected LORA"),
    "a setting of tomorrow": (
        adapter(configured(use_newlora=True)),
        ADAPTER,
        r"use_newlora=True: this setting is not known here",
    ),
    "another rank than it says": (
        adapter(configured(r=4)),
        ADAPTER,
        r"the configuration says rank 4, the factors have \(2, 96\) and \(96, 2\)",
    ),
    "an adapter's configuration cut short": (
        adapter(lambda a: (a / "adapter_config.json").write_text("{")),
        ADAPTER,
        r"adapter_config\.json' is not valid JSON",
    ),
    "an adapter cut short": (
        adapter(lambda a: cut(a / "adapter_model.safetensors")),
        ADAPTER,
        r"adapter_model\.safetensors' cannot be read as safetensors",
    ),
    "an adapter without weights": (
        adapter(lambda a: (a / "adapter_model.safetensors").unlink()),
        ADAPTER,
        r"has neither adapter_model\.safetensors",
    ),
    "an adapter for other names": (
        adapter(renamed),
        ADAPTER,
        r"modules that the model does not have: .*did you mean 'text_model\.encoder\.",
    ),
    "an adapter for another width": (
        adapter(of_another_width),
        ADAPTER,
        r"the adapter does not fit the model: .* \(96, 7\), the model has \(96, 96\)",
    ),
    "a fused model of another base": (fused_for_another_base, ADAPTER, r"was made for another base"),
    "a finished run with other settings": (
        lambda i: a_run(i, finished=True),
        OTHER_RUN,
        r"is finished with another configuration \(model\.init_args\.rank \(16 before, 8 now\)\)",
    ),
    "an unfinished run with other settings": (
        lambda i: a_run(i, finished=False),
        OTHER_RUN,
        r"has another configuration: model\.init_args\.rank \(16 before, 8 now\)",
    ),
    "float16 under a linearization": (
        None,
        ["fit", "--model.method", "tangent_lora", "--trainer.precision", "16-true"],
        r"float16 overflows and underflows; use bfloat16 or float32",
    ),
    "dropout of one": (None, ["fit", "--model.dropout", "1.0"], r"dropout must lie in 0\.\.1, got 1\.0"),
    "a rate of zero": (None, ["fit", "--model.learning_rate", "0"], r"learning_rate must be positive, got 0\.0"),
    "dropout without adapters": (
        None,
        ["fit", "--model.method", "full", "--model.dropout", "0.1"],
        r"dropout 0\.1 is for adapters; method 'full' trains all weights",
    ),
    "diagnostics of one task": (
        None,
        ["fit", "--data.tasks", "[digits]", "--fusion.diagnostics.grid_size", "3"],
        r"need two tasks or more, got digits",
    ),
    "an even grid": (
        None,
        ["fit", "--fusion.diagnostics.grid_size", "4"],
        r"grid_size must be 0, or odd and at least 3, got 4",
    ),
    "a plane of another task": (
        None,
        ["fit", "--data.tasks", "[digits, signs]", "--fusion.diagnostics.tasks", "[digits, sings]"],
        r"diagnostics\.tasks: 'sings' is no task of this run \(digits, signs\)",
    ),
    "fusing split weights": (
        None,
        ["fit", "--trainer.strategy", "fsdp"],
        r"trainer\.strategy 'fsdp' only trains, .*: give --train_only and leave trainer\.limit_val_batches at 0",
    ),
    "splitting a linearized network": (
        None,
        ["fit", "--trainer.strategy", "fsdp", "--train_only", "--trainer.max_steps", "1", "--model.method", "tangent"],
        r"trainer\.strategy 'fsdp' cannot work with method 'tangent', .*; use ddp, or method lora, l_lora or full",
    ),
    "scoring split weights": (
        None,
        [
            "fit",
            "--trainer.strategy",
            "fsdp",
            "--train_only",
            "--trainer.max_steps",
            "1",
            "--trainer.limit_val_batches",
            "1",
        ],
        r"trainer\.strategy 'fsdp' only trains",
    ),
    "testing under a strategy for training": (
        None,
        ["test", "--trainer.strategy", "fsdp"],
        r"trainer\.strategy 'fsdp' only trains",
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build, argv, message = CASES[case]
    inputs, here = tmp_path / "inputs", tmp_path / "here"
    inputs.mkdir()
    here.mkdir()
    if build is not None:
        build(inputs)
    monkeypatch.chdir(here)
    monkeypatch.setenv("FUSIONLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(str(path) for path in inputs.rglob("*"))
    capfd.readouterr()
    code = main([argument.replace("INPUTS", str(inputs)) for argument in argv])
    stderr = capfd.readouterr().err
    assert code == 2
    assert len(re.findall("^fusionlab: ", stderr, re.MULTILINE)) == 1, stderr
    assert stderr.startswith("fusionlab: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert re.search(message, stderr), stderr
    assert list(here.iterdir()) == []
    assert sorted(str(path) for path in inputs.rglob("*")) == before

"""What is kept is taken only where all that decides it is the same: decoded images, tokens, prepared tables, heads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fusionlab.backbones.images import ImageBackbone
from fusionlab.backbones.preprocessing import Preprocessing
from fusionlab.backbones.tokenizers import tokenizer_fingerprint
from fusionlab.data import ChatTasks, ImageTasks
from fusionlab.data.chat.encoding import Encoder
from fusionlab.data.text import TextTasks
from fusionlab.errors import InputError
from fusionlab.modules import ClipModule, ViTModule

SPLITS = ("train", "validation", "test")


@contextmanager
def same_times(file: Path) -> Iterator[None]:
    """What happens to the file leaves its modification time as it was, as unpacking, rsync -t and cp -p do."""
    before = file.stat()
    yield
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """A list that grows by every call of a method."""
    calls: list[None] = []
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


# decoded images


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 20, 3), np.uint8))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of two classes in a folder, and a table in another that names images elsewhere."""
    for number in range(48):
        file = tmp_path / "set" / ("test" if number % 4 == 0 else "train") / "ab"[number % 2] / f"{number}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    files = sorted(str(file) for file in (tmp_path / "set").rglob("*.bmp"))
    labels = {"label": [Path(file).parent.name for file in files], "other": ["xy"[i % 2] for i in range(len(files))]}
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict({"image": files, **labels}).to_csv(tmp_path / "table" / "all.csv")
    return tmp_path


def loaded_images(root: Path, cache: str, how: Preprocessing | None = None, **options: Any) -> dict[str, Any]:
    how = how or Preprocessing(8)
    of_task = {"path": str(root / "set"), **options.pop("task", {})}
    data = ImageTasks([{"name": "own", **of_task}], cache_dir=str(root / cache), **options)
    backbone = ImageBackbone()
    backbone.preprocess_by(how)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(backbone=backbone), global_rank=0, world_size=1)
    data.setup()
    found: dict[str, Any] = {"classes": data.tasks["own"].class_names}
    for split in SPLITS:
        batch = data.splits["own"][split].batch(torch.arange(len(data.splits["own"][split])))
        found[split] = (batch["images"].tolist(), batch["labels"].tolist())
    return found


def exchanged(root: Path) -> None:
    """An image for another of equal size and modification time."""
    file = sorted((root / "set" / "test").rglob("*.bmp"))[0]
    with same_times(file):
        picture(999).save(file)


IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Path], None]]] = {
    # what is loaded first, what is changed of it, what happens to the files
    "an image exchanged": ({}, {}, exchanged),
    "an image elsewhere exchanged": ({"task": {"path": "table/all.csv"}}, {}, exchanged),
    "filter": ({}, {"how": Preprocessing(8, resample=2)}, lambda root: None),
    "squash": ({}, {"how": Preprocessing(8, resize="squash", crop=False)}, lambda root: None),
    "size": ({}, {"how": Preprocessing(10)}, lambda root: None),
    "slice": ({}, {"task": {"train": "train[:20]"}}, lambda root: None),
    "splits": ({}, {"task": {"train": "test", "test": "train"}}, lambda root: None),
    "order of classes": ({}, {"task": {"class_names": ["b", "a"]}}, lambda root: None),
    "label column": (
        {"task": {"path": "table/all.csv"}}, {"task": {"path": "table/all.csv", "label_column": "other"}},
        lambda root: None,
    ),
}  # fmt: skip


def of_images(root: Path, changes: dict[str, Any]) -> dict[str, Any]:
    task = dict(changes.get("task", {}))
    if "path" in task:
        task["path"] = str(root / task["path"])
    return {**changes, "task": task}


@pytest.mark.parametrize("case", IMAGES)
def test_decoded_images_follow_what_decides_them(case: str, images: Path) -> None:
    first, changed, happens = IMAGES[case]
    before = loaded_images(images, "kept", **of_images(images, first))
    happens(images)
    options = of_images(images, {**first, **changed})
    found = loaded_images(images, "kept", **options)
    assert found == loaded_images(images, "fresh", **options)
    assert found != before


NOT_OF_IMAGES: dict[str, dict[str, Any]] = {
    "batch sizes": {"batch_size": 3, "eval_batch_size": 5},
    "number of samples": {"max_samples": 5},
    "seed": {"seed": 3},
    "prompts": {"task": {"templates": ["a drawing of a {}."]}},
    "bad images": {"on_bad_image": "skip"},
    "values of pixels": {"how": Preprocessing(8, mean=(0.1, 0.2, 0.3), divisor=127.5)},
}


@pytest.mark.parametrize("case", NOT_OF_IMAGES)
def test_decoded_images_stay_where_nothing_decides_them(
    case: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = loaded_images(images, "kept")
    monkeypatch.setattr("fusionlab.data.stored.StoredImages._decode", pytest.fail)
    found = loaded_images(images, "kept", **NOT_OF_IMAGES[case])
    assert found["classes"] == before["classes"]
    assert case == "number of samples" or found == before


# tables and tokens


def write_rows(folder: Path, word: str) -> None:
    """Tables whose files have equal sizes for words of equal lengths."""
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 40), ("validation", 8), ("test", 12)):
        rows = [
            {"text": f"a {word} film {i % 7}", "more": f"not {i % 5}", "label": i % 2, "prompt": f"say {word} {i}:",
             "completion": f" {word}"}
            for i in range(count)
        ]  # fmt: skip
        file = folder / f"{name}.parquet"
        if file.exists():
            with same_times(file):
                datasets.Dataset.from_list(rows).to_parquet(file)
        else:
            datasets.Dataset.from_list(rows).to_parquet(file)


RANKED = {"input_columns": ["text"], "label_words": ["bad", "good"]}


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    """Bytes, an end token and a chat template that writes the date."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    ends = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, **ends)


def loaded_texts(root: Path, cache: str, tokenizer: Any, kind: str, **options: Any) -> dict[str, Any]:
    of_task = {"path": str(root / "texts"), **({} if kind == "completions" else RANKED), **options.pop("task", {})}
    tasks: list[Any] = [{"name": "own", **of_task}]
    if kind == "t5":
        data: Any = TextTasks(tasks, cache_dir=str(root / cache), **options)
        module = SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer))
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    else:
        options = {"date": "2026-01-31", **options}
        data = ChatTasks(tasks, tokenizer=tokenizer, cache_dir=str(root / cache), **options)
    data.setup()
    return {split: read(data.splits["own"][split]) for split in ("validation", "test")}


def read(samples: Any) -> Any:
    batch = samples.batch(torch.arange(len(samples)))
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def nothing(root: Path) -> None: ...


def other_rows(root: Path) -> None:
    """Other texts in files of equal sizes and modification times."""
    files = sorted((root / "texts").glob("*.parquet"))
    before = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    write_rows(root / "texts", "grand")
    assert [(file.stat().st_size, file.stat().st_mtime_ns) for file in files] == before


TEXTS: dict[str, tuple[str, dict[str, Any], Callable[[Path], None]]] = {
    "t5, other rows": ("t5", {}, other_rows),
    "t5, max_tokens": ("t5", {"max_tokens": 5}, nothing),
    "t5, label words": ("t5", {"task": {"label_words": ["no", "yes"]}}, nothing),
    "t5, template": ("t5", {"task": {"template": "is it good: {text}"}}, nothing),
    "t5, input columns": ("t5", {"task": {"input_columns": ["more"]}}, nothing),
    "ranked, other rows": ("ranked", {}, other_rows),
    "ranked, label words": ("ranked", {"task": {"label_words": ["no", "yes"]}}, nothing),
    "ranked, input columns": ("ranked", {"task": {"input_columns": ["more"]}}, nothing),
    "ranked, system": ("ranked", {"system": "be brief"}, nothing),
    "ranked, date": ("ranked", {"date": "2025-01-31"}, nothing),
    "ranked, no template": ("ranked", {"chat_template_path": "none"}, nothing),
    "completions, other rows": ("completions", {}, other_rows),
    "completions, max_length": ("completions", {"max_length": 15}, nothing),
    "completions, prompts learnt": ("completions", {"completion_only_loss": False}, nothing),
    "completions, template": ("completions", {"apply_chat_template": True}, nothing),
}


@pytest.mark.parametrize("case", TEXTS)
def test_tokens_follow_what_decides_them(
    case: str, t5_folder: Callable[[str], Path], chat_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    kind, changes, happens = TEXTS[case]

    def load(cache: str, **options: Any) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(t5_folder("tied")) if kind == "t5" else clone(chat_tokenizer)
        return loaded_texts(tmp_path, cache, tokenizer, kind, **options)

    write_rows(tmp_path / "texts", "great")
    before = load("kept")
    happens(tmp_path)
    found = load("kept", **changes)
    assert found == load("fresh", **changes)
    assert found != before


def clone(tokenizer: Any) -> Any:
    """Another tokenizer of the same rules; options change the template of the one that they are given."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    ends = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made = PreTrainedTokenizerFast(tokenizer_object=rules, **ends)
    made.chat_template = tokenizer.chat_template
    return made


NOT_OF_TEXTS: dict[str, dict[str, Any]] = {
    "batch sizes": {"batch_size": 3, "eval_batch_size": 5},
    "seed": {"seed": 3},
    "empty rows": {"on_empty": "skip"},
    "packing": {"packing": True},
    "where the files lie": {"task": {"path": "moved"}},
}


@pytest.mark.parametrize("case", NOT_OF_TEXTS)
@pytest.mark.parametrize("kind", ["ranked", "completions"])
def test_encoded_tables_stay_where_nothing_decides_them(
    case: str, kind: str, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "texts", "great")
    shutil.copytree(tmp_path / "texts", tmp_path / "moved")
    before = loaded_texts(tmp_path, "kept", clone(chat_tokenizer), kind)
    calls = counted(monkeypatch, Encoder, "encode")
    changes = json.loads(json.dumps(NOT_OF_TEXTS[case]).replace('"moved"', json.dumps(str(tmp_path / "moved"))))
    assert loaded_texts(tmp_path, "kept", clone(chat_tokenizer), kind, **changes) == before
    assert len(calls) == (len(RANKED["label_words"]) if kind == "ranked" else 0)  # the words alone, no row


def test_what_tells_a_tokenizer_from_another(chat_tokenizer: Any) -> None:
    from tokenizers import AddedToken, normalizers

    def changed(change: Callable[[Any], object]) -> str:
        made = clone(chat_tokenizer)
        change(made)
        return tokenizer_fingerprint(made)

    def lower(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    same = [changed(lambda made: None), changed(lambda made: setattr(made, "name_or_path", "elsewhere"))]
    others = [
        changed(lower),
        changed(lambda made: made.add_tokens(["film"])),
        changed(lambda made: made.add_tokens([AddedToken("film", lstrip=True)])),
        changed(lambda made: setattr(made, "pad_token", "!")),
        changed(lambda made: setattr(made, "clean_up_tokenization_spaces", True)),
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 1 + len(others)


# heads


class Named:
    """A task as a head needs it."""

    def __init__(self, *class_names: str, templates: tuple[str, ...] = ("a photo of a {}.",)) -> None:
        self.class_names, self.templates = class_names, templates


def moved_text_tower(module: ClipModule) -> None:
    with torch.no_grad():
        module.base_model.text_model.final_layer_norm.weight.mul_(torch.linspace(0.5, 2, 1)).add_(
            torch.randn(module.base_model.text_model.final_layer_norm.weight.shape)
        )


def moved_projection(module: ClipModule) -> None:
    weight = module.base_model.text_projection.weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def loaded_text_tower(module: ClipModule) -> None:
    state = {name: value.clone() for name, value in module.base_model.state_dict().items()}
    state["text_projection.weight"] = state["text_projection.weight"].flip(0)
    module.base_model.load_state_dict(state)


def moved_image_tower(module: ClipModule) -> None:
    with torch.no_grad():
        module.base_model.vision_model.post_layernorm.weight.mul_(2)


HEADS: dict[str, tuple[Named, Callable[[ClipModule], None] | None]] = {
    "other names": (Named("lion", "dog"), None),
    "order of classes": (Named("dog", "cat"), None),
    "more classes": (Named("cat", "dog", "cow"), None),
    "other prompts": (Named("cat", "dog", templates=("a sketch of a {}.",)), None),
    "more prompts": (Named("cat", "dog", templates=("a photo of a {}.", "a sketch of a {}.")), None),
    "text tower": (Named("cat", "dog"), moved_text_tower),
    "text projection": (Named("cat", "dog"), moved_projection),
    "loaded weights": (Named("cat", "dog"), loaded_text_tower),
}


@pytest.mark.parametrize("case", HEADS)
def test_zero_shot_heads_follow_what_decides_them(case: str) -> None:
    task, change = HEADS[case]
    module = ClipModule()
    module.prepare_tasks({"own": Named("cat", "dog")})
    before = module.heads["own"].clone()
    if change is not None:
        change(module)
    module.prepare_tasks({"own": task})
    assert not torch.equal(before, module.heads["own"])
    assert torch.equal(module.heads["own"], module.backbone.zero_shot_head(task.class_names, task.templates))


NOT_OF_HEADS: dict[str, Callable[[ClipModule], object]] = {
    "nothing": lambda module: None,
    "image tower": moved_image_tower,
    "adapters": lambda module: module.add_adapters(["own"]),
    "another task": lambda module: module.prepare_tasks({"more": Named("car", "bus")}),
    "mode": lambda module: module.train(),
}


@pytest.mark.parametrize("case", NOT_OF_HEADS)
def test_zero_shot_heads_stay_where_nothing_decides_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ClipModule()
    module.prepare_tasks({"own": Named("cat", "dog")})
    NOT_OF_HEADS[case](module)
    monkeypatch.setattr(type(module.backbone), "zero_shot_head", pytest.fail)
    module.prepare_tasks({"own": Named("cat", "dog")})


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("vit")
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


def prepared(module: ViTModule, task: str = "digits", rename: dict[str, str] | None = None, **options: Any) -> Any:
    """The head of ``own``, which is one of the embedded tasks."""
    definition = {"name": task, **({"class_aliases": rename} if rename else {})}
    data = ImageTasks([definition], image_size=32, **options)
    data.setup()
    named = SimpleNamespace(tasks={"own": data.tasks[task]}, splits={"own": data.splits[task]})
    module._trainer = SimpleNamespace(
        datamodule=named, precision_plugin=SimpleNamespace(val_step_context=torch.no_grad, precision="32-true")
    )
    module.prepare_tasks(named.tasks)
    return module.head("own").weight.detach().clone()


OF_MEANS: dict[str, dict[str, Any]] = {
    "another data set": {"task": "shapes"},
    "fewer samples": {"max_samples": 40},
    "other samples": {"max_samples": 60},
    "names of classes": {"rename": {"seven": "the seventh"}},
}


@pytest.mark.parametrize("case", OF_MEANS)
def test_heads_of_class_means_follow_the_data(case: str, vit_folder: Path) -> None:
    used, fresh = ViTModule(str(vit_folder)), ViTModule(str(vit_folder))
    prepared(used, max_samples=50)
    assert torch.equal(prepared(used, **OF_MEANS[case]), prepared(fresh, **OF_MEANS[case]))


def test_heads_of_class_means_stay_where_nothing_decides_them(
    vit_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ViTModule(str(vit_folder))
    before = prepared(module, max_samples=50)
    monkeypatch.setattr(ViTModule, "_fill_head", pytest.fail)
    for options in ({}, {"batch_size": 3}, {"eval_batch_size": 5}, {"seed": 9}):
        assert torch.equal(prepared(module, max_samples=50, **options), before)


def test_a_trained_head_is_never_filled_and_serves_its_own_classes_only(vit_folder: Path) -> None:
    module = ViTModule(str(vit_folder))
    prepared(module, max_samples=50)
    module.add_head("own", 10)
    module._filled.clear()  # as one that was read from a run
    with torch.no_grad():
        module.head("own").weight.fill_(0.5)
    assert bool((prepared(module, max_samples=40) == 0.5).all())
    with pytest.raises(InputError, match="the head of task 'own' is for the classes"):
        prepared(module, "shapes")

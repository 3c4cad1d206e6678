"""What decides a score is in its key, and what does not is in none: of T5, CLIP, ViT and language models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fusionlab import keys
from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS
from fusionlab.commands.sweep.identity import Point, RunIdentity
from fusionlab.commands.sweep.sources import RunSource, Workbench
from fusionlab.data import ChatTasks, ImageTasks
from fusionlab.data.tasks import Task
from fusionlab.data.text import TextTasks
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.keys import scoring_key
from fusionlab.modules import CausalModule, ClipModule, T5Module, ViTModule
from fusionlab.modules.base import FusionModule
from fusionlab.rules import Average
from fusionlab.search import Adamerging

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
AT_3A16601 = Path(__file__).parents[1] / "fixtures" / "at_3a16601"
WORDS = ["negative", "positive"]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A kind of model on a task of local files.

    Args:
        module: class of the module.
        data: class of the data module.
        backbone: folder of a copy of the base.
        task: definition of the task.
        options: of the module and the data module, by its own name.
    """

    module: Any
    data: Any
    backbone: Path
    task: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def key(self, *, precision: str = "32-true", backbone: Path | None = None, **changes: Any) -> str:
        """The scoring key on the test split; changes are of the task, the module or the data module, by name."""
        return scoring_key(*self.prepared(precision=precision, backbone=backbone, **changes), "own", "test")

    def prepared(self, *, precision: str = "32-true", backbone: Path | None = None, **changes: Any) -> tuple[Any, Any]:
        """Module and data, set up."""
        of_task = {name: changes.pop(name) for name in list(changes) if name in Task.__annotations__}
        known = {*self.module.__init__.__annotations__, *FusionModule.__init__.__annotations__} - {"arguments"}
        of_module = {name: changes.pop(name) for name in list(changes) if name in known}
        given = dict(self.options)
        for name in list(given):
            if name in known:
                of_module.setdefault(name, given.pop(name))
        module = self.module(backbone=str(backbone or self.backbone), **of_module)
        data = self.data([{**self.task, **of_task}], **{**given, **changes})
        plugin = SimpleNamespace(precision=precision, val_step_context=nullcontext)
        trainer = SimpleNamespace(lightning_module=module, datamodule=data, precision_plugin=plugin)
        module._trainer = trainer
        data.trainer = trainer
        data.setup()
        module.prepare_tasks(data.tasks)
        return module, data


def copy_of(source: Path, target: Path, file: str = "", **changes: Any) -> Path:
    """A base elsewhere, with some values of one of its files changed."""
    shutil.copytree(source, target)
    if file:
        content = json.loads((target / file).read_text())
        (target / file).write_text(json.dumps(content | changes))
    return target


def language_model(folder: Path) -> Path:
    """A random Llama that reads bytes, and its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    end = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=built, chat_template=CHAT, **end).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(pieces), **sizes, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, t5_folder: Callable[[str], Path]) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("keys")
    rows = [
        {"text": f"a good sentence {i} " + "x " * (i % 9), "more": f"not {i % 5}", "label": i % 2, "score": i / 7}
        for i in range(60)
    ]
    for name in ("train", "test"):
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = np.random.default_rng(0)
    for number in range(40):
        file = root / "images" / ("test" if number % 2 else "train") / "ab"[number // 2 % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 56, 3), np.uint8)).save(file)
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(root / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    texts = {"name": "own", "path": str(root / "texts"), "input_columns": ["text"], "label_words": WORDS}
    images = {"name": "own", "path": str(root / "images")}
    cache = {"cache_dir": str(root / "cache")}
    clip = copy_of(ASSETS / "tiny-clip", root / "clip")
    return {
        "t5": Kind(T5Module, TextTasks, t5_folder("tied"), texts, cache),
        "clip": Kind(ClipModule, ImageTasks, clip, images, cache),
        "vit": Kind(ViTModule, ImageTasks, root / "vit", images, cache),
        "chat": Kind(CausalModule, ChatTasks, language_model(root / "chat"), texts, cache),
    }


GENERATED = {"evaluation": "generate"}
TEXT = {"label_words": None, "input_columns": None}
SCORE = {"label_words": None, "target_column": "score"}
# by kind: what a case changes, and what it is compared with
DECIDES: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "t5": {
        "max_samples": ({"max_samples": 12}, {}),
        "max_tokens that cut": ({"max_tokens": 6}, {}),
        "label words": ({"label_words": ["bad", "good"]}, {}),
        "order of label words": ({"label_words": WORDS[::-1]}, {}),
        "template": ({"template": "is it good: {text}"}, {}),
        "input columns": ({"input_columns": ["more"]}, {}),
        "generated": (GENERATED, {}),
        "length of what is generated": ({**GENERATED, "max_new_tokens": 12}, {**GENERATED, "max_new_tokens": 10}),
        "metric of a score": ({**SCORE, "metric": "pearson"}, SCORE),
        "precision": ({"precision": "bf16-mixed"}, {}),
        "dtype": ({"dtype": "bfloat16"}, {}),
    },
    "clip": {
        "max_samples": ({"max_samples": 8}, {}),
        "names in prompts": ({"class_aliases": {"a": "apple"}}, {}),
        "order of classes": ({"class_names": ["b", "a"]}, {}),
        "templates": ({"templates": ["a sketch of a {}."]}, {}),
        "more templates": ({"templates": ["a photo of a {}.", "a sketch of a {}."]}, {}),
        "precision": ({"precision": "bf16-mixed"}, {}),
    },
    "vit": {
        "max_samples": ({"max_samples": 8}, {}),
        "order of classes": ({"class_names": ["b", "a"]}, {}),
        "another test split": ({"train": "test", "test": "train"}, {}),
        "a slice": ({"test": "test[:10]"}, {}),
        "precision": ({"precision": "bf16-mixed"}, {}),
    },
    "chat": {
        "max_samples": ({"max_samples": 12}, {}),
        "max_length that cuts": ({**TEXT, "max_length": 20}, TEXT),
        "label words": ({"label_words": ["bad", "good"]}, {}),
        "template": ({"template": "is it good: {text}"}, {}),
        "input columns": ({"input_columns": ["more"]}, {}),
        "system message": ({"system": "be brief"}, {}),
        "no chat template": ({"chat_template_path": "none"}, {}),
        "ranking": ({"ranking": "per_token"}, {}),
        "ranking by bytes": ({"ranking": "per_byte"}, {"ranking": "per_token"}),
        "generated": (GENERATED, {}),
        "length of what is generated": ({**GENERATED, "max_new_tokens": 9}, GENERATED),
        "precision": ({"precision": "bf16-mixed"}, {}),
        "dtype": ({"dtype": "bfloat16"}, {}),
    },
}
IRRELEVANT: dict[str, dict[str, dict[str, Any]]] = {
    kind: {
        "batch sizes": {"batch_size": 2, "eval_batch_size": 5},
        "seed": {"seed": 7},
        "how it was trained": {"rank": 2, "learning_rate": 0.5, "dropout": 0.3},
        **more,
    }
    for kind, more in {
        "t5": {"length of what is not generated": {"max_new_tokens": 9}, "cuts nothing": {"max_tokens": 500}},
        "clip": {"bad images": {"on_bad_image": "skip"}, "its own size": {"image_size": 32}},
        "vit": {"bad images": {"on_bad_image": "skip"}, "its own size": {"image_size": 32}},
        "chat": {"length of what is not generated": {"max_new_tokens": 9}, "packing": {"packing": True},
                 "checkpointing": {"gradient_checkpointing": True}},
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in DECIDES.items() for case in cases])
def test_what_decides_a_score_is_in_its_key(kinds: dict[str, Kind], kind: str, case: str) -> None:
    changed, before = DECIDES[kind][case]
    assert kinds[kind].key(**changed) != kinds[kind].key(**before)


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in IRRELEVANT.items() for case in cases])
def test_what_decides_nothing_is_in_no_key(kinds: dict[str, Kind], kind: str, case: str) -> None:
    assert kinds[kind].key(**IRRELEVANT[kind][case]) == kinds[kind].key()


SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip, mean": ("clip", "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
    "clip, factor": ("clip", "preprocessor_config.json", {"rescale_factor": 1 / 127.5}),
    "clip, filter": ("clip", "preprocessor_config.json", {"resample": 2}),
    "clip, cropped": (
        "clip", "preprocessor_config.json", {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 32}
    ),
    "vit, spread": ("vit", "preprocessor_config.json", {"image_std": [0.25, 0.25, 0.25]}),
    "vit, norm": ("vit", "config.json", {"layer_norm_eps": 1e-3}),
    "t5, norm": ("t5", "config.json", {"layer_norm_epsilon": 1e-3}),
    "t5, distances": ("t5", "config.json", {"relative_attention_max_distance": 16}),
    "chat, angles": ("chat", "config.json", {"rms_norm_eps": 1e-3}),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_the_model_are_in_the_key(kinds: dict[str, Kind], case: str, tmp_path: Path) -> None:
    kind, file, changes = SETTINGS[case]
    base = kinds[kind].backbone
    names = [name for name in (file, "processor_config.json") if (base / name).is_file()]
    moved = copy_of(base, tmp_path / "moved")
    assert kinds[kind].key(backbone=moved) == kinds[kind].key()  # where it lies decides nothing
    content = json.loads((moved / names[0]).read_text())
    inner = content["image_processor"] if names[0] == "processor_config.json" else content
    inner.update(changes)
    (moved / names[0]).write_text(json.dumps(content))
    assert kinds[kind].key(backbone=moved) != kinds[kind].key()


@pytest.mark.parametrize("kind", DECIDES)
def test_another_version_of_the_formulas(kinds: dict[str, Kind], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = kinds[kind].key(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert kinds[kind].key() == before
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(keys, "FORMULAS", keys.FORMULAS + 1)
    assert kinds[kind].key() != before


def test_scores_that_read_alike_but_are_others(kinds: dict[str, Kind], tmp_path: Path) -> None:
    """An answer has one digit behind the point, the correlation is with the score itself."""
    found = []
    for score in (3.12, 3.14):
        folder = tmp_path / str(score)
        folder.mkdir()
        rows = [{"text": f"a sentence {i}", "score": score if i == 3 else i / 7} for i in range(40)]
        for name in ("train", "test"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(kinds["t5"].key(path=str(folder), **SCORE))
    assert found[0] != found[1]


def test_what_a_search_may_see_is_in_its_key_however_tasks_are_scored(kinds: dict[str, Kind]) -> None:
    """AdaMerging looks at the likelihoods of label words where answers are generated."""
    keys_of = {}
    for ranking in ("whole", "per_token"):
        module, data = kinds["chat"].prepared(ranking=ranking, **GENERATED)
        source, finetuned = RunSource("lora", 1, ()), Finetuned({}, {"own": {}})
        identity = RunIdentity(source, finetuned, Workbench(module, data, ""), "")
        point = Point("average", Average(), ("own",), "test", ("own",))
        keys_of[ranking] = identity.of_search(Adamerging(), ["own"]), identity.of_point(point)
    assert keys_of["whole"][0] != keys_of["per_token"][0]
    assert keys_of["whole"][1] == keys_of["per_token"][1]  # answers are generated whatever would rank them


# ledgers


@dataclass(frozen=True)
class Earlier:
    """A copy of a sweep by commit 3a16601, and the recipe that it was made by."""

    output: Path
    recipe: dict[str, Any]

    def sweep(self, **changes: Any) -> int:
        """Run the recipe; changes are of the fit's ``model``, ``data`` and ``trainer``."""
        recipe = json.loads(json.dumps(self.recipe))
        for part in ("model", "data"):
            recipe["fit"][part]["init_args"] |= changes.get(part, {})
        recipe["fit"]["trainer"] |= changes.get("trainer", {})
        path = self.output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe))
        return main(["sweep", "--config", str(path)])

    def records(self) -> dict[str, dict[str, Any]]:
        """All points and searches, by key."""
        files = (self.output / "ledger" / "points").rglob("*.json")
        return {file.stem: json.loads(file.read_text()) for file in files if "formulas" in file.read_text()}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    output = tmp_path_factory.mktemp("earlier") / "sweep_t5"
    shutil.copytree(AT_3A16601 / "sweep_t5", output)
    recipe = yaml.safe_load((AT_3A16601 / "sweep_t5.yaml").read_text())
    recipe["fit"]["data"]["init_args"]["cache_dir"] = str(output.parent / "cache")
    for file in (output / "ledger" / "points").rglob("*.json"):  # what no model scores
        record = json.loads(file.read_text())
        for row in record.get("values", ()):
            row["value"] = 0.123
        file.write_text(json.dumps(record))
    return Earlier(output, recipe | {"output": str(output)})


def test_points_of_an_earlier_version_are_computed_anew(earlier: Earlier, caplog: pytest.LogCaptureFixture) -> None:
    points, adapters = ((earlier.output / of).rglob("*.*") for of in ("ledger/points", "runs/lora-seed42/adapters"))
    before = {file: file.read_bytes() for file in (*points, *adapters) if file.is_file()}
    assert earlier.sweep() == 0
    assert "7 records of the ledger in" in caplog.text
    assert {file: file.read_bytes() for file in before} == before  # nothing is lost, and nothing trained again
    assert len(earlier.records()) >= 7
    assert all(row["value"] != 0.123 for each in earlier.records().values() for row in each.get("values", ()))
    rows = json.loads((earlier.output / "results.json").read_text())["rows"]
    assert rows
    assert all(row["value"] != 0.123 and row["scored_by"] for row in rows)
    expected = json.loads((AT_3A16601 / "sweep_t5" / "results.json").read_text())["rows"]
    found, before = (
        {(row["rule"], row["task"]): row["value"] for row in of if row["rule"] != "lorahub"} for of in (rows, expected)
    )
    assert found == before  # the formulas of these rules stayed; LoraHub no longer evaluates its start twice


def test_points_scored_in_another_way_are_computed_anew(
    earlier: Earlier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert earlier.sweep() == 0
    known, seen = set(earlier.records()), []
    for number, model in enumerate(({"evaluation": "generate"}, {"evaluation": "generate", "max_new_tokens": 3})):
        assert earlier.sweep(model=model) == 0
        fresh = {key: each for key, each in earlier.records().items() if key not in known}
        metrics = {row["metric"] for each in fresh.values() for row in each.get("values", ())}
        assert metrics == {"exact_match"}, number
        content = json.loads((earlier.output / "sweep.json").read_text())
        seen.append(content["single_task"]["lora-seed42"]["values"])
        known |= set(fresh)
    singles = [json.loads(file.read_text()) for file in (earlier.output / "ledger" / "single_task").rglob("*.json")]
    assert {each["values"][0]["metric"] for each in singles} == {"accuracy", "exact_match"}
    assert len(singles) == 2 * 3
    monkeypatch.setattr("fusionlab.commands.sweep.scores.score_candidates", pytest.fail)
    assert earlier.sweep(data={"eval_batch_size": 5}) == 0
    assert set(earlier.records()) == known
    capsys.readouterr()
    assert earlier.sweep(trainer={"max_steps": 3}) == 2
    assert "was fitted with another configuration: trainer.max_steps (2 before, 3 now)" in capsys.readouterr().err


def test_denominators_of_another_way_to_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    given = {"data.tasks": "[digits]", "data.eval_batch_size": "12", "data.batch_size": "4", "data.max_samples": "12"}
    given |= {"model.rank": "1", "trainer.max_steps": "1", "trainer.enable_progress_bar": "false"}

    def fit(name: str, reference: Path | None = None, **changes: str) -> int:
        capsys.readouterr()
        flags = given | {"fusion.rules": "[average]", "trainer.default_root_dir": str(tmp_path / name)}
        flags |= {key.replace("__", "."): value for key, value in changes.items()}
        flags |= {} if reference is None else {"fusion.full_reference": str(reference)}
        return main(["fit", *(part for key, value in flags.items() for part in (f"--{key}", value))])

    assert fit("reference") == 0
    reference = tmp_path / "reference"
    assert fit("same", reference, data__eval_batch_size="5") == 0
    others = {
        "precision": {"trainer__precision": "bf16-mixed"},
        "samples": {"data__max_samples": "10"},
        "names": {"data__tasks": '[{"name": "digits", "class_aliases": {"seven": "lucky seven"}}]'},
    }
    for name, changes in others.items():
        assert fit(name, reference, **changes) == 2, name
        assert "was scored in another way: digits test (" in capsys.readouterr().err
        assert not (tmp_path / name / "config.yaml").exists()
    assert "of an earlier version" not in caplog.text
    assert fit("earlier", AT_3A16601 / "run_clip") == 0
    assert "is of an earlier version, which did not say how it scored: digits" in caplog.text

"""Files that others wrote, broken in the ways that downloads, other tools and editors break them: refused in one line.

The model and the adapters are transformers' and PEFT's own. Every refusal is exit code 2, one line that names the file,
and nothing written; what is only unknown passes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fusionlab.__main__ import main

WEIGHTS, ADAPTER, PEFT = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``full`` and the adapter ``lora``."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "full")
    state = load_file(folder / "base" / WEIGHTS)
    moved = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in state.items()}
    save_file(moved, folder / "full" / WEIGHTS, metadata={"format": "pt"})
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder / "lora")
    return folder


def flags(*finetuned: str, output: str = "out") -> list[str]:
    tasks = [part for name in finetuned for part in (f"--finetuned.{Path(name).stem}", name)]
    return ["fuse", "--base", "base", *tasks, "--output", output, "--rule", "average"]


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Exit code 2, one line that matches, and nothing new on the disk."""
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    assert re.search(message, told), told
    assert sorted(folder.rglob("*")) == before
    return told


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("readme.txt", "no tensors here")
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab29\nsize 12345\n"
NOT_WEIGHTS = {
    "a pointer": (POINTER, "Git LFS"),
    "nothing": (b"", "it is empty"),
    "one byte": (b"\x80", r"truncated or corrupt|plain weights|safetensors"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "noise": (bytes(range(7, 250)) * 3, r"truncated or corrupt|plain weights|safetensors"),
    "another archive": (archive(), r"truncated or corrupt|plain weights|safetensors"),
    "half an archive": (archive()[:40], r"truncated or corrupt|plain weights|safetensors"),
}
PLACES = {
    "base safetensors": ("base", WEIGHTS, WEIGHTS),
    "base bin": ("base", WEIGHTS, "pytorch_model.bin"),
    "full safetensors": ("full", WEIGHTS, WEIGHTS),
    "full bin": ("full", WEIGHTS, "pytorch_model.bin"),
    "full pt": ("full", WEIGHTS, "weights.pt"),
    "adapter safetensors": ("lora", ADAPTER, ADAPTER),
    "adapter bin": ("lora", ADAPTER, "adapter_model.bin"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_a_file_that_holds_no_weights(kind: str, place: str, models: Path, capsys) -> None:
    content, message = NOT_WEIGHTS[kind]
    folder, original, name = PLACES[place]
    (models / folder / original).unlink()
    (models / folder / name).write_bytes(content)
    told = refused(flags("lora" if folder == "base" else folder), message, capsys, models)
    assert name in told


class Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("code-ran",))


State = dict[str, torch.Tensor]
MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda w: w.to_sparse(),
    "sparse rows": lambda w: w.to_sparse_csr(),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "complex": lambda w: w.to(torch.complex64),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
    "unsigned": lambda w: w.abs().to(torch.uint16),
    "without values": lambda w: w.to("meta"),
}
CONTENTS: dict[str, Callable[[State], Any]] = {
    "a list": lambda state: list(state.values()),
    "one deeper": lambda state: {"state_dict": state},
    "numbered": lambda state: dict(enumerate(state.values())),
    "None": lambda state: None,
    "a number beside": lambda state: state | {"epoch": 3},
    "a module": lambda state: torch.nn.Linear(2, 2),
    "code": lambda state: {"w": Evil()},
}


def pickled(models: Path, folder: str, change: Callable[[State], Any]) -> str:
    original, name = (ADAPTER, "adapter_model.bin") if folder == "lora" else (WEIGHTS, "pytorch_model.bin")
    content = change(load_file(models / folder / original))
    (models / folder / original).unlink()
    torch.save(content, models / folder / name)
    return name


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("folder", ["base", "full", "lora"])
@pytest.mark.parametrize("kind", MATRICES)
def test_a_pickled_tensor_that_is_not_dense_and_plain(kind: str, folder: str, models: Path, capsys) -> None:
    name = pickled(
        models, folder, lambda state: {key: MATRICES[kind](w) if w.dim() > 1 else w for key, w in state.items()}
    )
    told = refused(flags("lora" if folder == "base" else folder), "expected a dense tensor", capsys, models)
    assert name in told


@pytest.mark.parametrize("folder", ["base", "full", "lora"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_pickle_of_other_things_than_tensors_by_name(kind: str, folder: str, models: Path, capsys) -> None:
    name = pickled(models, folder, CONTENTS[kind])
    message = "is not a mapping of names to tensors|is not plain weights"
    told = refused(flags("lora" if folder == "base" else folder), message, capsys, models)
    assert name in told
    assert not (models / "code-ran").exists()


def test_an_old_pickle_with_code_is_not_run(models: Path, capsys) -> None:
    (models / "lora" / ADAPTER).unlink()
    (models / "lora" / "adapter_model.bin").write_bytes(pickle.dumps({"w": Evil()}, protocol=2))
    refused(flags("lora"), "is not plain weights", capsys, models)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.float8_e5m2, torch.uint16], ids=str)
def test_factors_that_are_no_floats(dtype: torch.dtype, models: Path, capsys) -> None:
    state = load_file(models / "lora" / ADAPTER)
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, models / "lora" / ADAPTER)
    refused(flags("lora"), "expected matrices lora_A and lora_B|cannot be read", capsys, models)


WRONG = (None, "8", True, 2.5, 0, -3, float("nan"), float("inf"), [4], {"a": 1})
NUMBERS = ("text", 3, [], {})
FIELDS: dict[str, tuple[Any, ...]] = {
    "r": WRONG,
    "lora_alpha": (None, "8", True, float("nan"), float("-inf"), [4], {}),
    "rank_pattern": ("q_proj", 4, [], ["q_proj"], {"q_proj": "4"}, {"q_proj": None}, {"q_proj": 0}, {"(": 4}, {"*": 4}),
    "alpha_pattern": (3, ["q_proj"], {"q_proj": [8]}, {"q_proj": float("nan")}, {"[": 8}, {"q(?P<n": 8}),
    "use_rslora": ("false", 1, [], {"a": 1}),
    "base_model_name_or_path": (3, True, ["base"], {"path": "base"}),
    "target_modules": (3, True, [1], ["q_proj", None], {"q_proj": 1}, "(q_proj"),
    "init_lora_weights": (1, [True], {}),
    "bias": (None, 1, True, ["none"]),
    "lora_dropout": ("0.1", -0.1, 7, float("nan"), True),
    "modules_to_save": ("lm_head", 1, {"a": 1}, [1]),
    "peft_type": (3, ["LORA"], True),
    "use_dora": ("true", 1),
    "revision": (3, ["main"]),
    "task_type": (3, ["CAUSAL_LM"]),
}


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values], ids=repr
)
def test_a_wrongly_typed_field_of_an_adapter(field: str, value: Any, models: Path, capsys) -> None:
    edit(models / "lora" / PEFT, **{field: value})
    told = refused([*flags("lora"), "--dry_run"], "expected", capsys, models)
    assert PEFT in told
    assert field in told


OTHERS = [
    ("base/config.json", {"model_type": 3}),
    ("base/config.json", {"model_type": ["llama"]}),
    ("base/config.json", {"architectures": "LlamaForCausalLM"}),
    ("base/config.json", {"architectures": [["LlamaForCausalLM"]]}),
    ("base/config.json", {"architectures": [None]}),
    ("base/config.json", {"tie_word_embeddings": "false"}),
    ("full/config.json", {"architectures": {"a": 1}}),
    ("full/config.json", {"quantization_config": "nf4"}),
    ("lora/fusionlab.json", {"method": 3}),
    ("lora/fusionlab.json", {"method": None}),
    ("lora/fusionlab.json", {"a0_hash": None}),
    ("lora/fusionlab.json", {"base_hash": 12}),
    ("lora/fusionlab.json", {"seed": "42"}),
    ("lora/fusionlab.json", {"lora_alpha": [1]}),
    ("lora/fusionlab.json", {"lora_alpha": {"q": ["a", True]}}),
    ("lora/fusionlab.json", {"fused_attention": {"attn": {"x_proj": [0, 1]}}}),
    ("lora/fusionlab.json", {"fused_attention": {"attn": {"q_proj": [0]}}}),
    ("lora/fusionlab.json", {"out_proj_counted": 0}),
    ("full/model.safetensors.index.json", {"weight_map": [1]}),
    ("full/model.safetensors.index.json", {"weight_map": {"model.norm.weight": None}}),
    ("full/model.safetensors.index.json", {"weight_map": {"model.norm.weight": ["a.safetensors"]}}),
]


def task_of(place: str) -> str:
    folder = place.partition("/")[0]
    return "lora" if folder == "base" else folder


@pytest.mark.parametrize(("place", "fields"), OTHERS, ids=repr)
def test_a_wrongly_typed_field_of_another_file(place: str, fields: dict[str, Any], models: Path, capsys) -> None:
    if "index" in place:
        (models / "full" / WEIGHTS).rename(models / "full" / "a.safetensors")
    edit(models / place, **fields)
    told = refused(flags(task_of(place)), "expected|is missing", capsys, models)
    assert place in told
    assert next(iter(fields)) in told


NO_JSON: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is empty"),
    "half": (b'{"r": 2', "is not valid JSON"),
    "a pointer": (POINTER, "Git LFS"),
    "a web page": (b"\n<html>", "web page"),
    "latin-1": ('{"note": "é"}'.encode("latin-1"), "is not valid JSON"),
    "a list": (b"[]", "holds a list, expected a mapping"),
    "null": (b"null", "holds nothing, expected a mapping"),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON"),
    "deep mappings": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
    "a long number": (b'{"r": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "one key twice": (b'{"r": 2, "peft_type": "LORA", "r": 4}', r"the key 'r' comes twice, as 2 and as 4"),
    "twice deeper": (b'{"a": {"b": [1], "b": [2]}}', "the key 'b' comes twice"),
}


@pytest.mark.parametrize("place", [f"lora/{PEFT}", "lora/fusionlab.json", "base/config.json", "full/config.json"])
@pytest.mark.parametrize("kind", NO_JSON)
def test_a_file_that_is_no_json(kind: str, place: str, models: Path, capsys) -> None:
    content, message = NO_JSON[kind]
    (models / place).write_bytes(content)
    told = refused(flags(task_of(place)), message, capsys, models)
    assert place in told


LINKS = [f"base/{WEIGHTS}", f"full/{WEIGHTS}", f"lora/{ADAPTER}", "full/model.safetensors.index.json"]
RECORDS = [f"lora/{PEFT}", "lora/fusionlab.json", "base/config.json", "full/config.json"]


@pytest.mark.parametrize("place", [*LINKS, *RECORDS])
def test_a_link_whose_target_is_gone(place: str, models: Path, capsys) -> None:
    """As a pruned hub cache leaves it; also where another file of the model could be read in its place."""
    (models / place).unlink(missing_ok=True)
    if "index" in place:
        (models / "full" / WEIGHTS).unlink()
    torch.save({}, models / task_of(place) / ("adapter_model.bin" if "lora" in place else "pytorch_model.bin"))
    (models / place).symlink_to(models / "blobs" / "gone")
    told = refused(flags(task_of(place)), r"is a link to a file that is gone \(.*blobs/gone\)", capsys, models)
    assert place in told


@pytest.mark.parametrize("place", RECORDS)
def test_a_folder_in_the_place_of_a_file(place: str, models: Path, capsys) -> None:
    (models / place).unlink(missing_ok=True)
    (models / place).mkdir()
    told = refused(flags(task_of(place)), "cannot be read: is a directory", capsys, models)
    assert place in told


HEADERS: dict[str, Any] = {
    "no mapping": [1],
    "an entry of a list": {"w": [1]},
    "an entry of null": {"w": None},
    "a dtype of a list": {"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
    "no dtype": {"w": {"shape": [1], "data_offsets": [0, 4]}},
    "a shape of text": {"w": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
    "a shape of truths": {"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    "three offsets": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    "offsets of null": {"w": {"dtype": "F32", "shape": [1], "data_offsets": None}},
    "a shape beyond counting": {"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
    "four bits": {"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}},
    "deep": b"[" * 200_000,
    "latin-1": b'{"\xe9": 1}',
}


@pytest.mark.parametrize("place", [f"base/{WEIGHTS}", f"full/{WEIGHTS}", f"lora/{ADAPTER}"])
@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_is_none(kind: str, place: str, models: Path, capsys) -> None:
    content = HEADERS[kind]
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (models / place).write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
    refused(flags(task_of(place)), r"truncated or corrupt|is stored as|cannot be read|expected", capsys, models)


INDICES: dict[str, tuple[Any, str]] = {
    "a long name": ("a" * 300 + ".safetensors", "file name too long"),
    "a zero byte": ("a\0.safetensors", "missing shard"),
    "another file": ("config.json", "truncated or corrupt"),
    "an absolute path": ("/etc/hostname", "points outside its folder"),
    "nothing": ("", "points outside its folder"),
}


@pytest.mark.parametrize("folder", ["base", "full"])
@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_names_what_cannot_be_read(kind: str, folder: str, models: Path, capsys) -> None:
    shard, message = INDICES[kind]
    names = load_file(models / folder / WEIGHTS)
    (models / folder / WEIGHTS).rename(models / folder / "a.safetensors")
    weight_map = dict.fromkeys(names, "a.safetensors") | {"model.norm.weight": shard}
    edit(models / folder / "model.safetensors.index.json", weight_map=weight_map)
    refused(flags("lora" if folder == "base" else folder), message, capsys, models)


def test_an_empty_index(models: Path, capsys) -> None:
    edit(models / "full" / "model.safetensors.index.json", weight_map={})
    (models / "full" / WEIGHTS).unlink()
    refused(flags("full"), "has an empty weight_map", capsys, models)


UNKNOWN = [
    ("lora/adapter_config.json", {"trained_by": "me", "wandb": {"run": [1, 2]}, "steps": 1000, "clean": True}),
    ("lora/adapter_config.json", {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None, "revision": None}),
    ("lora/adapter_config.json", {"use_tomorrow": False, "tomorrow_config": None, "layers_pattern": None}),
    ("lora/fusionlab.json", {"note": [[]], "method": "lora"}),
    ("lora/fusion_stats.json", {"schema": "another"}),
    ("base/config.json", {"limit": float("inf"), "nested": [[{"a": None}]], "text_config": None}),
]


@pytest.mark.parametrize(("place", "fields"), UNKNOWN, ids=repr)
def test_what_is_only_unknown_passes(place: str, fields: dict[str, Any], models: Path, capsys) -> None:
    assert main(flags("lora", output="before")) == 0
    edit(models / place, **fields)
    assert main(flags("lora", output="after")) == 0
    before, after = (load_file(models / name / ADAPTER) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_in_another_unicode_encoding_is_read(encoding: str, models: Path) -> None:
    path = models / "lora" / PEFT
    path.write_bytes(path.read_text().encode(encoding))
    assert main(flags("lora")) == 0


def test_a_setting_that_peft_may_add_is_refused(models: Path, capsys) -> None:
    for fields in ({"use_tomorrow": True}, {"tomorrow_config": {"a": 1}}, {"use_qalora": True}):
        edit(models / "lora" / PEFT, **fields)
        refused(flags("lora"), "is not known here|QALoRA", capsys, models)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}', '{"schema": 2, "task_vectors": {"a": 3}}'])
def test_kept_statistics_that_cannot_be_read_are_measured_again(content: str, models: Path) -> None:
    assert main(flags("lora", output="before")) == 0
    (models / "lora" / "fusion_stats.json").write_text(content)
    assert main(flags("lora", output="after")) == 0
    before, after = (json.loads((models / name / "fusion.json").read_text()) for name in ("before", "after"))
    assert before["norms"] == after["norms"]

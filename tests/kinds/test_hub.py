"""Models, data sets and adapters by id, over HTTP from a stand-in for the hub, then from the cache without it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_client import go_offline
from hub_server import READS, WRITES, Fault, Hub
from safetensors.torch import save
from small_bases import write_small_bases

import fusionlab
from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS, load_backbone
from fusionlab.data import TextTasks
from fusionlab.data.sources import open_source
from fusionlab.errors import InputError
from fusionlab.fusion.folders import save_finetuned
from fusionlab.tensors.hub import open_clip_folder, resolve

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}).encode()
FILES = {
    "README.md": b"---\nlicense: mit\npipeline_tag: image-classification\n---\n",
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "model.safetensors": save({"w": torch.arange(300.0)}),
    "pytorch_model.bin": b"not to be fetched",
    "pictures/example.png": b"not to be fetched",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# files, whole and of one revision


def test_what_belongs_to_a_model_is_fetched_and_then_taken_from_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/model", FILES)
    folder = resolve("owner/model")
    assert files_of(folder) == {name: FILES[name] for name in FILES if "not to be" not in FILES[name].decode("latin1")}
    assert hub.asked("GET", "^/large/")  # by a redirect
    made = len(hub.requests)
    assert resolve("owner/model") == folder
    assert not [path for method, path, _ in hub.requests[made:] if method == "GET" and "/large/" in path]
    go_offline(monkeypatch)
    made = len(hub.requests)
    assert resolve("owner/model") == folder
    assert len(hub.requests) == made


def test_a_revision_is_kept_and_a_new_one_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.add("owner/model", FILES)
    assert (resolve("owner/model") / "tokenizer.json").read_bytes() == b"{}"
    hub.add("owner/model", {"tokenizer.json": b'{"version": "2"}'})
    hub.repositories["models", "owner/model"].branches["old"] = first
    assert (resolve("owner/model") / "tokenizer.json").read_bytes() == b'{"version": "2"}'
    for revision in (first, "old"):
        assert (resolve(f"owner/model@{revision}") / "tokenizer.json").read_bytes() == b"{}"
    go_offline(monkeypatch)
    assert (resolve("owner/model") / "tokenizer.json").read_bytes() == b'{"version": "2"}'
    assert (resolve(f"owner/model@{first}") / "tokenizer.json").read_bytes() == b"{}"
    with pytest.raises(InputError, match=r"'owner/model@new' .* not in the local cache, and HF_HUB_OFFLINE is set"):
        resolve("owner/model@new")


LARGE, INFO, FILE = "^/large/", "^/api/models/owner/model", "/resolve/"
PASSING = {
    "too many once": Fault("GET", INFO, 429, 1, {"Retry-After": "1"}),
    "too many once, no time": Fault("GET", FILE, 429, 1),
    "a fault of the hub once": Fault("GET", LARGE, 503, 1),
    "broken off once": Fault("GET", LARGE, None, 1),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_tried_again(case: str, hub: Hub) -> None:
    hub.add("owner/model", FILES)
    hub.faults.append(Fault(**vars(PASSING[case])))
    assert (resolve("owner/model") / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.faults[0].times == 0


STAYING = {
    "too many": (
        [Fault("GET", INFO, 429, headers={"Retry-After": "9"})],
        r"send less for now \(429, Retry-After 9 s\)",
    ),
    "too many, no time": ([Fault("GET", INFO, 429)], r"send less for now \(429\)"),
    "a fault of the hub": ([Fault("GET", INFO, 500)], r"has a fault \(500\); try again later"),
    "a file is refused": ([Fault("GET", LARGE, 403)], r"access is refused \(403\)"),
    "a file breaks off": ([Fault("GET", LARGE, None)], "the hub did not answer, or broke off; check the network"),
    "a file has a fault": ([Fault("GET", LARGE, 502)], r"has a fault \(502\)"),
}


@pytest.mark.parametrize("case", STAYING)
def test_what_stays_is_one_message(case: str, hub: Hub) -> None:
    hub.add("owner/model", FILES)
    hub.faults += STAYING[case][0]
    with pytest.raises(InputError, match=r"^'owner/model' does not exist here, and cannot be had") as told:
        resolve("owner/model")
    assert len(str(told.value).splitlines()) == 1
    assert re.search(STAYING[case][1], str(told.value)), told.value
    hub.faults.clear()
    assert (resolve("owner/model") / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_names_and_rights(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/private", FILES, private=True)
    hub.add("owner/gated", FILES, gated=True)
    hub.add("owner/open", FILES)
    for name, told in {
        "owner/none": "is not there, is private, or the token is not valid (401)",
        "owner/private": "is not there, is private, or the token is not valid (401)",
        "owner/gated": "it asks for its terms to be accepted on its page",
        "owner/open@none": "it has no such revision (404)",
    }.items():
        with pytest.raises(InputError, match="cannot be had from the hub") as refused:
            resolve(name)
        assert told in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", READS)
    assert resolve("owner/private").is_dir()
    with pytest.raises(InputError, match=r"no such repository, revision or file, or it is private \(404\)"):
        resolve("owner/none")
    monkeypatch.setenv("HF_TOKEN", WRITES)
    assert resolve("owner/gated").is_dir()


# models


def test_a_backbone_by_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded as from its folder; trained adapters name it with its revision, and their card with its licence."""
    commit = hub.add("owner/clip", files_of(ASSETS / "tiny-clip"))
    name = f"owner/clip@{commit}"
    module = fusionlab.ClipModule(name, rank=2)
    own = load_backbone("tiny-clip")
    assert all(torch.equal(a, b) for a, b in zip(module.base_model.parameters(), own.model.parameters(), strict=True))
    module.adaptation.add(["digits"])
    save_finetuned(tmp_path / "a", module.finetuned("digits"), module.backbone, {"model": "finetuned"})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/clip", commit)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "base_model: owner/clip\n" in card
    assert "license: apache-2.0\n" in card
    assert f'revision="{commit}"' in card
    go_offline(monkeypatch)
    assert load_backbone(name).image_size == 32
    with pytest.raises(InputError, match=r"^the model 'owner/other' does not exist here, and cannot .* HF_HUB_OFFLINE"):
        load_backbone("owner/other")


def test_a_model_of_no_use_is_refused_before_its_weights_come(hub: Hub) -> None:
    hub.add("owner/sound", FILES | {"config.json": b'{"model_type": "wav2vec2"}'})
    with pytest.raises(InputError, match="'owner/sound' is of type 'wav2vec2'"):
        load_backbone("owner/sound")
    assert not hub.asked("GET", LARGE)


def test_open_clip_by_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_small_bases(tmp_path)["open_clip"]
    commit = hub.add("owner/small", files_of(folder) | {"model.safetensors": b"transformers' own"})
    found = load_backbone(f"hf-hub:owner/small@{commit}")
    own = load_backbone(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), own.model.parameters(), strict=True))
    hub.add("owner/none", FILES)
    with pytest.raises(InputError, match="holds none of open_clip_model"):
        open_clip_folder("owner/none")
    go_offline(monkeypatch)
    assert open_clip_folder(f"owner/small@{commit}").name == commit
    with pytest.raises(InputError, match="'owner/small' cannot be had from the hub: it is not in the local cache"):
        open_clip_folder("owner/small")


# data


def table(text: str) -> bytes:
    stored = io.BytesIO()
    rows = {"text": [f"{text} {row}" for row in range(6)], "label": [row % 2 for row in range(6)]}
    pq.write_table(pa.table(rows), stored)
    return stored.getvalue()


def texts(path: str, cache: Path, **more: Any) -> TextTasks:
    task = {"name": "mine", "path": path, "input_columns": ["text"], "label_words": ["no", "yes"], **more}
    return TextTasks([task], cache_dir=str(cache))


def sources(data: TextTasks) -> list[str]:
    (task,) = data.definitions.values()
    source = open_source(task, Path(data.cache_dir))
    return source.tables["test"]["text"][:1]


def test_a_data_set_by_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = ("train", "test")
    first = hub.add("owner/set", {f"data/{split}-00000-of-00001.parquet": table("old") for split in splits}, "datasets")
    assert sources(texts("owner/set", tmp_path)) == ["old 0"]
    hub.add("owner/set", {f"data/{split}-00000-of-00001.parquet": table("new") for split in splits}, "datasets")
    assert sources(texts("owner/set", tmp_path)) == ["new 0"]
    assert sources(texts("owner/set", tmp_path, revision=first)) == ["old 0"]
    for path, more, told in (
        ("owner/none", {}, "doesn't exist on the Hub or cannot be accessed"),
        ("owner/set", {"revision": "none"}, "has no such revision"),
    ):
        with pytest.raises(InputError, match=told) as refused:
            sources(texts(path, tmp_path, **more))
        assert len(str(refused.value).splitlines()) == 1
    hub.add("owner/other", {"train.parquet": table("other")}, "datasets")
    hub.faults.append(Fault("GET", "^/api/datasets", 500))
    with pytest.raises(InputError, match=r"has a fault \(500\)"):
        sources(texts("owner/other", tmp_path))
    go_offline(monkeypatch)
    assert sources(texts("owner/set", tmp_path, revision=first)) == ["old 0"]
    assert sources(texts("owner/set", tmp_path)) == ["new 0"]
    with pytest.raises(InputError, match="could not be read"):
        sources(texts("owner/set", tmp_path, revision="other"))


# adapters


@pytest.mark.slow
def test_adapters_by_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fuse`` of a base and adapters by id, then ``test`` of an adapter by id; both again without the hub."""
    hub.add("owner/clip", files_of(ASSETS / "tiny-clip"))
    module = fusionlab.ClipModule("owner/clip", rank=2)
    for task, parameters in module.adaptation.add(["digits", "signs"]).items():
        for parameter in parameters:
            parameter.data.add_(0.02)
        save_finetuned(tmp_path / task, module.finetuned(task), module.backbone, {"model": "finetuned"})
        hub.add(f"owner/{task}", files_of(tmp_path / task))
    inputs = ["--finetuned.digits", "owner/digits", "--finetuned.signs", "owner/signs@main"]
    fuse = ["fuse", "--base", "owner/clip", *inputs]
    assert main([*fuse, "--rule", "average", "--output", str(tmp_path / "fused")]) == 0
    assert main([*fuse, "--rule", "ties", "--output", str(tmp_path / "full")]) == 0
    card = (tmp_path / "full" / "README.md").read_text()
    assert "base_model:\n- owner/clip\n- owner/digits\n- owner/signs\n" in card
    assert "| signs | `owner/signs@main` |" in card
    go_offline(monkeypatch)
    asked = len(hub.requests)
    assert main([*fuse, "--rule", "average", "--output", str(tmp_path / "again")]) == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("fused", "again")]
    assert weights[0] == weights[1]
    score = ["test", "--data.tasks", "[digits]", "--data.max_samples", "8", "--trainer.default_root_dir"]
    more = ["--model.backbone", "owner/clip", "--model.weights", "owner/digits"]
    assert main([*score, str(tmp_path), *more, "--output", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["model"] == "finetuned"
    assert len(hub.requests) == asked

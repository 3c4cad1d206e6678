"""What the output needs beside its weights travels with them, and what would be stale there does not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from fusionlab.__main__ import main
from fusionlab.backbones import load_backbone
from fusionlab.errors import InputError
from fusionlab.tensors import open_checkpoint
from fusionlab.tensors.hub import resolve
from fusionlab.tensors.weight_files import looks_like_weights

BIN = "pytorch_model.bin"
STALE = (
    "README.md", "README_zh.md", ".gitattributes", "tf_model.h5", "flax_model.msgpack", "model.onnx", "model.onnx_data",
    "model.Q4_K_M.gguf", "rust_model.ot", "consolidated.00.pth", "model.fp16.safetensors", "pytorch_model.bin",
    "training_args.bin", "optimizer.pt", "trainer_state.json", "all_results.json", "onnx/model.onnx",
    "onnx/config.json", "original/params.json", "original/consolidated.00.pth", "original/tokenizer.model",
    "openvino/openvino_model.bin", "checkpoint-10/model.safetensors", "runs/events.out.tfevents.1.host", "train.py",
    "figures/loss.png", "loss.png", "data.jsonl",
)  # fmt: skip


def write(folder: Path, **files: str) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def tokenizer(words: str = "a b c d e") -> transformers.PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words.split()])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_tokens(["<tool>"])
    return made


def llama(folder: Path) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    made = tokenizer()
    made.chat_template = {"default": "{{ messages[0].content }}", "tools": "tools: {{ messages[0].content }}"}
    made.save_pretrained(folder)
    return model


def check_llama(base: Path, out: Path) -> None:
    messages = [{"role": "user", "content": "a <tool> b"}]
    for name in ("default", "tools"):
        texts = {
            transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
                messages, tokenize=False, chat_template=name
            )
            for folder in (base, out)
        }
        assert texts == {"a <tool> b" if name == "default" else "tools: a <tool> b"}
    assert transformers.GenerationConfig.from_pretrained(out).max_new_tokens == 7
    assert transformers.AutoTokenizer.from_pretrained(out)("<tool>").input_ids == [8]


def clip(folder: Path) -> nn.Module:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 8})
    model = transformers.CLIPModel(config)
    model.save_pretrained(folder)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16, image_mean=[0.1, 0.2, 0.3])
    transformers.CLIPProcessor(pixels, tokenizer()).save_pretrained(folder)
    return model


def check_clip(base: Path, out: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.tokenizer("a").input_ids == [3]


def bert_of_sentences(folder: Path) -> nn.Module:
    """As sentence-transformers saves one: a folder a module, one with weights, one empty."""
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertModel(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    listed = [
        {"idx": k, "name": str(k), "path": f"{k}_{kind}" if k else "", "type": f"sentence_transformers.models.{kind}"}
        for k, kind in enumerate(kinds)
    ]
    write(
        folder, **{
            "modules.json": json.dumps(listed), "1_Pooling__config.json": '{"pooling_mode_mean_tokens": true}',
            "2_Dense__config.json": "{}", "config_sentence_transformers.json": "{}", "sentence_bert_config.json": "{}",
        }
    )  # fmt: skip
    save_file({"linear.weight": torch.ones(2, 8)}, folder / "2_Dense" / "model.safetensors")
    (folder / "3_Normalize").mkdir()
    return model


def check_sentences(base: Path, out: Path) -> None:
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(out)("a b").input_ids == [3, 4]


CODE = {
    "configuration_mine.py": "from pathlib import Path\nPath({marker!r}).touch()\n"
    "from transformers import PretrainedConfig\n"
    "class MineConfig(PretrainedConfig):\n    model_type = 'mine'\n",
    "modeling_mine.py": "from transformers import PreTrainedModel\nfrom .configuration_mine import MineConfig\n"
    "from .blocks_mine import block\n"
    "class MineModel(PreTrainedModel):\n    config_class = MineConfig\n"
    "    def __init__(self, config):\n        super().__init__(config)\n        self.inner = block()\n"
    "        self.post_init()\n"
    "    def forward(self, x):\n        return self.inner(x)\n",
    "blocks_mine.py": "from torch import nn\nfrom .sizes_mine import SIZE\n\ndef block():\n"
    "    return nn.Linear(SIZE, SIZE)\n",
    "sizes_mine.py": "SIZE = 8\n",
    "kernels__fast_mine.py": "raise AssertionError('never imported')\n",
}


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)


def custom(folder: Path) -> nn.Module:
    """A model whose classes come as code beside it; the code leaves a mark where it runs."""
    model = Mine()
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    auto_map = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    write(folder, **{name: text.format(marker=str(folder.parent / "ran")) for name, text in CODE.items()})
    write(folder, **{"config.json": json.dumps({"model_type": "mine", "auto_map": auto_map, "dtype": "float32"})})
    return model


def check_custom(base: Path, out: Path) -> None:
    assert not (base.parent / "ran").exists()
    for name in CODE:
        name = name.replace("__", "/")
        assert (out / name).read_bytes() == (base / name).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(base.parent / "code"))
        patch.syspath_prepend(str(base.parent / "code"))
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            patch.delitem(sys.modules, name)
        loaded = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    assert (base.parent / "ran").exists()
    weight = load_file(out / "model.safetensors")["inner.weight"]
    assert torch.equal(loaded.inner.weight, weight)


def licensed_t5(folder: Path) -> nn.Module:
    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write(
        folder, **{
            "LICENSE": "terms", "LICENSE.md": "terms", "NOTICE.txt": "notice", "USE_POLICY.md": "policy",
            "LICENSES__Apache-2.0.txt": "terms", "META_LICENSE.md": "terms", "Terms-of-use.pdf": "terms",
            "source.spm": "pieces", "dict.txt": "words", "qwen.tiktoken": "ranks",
            "tokenizer.model.v3": "pieces", "chat_template.json": "{}", "video_preprocessor_config.json": "{}",
        }
    )  # fmt: skip
    return model


def check_licences(base: Path, out: Path) -> None:
    names = [
        "LICENSE", "LICENSE.md", "NOTICE.txt", "USE_POLICY.md", "META_LICENSE.md", "Terms-of-use.pdf",
        "LICENSES/Apache-2.0.txt", "source.spm", "dict.txt", "qwen.tiktoken", "tokenizer.model.v3",
        "chat_template.json",
    ]  # fmt: skip
    for name in names:
        assert (out / name).read_bytes() == (base / name).read_bytes()


def named_weights(folder: Path) -> nn.Module:
    """``transformers_weights`` would have the output looked for under the base's name."""
    model = llama(folder)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text())
    write(folder, **{"config.json": json.dumps(config | {"transformers_weights": "mine.safetensors"})})
    return model


KINDS: dict[str, tuple[Callable[[Path], nn.Module], Callable[[Path, Path], None]]] = {
    "chat": (llama, check_llama),
    "pictures": (clip, check_clip),
    "sentences": (bert_of_sentences, check_sentences),
    "custom code": (custom, check_custom),
    "licences": (licensed_t5, check_licences),
    "named weights": (named_weights, lambda base, out: None),
}


FOLDERS = {
    "chat": ["additional_chat_templates"],
    "named weights": ["additional_chat_templates"],
    "sentences": ["1_Pooling", "2_Dense", "3_Normalize"],
    "custom code": ["kernels"],
    "licences": ["LICENSES"],
}


def moved(base: Path, folder: Path, seed: int) -> None:
    """A fine-tuned model: weights alone."""
    generator = torch.Generator().manual_seed(seed)
    state = open_checkpoint(base).state()
    folder.mkdir()
    torch.save({name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in state.items()}, folder / BIN)


def spoil(folder: Path) -> None:
    """Add what is about the base, not of it."""
    for name in STALE:
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"stale")


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_loads_wherever_the_base_does(kind: str, tmp_path: Path, capsys) -> None:
    make, check = KINDS[kind]
    torch.manual_seed(0)
    model = make(tmp_path / "base")
    spoil(tmp_path / "base")
    moved(tmp_path / "base", tmp_path / "a", 1)
    flags = ["--base", str(tmp_path / "base"), "--finetuned.a", str(tmp_path / "a"), "--rule", "average"]
    assert main(["fuse", *flags, "--output", str(tmp_path / "out"), "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert main(["fuse", *flags, "--output", str(tmp_path / "out")]) == 0
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    stale = set(STALE) - {"train.py"} if kind == "custom code" else set(STALE)
    assert there & stale == {"README.md"}
    assert "fused by average" in (tmp_path / "out" / "README.md").read_text()
    check(tmp_path / "base", tmp_path / "out")
    folders = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert sorted(folders) == FOLDERS.get(kind, [])
    carried = json.loads((tmp_path / "out" / "fusion.json").read_text())["carried"]
    assert set(carried) == there - {"README.md", "fusion.json", "model.safetensors"}
    assert all(name in plan for name in carried[:15])
    if kind != "custom code":
        loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out")
        fused = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in fused.items())


@pytest.mark.parametrize("path", ["../other", "/etc", ".", "a/../../b"])
def test_modules_outside_the_folder_are_refused(path: str, tmp_path: Path, capsys) -> None:
    llama(tmp_path / "base")
    moved(tmp_path / "base", tmp_path / "a", 1)
    write(tmp_path / "base", **{"modules.json": json.dumps([{"path": path, "type": "sentence_transformers.Dense"}])})
    flags = ["--base", str(tmp_path / "base"), "--finetuned.a", str(tmp_path / "a"), "--output", str(tmp_path / "out")]
    for more in ([], ["--dry_run"]):
        assert main(["fuse", *flags, *more]) == 2
        assert f"points outside its folder: {path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that downloads use, over folders OWNER/NAME."""

    repositories: Path
    fetched: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.repositories.joinpath(*parts[2:4])
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}
                for name, path in files.items()
            ]
            about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._send(json.dumps(tree if "tree" in parts else about).encode(), with_body)
            return
        path = self.repositories.joinpath(*parts[:2], *parts[4:])  # OWNER/NAME/resolve/COMMIT/FILE
        if path.is_file():
            self.fetched += ["/".join(parts[4:])] if with_body else []
            self._send(path.read_bytes(), with_body, _oid(path))
        else:
            self._send(b"", with_body, code=404)

    def _send(self, content: bytes, with_body: bool, etag: str = "", code: int = 200) -> None:
        self.send_response(code)
        headers = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        headers |= {} if code == 200 else {"X-Error-Code": "EntryNotFound"}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A hub on this machine: where its repositories lie, and what was fetched."""
    handler = type("Hub", (_Hub,), {"repositories": tmp_path / "hub", "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "hub" / "owner").mkdir(parents=True)
    yield tmp_path / "hub" / "owner", handler.fetched
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_on_the_hub_brings_the_same(kind: str, hub: tuple[Path, list[str]], tmp_path: Path, capsys) -> None:
    owner, fetched = hub
    make, check = KINDS[kind]
    make(owner / "model")
    moved(owner / "model", tmp_path / "a", 1)
    spoil(owner / "model")
    flags = ["--finetuned.a", str(tmp_path / "a"), "--rule", "average", "--output"]
    assert main(["fuse", "--base", "owner/model", *flags, str(tmp_path / "out")]) == 0
    assert main(["fuse", "--base", str(owner / "model"), *flags, str(tmp_path / "local")]) == 0
    there, local = (
        {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "out", tmp_path / "local")
    )
    assert there.keys() == local.keys()
    assert [name for name in there if there[name] != local[name]] == ["README.md", "fusion.json"]
    weights = "mine.safetensors" if kind == "named weights" else "model.safetensors"
    of_modules = {"2_Dense/model.safetensors"} if kind == "sentences" else set()
    assert {name for name in fetched if name.endswith((".safetensors", ".bin", ".h5"))} == {weights, *of_modules}
    assert not set(fetched) & {"onnx/model.onnx", "original/params.json", "model.Q4_K_M.gguf"}
    shutil.copytree(owner / "model", owner.parent / "base")
    check(owner.parent / "base" if kind != "custom code" else owner / "model", tmp_path / "out")


def sharded(folder: Path) -> None:
    llama(folder).save_pretrained(folder, max_shard_size=600)


def pickled(folder: Path) -> None:
    model = llama(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / BIN)


def variant(folder: Path) -> None:
    llama(folder).save_pretrained(folder, variant="bf16")


def adapter_beside_a_model(folder: Path) -> None:
    llama(folder)
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "chosen", "flags"),
    [
        (sharded, r"model-0000\d-of-0000\d\.safetensors|model.safetensors", []),
        (pickled, r"pytorch_model\.bin", []),
        (variant, r"model\.bf16\.safetensors", ["--variant", "bf16"]),
        (llama, r"model\.safetensors", []),
        (adapter_beside_a_model, r"adapter_model\.safetensors", []),
    ],
)
def test_only_the_model_s_weights_are_fetched(
    make: Callable[[Path], Any], chosen: str, flags: list[str], hub: tuple[Path, list[str]], tmp_path: Path
) -> None:
    owner, fetched = hub
    make(owner / "model")
    spoil(owner / "model")
    path = resolve("owner/model", *flags[1:])
    weights = [name for name in fetched if looks_like_weights(name) and not name.endswith(".json")]
    assert weights
    assert all(re.fullmatch(chosen, name) for name in weights), weights
    if make is not adapter_beside_a_model:
        assert (
            open_checkpoint(path, *flags[1:]).tensors.keys()
            == open_checkpoint(owner / "model", *flags[1:]).tensors.keys()
        )
    with pytest.MonkeyPatch.context() as patch:  # and again without a network
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve("owner/model", *flags[1:]) == path


@pytest.mark.parametrize("code_of", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("model_type", ["mine", "llama", "t5", "clip"])
def test_code_beside_a_model_is_never_run_by_a_run_either(
    model_type: str, code_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user would be asked, too: the answer would be yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    folder = tmp_path / "base"
    {"t5": licensed_t5, "clip": clip}.get(model_type, llama)(folder)
    write(folder, **{name: text.format(marker=str(tmp_path / "ran")) for name, text in CODE.items()})
    classes = ["configuration_mine.MineConfig", None] if "tokenizer" in code_of else "configuration_mine.MineConfig"
    names = ("AutoTokenizer",) if "tokenizer" in code_of else ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    content = json.loads((folder / code_of).read_text()) | {"auto_map": dict.fromkeys(names, classes)}
    content |= {"model_type": model_type} if code_of == "config.json" else {"tokenizer_class": "MineTokenizer"}
    write(folder, **{code_of: json.dumps(content)})
    from_code_only = model_type == "mine" or ("tokenizer" in code_of and model_type == "llama")
    message = r"is of type 'mine'|contains custom code"
    with pytest.raises(InputError, match=message) if from_code_only else contextlib.nullcontext():
        load_backbone(str(folder))
    assert not (tmp_path / "ran").exists()

"""Which files of a folder are the model: those that transformers reads; all others that look like weights are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fusionlab.__main__ import main
from fusionlab.errors import InputError
from fusionlab.tensors import open_checkpoint

SHARD = 2_000  # bytes: a handful of shards


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16,
        )
    )  # fmt: skip


RIGHT, STALE = 1, 2


def pickled(folder: Path, seed: int, name: str = "pytorch_model.bin") -> None:
    torch.save(model(seed).state_dict(), folder / name)


def pickled_shards(folder: Path, seed: int, variant: str = "") -> None:
    """As transformers 4 wrote them."""
    state = model(seed).state_dict()
    names = [f"pytorch_model-{k:05d}-of-00002{variant}.bin" for k in (1, 2)]
    weight_map = {name: names[k % 2] for k, name in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"pytorch_model.bin.index{variant}.json").write_text(json.dumps(index))


def named_in_config(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))


def single_beside_older_shards(folder: Path) -> None:
    model(STALE).save_pretrained(folder, max_shard_size=SHARD)
    whole = folder / "whole"
    model(RIGHT).save_pretrained(whole)
    shutil.move(whole / "model.safetensors", folder)
    shutil.rmtree(whole)


def shards_beside_pickled(folder: Path) -> None:
    model(RIGHT).save_pretrained(folder, max_shard_size=SHARD)
    pickled(folder, STALE)


def pickled_beside_pickled_shards(folder: Path) -> None:
    model(RIGHT).config.save_pretrained(folder)
    pickled_shards(folder, STALE)
    pickled(folder, RIGHT)


def pickled_shards_beside_other_formats(folder: Path) -> None:
    model(RIGHT).config.save_pretrained(folder)
    pickled_shards(folder, RIGHT)
    for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx", "consolidated.00.pth", "model.gguf"):
        (folder / name).write_bytes(b"other")


def a_file_that_the_configuration_names(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    save_file(model(RIGHT).state_dict(), folder / "weights.safetensors", metadata={"format": "pt"})
    named_in_config(folder, "weights.safetensors")


def an_index_that_the_configuration_names(folder: Path) -> None:
    model(RIGHT).save_pretrained(folder, max_shard_size=SHARD)
    (folder / "model.safetensors.index.json").rename(folder / "right.safetensors.index.json")
    save_file(model(STALE).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    named_in_config(folder, "right.safetensors.index.json")


def a_file_in_a_folder_that_the_configuration_names(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    (folder / "best").mkdir()
    save_file(model(RIGHT).state_dict(), folder / "best" / "model.safetensors", metadata={"format": "pt"})
    named_in_config(folder, "best/model.safetensors")


def pickled_beside_a_variant(folder: Path) -> None:
    model(STALE).save_pretrained(folder, variant="fp16")
    pickled(folder, RIGHT)


def a_variant(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    model(RIGHT).save_pretrained(folder, variant="fp16")


def a_variant_in_shards(folder: Path) -> None:
    model(RIGHT).save_pretrained(folder, variant="fp16", max_shard_size=SHARD)
    save_file(model(STALE).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def a_pickled_variant(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    pickled(folder, RIGHT, "pytorch_model.fp16.bin")


def a_pickled_variant_in_shards(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    pickled_shards(folder, RIGHT, ".fp16")


PLAIN: list[tuple[Callable[[Path], None], list[str]]] = [
    (single_beside_older_shards, ["model-00001-of-", "model.safetensors.index.json"]),
    (shards_beside_pickled, ["pytorch_model.bin"]),
    (pickled_beside_pickled_shards, ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]),
    (
        pickled_shards_beside_other_formats,
        ["tf_model.h5", "flax_model.msgpack", "model.onnx", "consolidated.00.pth", "model.gguf"],
    ),
    (a_file_that_the_configuration_names, ["model.safetensors"]),
    (an_index_that_the_configuration_names, ["model.safetensors"]),
    (a_file_in_a_folder_that_the_configuration_names, ["model.safetensors"]),
    (pickled_beside_a_variant, ["model.fp16.safetensors"]),
]
OF_VARIANT: list[tuple[Callable[[Path], None], list[str]]] = [
    (a_variant, ["model.safetensors"]),
    (a_variant_in_shards, ["model.safetensors"]),
    (a_pickled_variant, ["model.safetensors"]),
    (a_pickled_variant_in_shards, ["model.safetensors"]),
]
CASES = [(*case, None) for case in PLAIN] + [(*case, "fp16") for case in OF_VARIANT]


@pytest.mark.parametrize(("arrange", "beside", "variant"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_model_is_what_from_pretrained_reads(
    arrange: Callable[[Path], None], beside: list[str], variant: str | None, tmp_path: Path, capsys
) -> None:
    (tmp_path / "a").mkdir()
    arrange(tmp_path / "a")
    oracle = LlamaForCausalLM.from_pretrained(tmp_path / "a", variant=variant).state_dict()
    checkpoint = open_checkpoint(tmp_path / "a", variant)
    state = checkpoint.state()
    assert state.keys() == oracle.keys()
    assert all(torch.equal(state[name], oracle[name]) for name in oracle)
    assert torch.equal(state["model.norm.weight"], model(RIGHT).state_dict()["model.norm.weight"])
    for name in beside:
        assert any(unread.startswith(name) for unread in checkpoint.unread), checkpoint.unread
    read = {path.relative_to(tmp_path / "a").as_posix() for path in checkpoint.files}
    assert not read & set(checkpoint.unread)

    model(RIGHT).save_pretrained(tmp_path / "base", variant=variant)
    flags = [
        "fuse", "--base", str(tmp_path / "base"), "--finetuned.a", str(tmp_path / "a"), "--rule", "average",
        "--output", str(tmp_path / "out"), *([f"--variant={variant}"] if variant else []),
    ]  # fmt: skip
    assert main([*flags, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert main(flags) == 0
    summary = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert record["finetuned"]["a"]["not_read"] == checkpoint.unread
    for printed in (plan, summary):
        assert all("not read in 'a'" in printed and name in printed for name in beside)
    fused = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(fused[name], oracle[name]) for name in oracle)
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(reloaded[name], oracle[name]) for name in oracle)


def only_variants(folder: Path) -> None:
    model(RIGHT).save_pretrained(folder, variant="fp16")


def shards_without_index(folder: Path) -> None:
    model(RIGHT).save_pretrained(folder, max_shard_size=SHARD)
    (folder / "model.safetensors.index.json").unlink()
    for path in sorted(folder.glob("model-*.safetensors"))[1:]:
        path.unlink()


def a_named_file_that_is_gone(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    named_in_config(folder, "weights.safetensors")


def a_named_file_outside(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    named_in_config(folder, "../other/model.safetensors")


def a_named_pickle(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    named_in_config(folder, "pytorch_model.bin")


def a_link_to_nothing(folder: Path) -> None:
    model(STALE).save_pretrained(folder)
    pickled(folder, STALE)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")


REFUSED: list[tuple[Callable[[Path], None], str | None, str]] = [
    (only_variants, None, "has weights only as variants: fp16; choose one with --variant"),
    (only_variants, "bf16", "has no weights of variant 'bf16'; its variants: fp16"),
    (a_pickled_variant, "int8", "has no weights of variant 'int8'; its variants: fp16"),
    (single_beside_older_shards, "fp16", "has no weights of variant 'fp16'; its variants: none"),
    (shards_without_index, None, r"has shards without their index: model-00001-of-\d+.safetensors"),
    (a_named_file_that_is_gone, None, "names weights.safetensors as the weights, and it is not there"),
    (a_named_file_outside, None, r"points outside its folder: \.\./other/model.safetensors"),
    (a_named_pickle, None, "expected a .safetensors file or its .index.json, got 'pytorch_model.bin'"),
    (a_file_that_the_configuration_names, "fp16", "names weights.safetensors as the weights, whatever the variant"),
    (a_link_to_nothing, None, "model.safetensors' is a link to a file that is gone"),
]


@pytest.mark.parametrize(("arrange", "variant", "message"), REFUSED)
def test_a_folder_without_one_answer_is_refused(
    arrange: Callable[[Path], None], variant: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    arrange(tmp_path / "a")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "a", variant)


@pytest.mark.parametrize("variant", ["", "../a", "a b"])
def test_a_variant_is_a_word(variant: str, tmp_path: Path, capsys) -> None:
    flags = ["--base", "tiny-t5", "--finetuned.a", "tiny-t5", "--output", str(tmp_path / "out"), f"--variant={variant}"]
    assert main(["fuse", *flags]) == 2
    assert f"variant: expected a word such as fp16, got {variant!r}" in capsys.readouterr().err


def test_an_index_can_be_given_itself(tmp_path: Path) -> None:
    single_beside_older_shards(tmp_path)
    read = open_checkpoint(tmp_path / "model.safetensors.index.json")
    assert torch.equal(
        read.state()["model.embed_tokens.weight"], model(STALE).state_dict()["model.embed_tokens.weight"]
    )
    assert read.config["model_type"] == "llama"


def test_an_adapter_is_what_peft_reads(tmp_path: Path, capsys) -> None:
    model(0).save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(model(0), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft_model.save_pretrained(tmp_path / "a")
    stale = {
        name: torch.ones_like(tensor) for name, tensor in load_file(tmp_path / "a/adapter_model.safetensors").items()
    }
    torch.save(stale, tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "checkpoint-1").mkdir()
    save_file(stale, tmp_path / "a" / "checkpoint-1" / "adapter_model.safetensors")
    torch.save({}, tmp_path / "a" / "training_args.bin")
    flags = ["--finetuned.a", str(tmp_path / "a"), "--rule", "average", "--output", str(tmp_path / "out")]
    assert main(["fuse", "--base", str(tmp_path / "base"), *flags, "--save", "weights"]) == 0
    expected = PeftModel.from_pretrained(model(0), tmp_path / "a").merge_and_unload().state_dict()
    fused = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(fused[name], tensor, rtol=0, atol=1e-7)  # one rounding of another order
    not_read = ["adapter_model.bin", "checkpoint-1/adapter_model.safetensors"]
    assert f"not read in 'a': {', '.join(not_read)}" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())["finetuned"]["a"]
    assert record["not_read"] == not_read
    assert "adapter_model.bin" not in {file["file"] for file in record["files"]}

"""Models of a part over the whole, and the other way round: by transformers' own classes, with older and newer files.

What belongs to both is found by values: transformers itself loads the part out of the whole.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionlab.__main__ import main

TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = TOWER | {"image_size": 8, "patch_size": 4}
TEXT = TOWER | {"vocab_size": 16}
PROJECTED = {"projection_dim": 8}
ONE = ("--rule", "task_arithmetic", "--rule.scaling_coefficient", "1.0", "--save", "weights")


def clip() -> Any:
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT | PROJECTED, vision_config=IMAGE | PROJECTED, projection_dim=8))


def siglip() -> Any:
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=IMAGE))


def bert(name: str) -> Callable[[], Any]:
    return lambda: getattr(hf, name)(hf.BertConfig(**TEXT))


def roberta() -> Any:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT, pad_token_id=1))


def llama(name: str = "LlamaForCausalLM") -> Callable[[], Any]:
    return lambda: getattr(hf, name)(hf.LlamaConfig(**TEXT, pad_token_id=0))


def gpt2() -> Any:
    config = hf.GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return hf.GPT2LMHeadModel(config)


def t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**IMAGE))


def llava() -> Any:
    vision, text = IMAGE | {"model_type": "clip_vision_model"}, TEXT | {"model_type": "llama"}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


PAIRS: dict[str, tuple[Callable[[], Any], str]] = {
    "vision tower of CLIP": (clip, "CLIPVisionModel"),
    "vision tower of CLIP, with projection": (clip, "CLIPVisionModelWithProjection"),
    "text tower of CLIP": (clip, "CLIPTextModel"),
    "text tower of CLIP, with projection": (clip, "CLIPTextModelWithProjection"),
    "vision tower of SigLIP": (siglip, "SiglipVisionModel"),
    "text tower of SigLIP": (siglip, "SiglipTextModel"),
    "BERT under masks": (bert("BertForMaskedLM"), "BertModel"),
    "BERT under classes": (bert("BertForSequenceClassification"), "BertModel"),
    "BERT under answers": (bert("BertForQuestionAnswering"), "BertModel"),
    "RoBERTa": (roberta, "RobertaModel"),
    "Llama": (llama(), "LlamaModel"),
    "Llama under classes": (llama("LlamaForSequenceClassification"), "LlamaModel"),
    "GPT-2": (gpt2, "GPT2Model"),
    "T5's encoder": (t5, "T5EncoderModel"),
    "T5 without a head": (t5, "T5Model"),
    "ViT": (vit, "ViTModel"),
    "LLaVA without a head": (llava, "LlavaModel"),
}


def scattered(model: Any) -> Any:
    """Every weight a random one, so that no two are equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """For a pair the wholes ``whole0`` and ``whole1``, and their parts ``part0`` and ``part1``, each made once."""
    root, made = tmp_path_factory.mktemp("pairs"), {}

    def of(case: str) -> Path:
        if case not in made:
            folder = made[case] = root / str(len(made))
            make, name = PAIRS[case]
            torch.manual_seed(0)
            for number in (0, 1):
                scattered(make()).save_pretrained(folder / f"whole{number}")
                part = getattr(hf, name).from_pretrained(folder / f"whole{number}")
                part.save_pretrained(folder / f"part{number}")
        return made[case]

    return of


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def fuse(base: Path, output: Path, *flags: str, **finetuned: Path) -> dict[str, Any]:
    inputs = [part for task, path in finetuned.items() for part in (f"--finetuned.{task}", str(path))]
    arguments = ["fuse", "--base", str(base), *inputs, "--output", str(output), *(flags or ONE)]
    assert main([*arguments, "--dry_run"]) == 0
    assert main(arguments) == 0
    return json.loads((output / "fusion.json").read_text())


def moved(base: Path, tuned: Path, given: Path) -> dict[str, Tensor]:
    """The base's tensors, those that ``given`` has in ``tuned``'s values from there; known by values alone."""
    expected, values = tensors(base), list(tensors(given).values())
    for name, value in tensors(tuned).items():
        if any(other.shape == value.shape and torch.equal(other, value) for other in values):
            expected[name] = value
    return expected


def assert_close(output: Path, expected: dict[str, Tensor]) -> None:
    found = tensors(output)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", PAIRS)
def test_a_part_over_the_whole(case: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved(case)
    record = fuse(folder / "whole0", tmp_path / "out", a=folder / "part1")
    expected = moved(folder / "whole0", folder / "whole1", folder / "part1")
    before = tensors(folder / "whole0")
    assert 0 < sum(not torch.equal(before[name], expected[name]) for name in before) <= len(before)
    assert_close(tmp_path / "out", expected)
    assert len(record["notes"]) == (case != "T5 without a head")  # whose files hold the same tensors
    both = fuse(folder / "whole0", tmp_path / "both", "--rule", "average", a=folder / "part1", b=folder / "whole1")
    assert both["cosines"]["a"]["b"] > 0
    halves = {name: (before[name] + (expected[name] + tensors(folder / "whole1")[name]) / 2) for name in before}
    assert_close(tmp_path / "both", {name: value - before[name] for name, value in halves.items()})


@pytest.mark.parametrize("case", PAIRS)
def test_the_whole_over_a_part(case: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved(case)
    fuse(folder / "part0", tmp_path / "out", a=folder / "whole1")
    assert_close(tmp_path / "out", moved(folder / "part0", folder / "part1", folder / "whole1"))
    fuse(folder / "part0", tmp_path / "again", a=tmp_path / "out")  # our output is an input
    assert_close(tmp_path / "again", tensors(tmp_path / "out"))


def rename(folder: Path, output: Path, change: Callable[[str], str], **more: Tensor) -> Path:
    output.mkdir()
    (output / "config.json").write_text((folder / "config.json").read_text())
    state = {change(name): value for name, value in tensors(folder).items()}
    save_file(state | more, output / "model.safetensors", metadata={"format": "pt"})
    return output


def older(name: str) -> str:
    return f"vision_model.{name}"


@pytest.mark.parametrize("how", ["old over new", "new over old", "old over the whole", "the whole over old"])
@pytest.mark.parametrize("case", ["vision tower of CLIP", "vision tower of SigLIP"])
def test_towers_in_older_files(case: str, how: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Which have the names of the whole."""
    folder = saved(case)
    old = [rename(folder / f"part{number}", tmp_path / f"old{number}", older) for number in (0, 1)]
    base, tuned = {
        "old over new": (folder / "part0", old[1]),
        "new over old": (old[0], folder / "part1"),
        "old over the whole": (folder / "whole0", old[1]),
        "the whole over old": (old[0], folder / "whole1"),
    }[how]
    fuse(base, tmp_path / "out", a=tuned)
    as_base = {"old over new": folder / "part1", "new over old": old[1], "the whole over old": old[1]}
    assert_close(tmp_path / "out", moved(base, as_base.get(how, folder / "whole1"), tuned))


def masks(number: int = 2) -> dict[str, Tensor]:
    return {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4).tril() for layer in range(number)}


BESIDE: dict[str, tuple[str, Callable[[], Any], dict[str, Tensor], Callable[[str], str]]] = {
    "GPT-2 as the hub has it": ("GPT-2", gpt2, masks(), lambda name: name.removeprefix("transformer.")),
    "positions of CLIP": (
        "vision tower of CLIP", clip,
        {"text_model.embeddings.position_ids": torch.arange(77).view(1, -1),
         "vision_model.embeddings.position_ids": torch.arange(5).view(1, -1)}, str,
    ),
    "frequencies of Llama": (
        "Llama", llama(),
        {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(2) for layer in range(2)}, str,
    ),
    "a further bias of T5": (
        "T5's encoder", t5,
        {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.rand(32, 2)}, str,
    ),
    "positions of BERT": (
        "BERT under masks", bert("BertForMaskedLM"), {"bert.embeddings.position_ids": torch.arange(9).view(1, -1)}, str,
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["base", "input", "both"])
@pytest.mark.parametrize("case", BESIDE)
def test_what_loading_ignores_is_ignored(case: str, where: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    pair, make, more, change = BESIDE[case]
    folders = [saved(pair) / f"whole{number}" for number in (0, 1)]
    for number, side in enumerate(("base", "input")):
        if where in (side, "both"):
            folders[number] = rename(folders[number], tmp_path / side, change, **more)
    fuse(folders[0], tmp_path / "out", a=folders[1])
    found = tensors(tmp_path / "out")
    assert found.keys() == tensors(folders[0]).keys()
    assert all(torch.equal(found[name], value) for name, value in more.items() if name in found)
    loaded, expected = (type(make()).from_pretrained(each) for each in (tmp_path / "out", saved(pair) / "whole1"))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-5, atol=1e-5)


ADAPTED: dict[str, tuple[str, list[str]]] = {
    "vision tower of CLIP": ("CLIPVisionModel", ["q_proj", "fc1"]),
    "vision tower of CLIP, with projection": ("CLIPVisionModelWithProjection", ["v_proj", "visual_projection"]),
    "text tower of CLIP": ("CLIPTextModel", ["q_proj", "fc2"]),
    "BERT under classes": ("BertModel", ["query", "dense"]),
    "Llama": ("LlamaModel", ["q_proj", "up_proj"]),
    "T5's encoder": ("T5EncoderModel", ["q", "wo"]),
    "ViT": ("ViTModel", ["q_proj", "fc1"]),
}


def adapt(source: Path, name: str, targets: list[str], output: Path) -> Path:
    """An adapter as PEFT saves it, and beside it what merging it gives, as transformers saves that."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    tuned = peft.get_peft_model(getattr(hf, name).from_pretrained(source), config)
    tuned.save_pretrained(output)
    tuned.merge_and_unload().save_pretrained(output / "merged")
    return output


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("case", ADAPTED)
def test_an_adapter_of_a_part_over_the_whole(
    case: str, weights: bool, saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (name, targets) = saved(case), ADAPTED[case]
    adapter = adapt(folder / "part0", name, targets, tmp_path / "a")
    merged = fuse(folder / "whole0", tmp_path / "full", a=adapter / "merged")
    record = fuse(folder / "whole0", tmp_path / "out", *(ONE if weights else ONE[:-2]), a=adapter)
    assert record["norms"]["a"] == pytest.approx(merged["norms"]["a"], rel=1e-4)
    if weights:
        assert_close(tmp_path / "out", tensors(tmp_path / "full"))
        return
    whole = PAIRS[case][0]()
    model = type(whole).from_pretrained(folder / "whole0")
    peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(tmp_path / "merged", tensors(tmp_path / "full"))


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "another head": (bert("BertForMaskedLM"), bert("BertForSequenceClassification"), "another|not in the base"),
    "a wider tower": (
        clip, lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**{**IMAGE, "hidden_size": 16})), "shape|another arch",
    ),
    "a longer tower": (clip, lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**{**IMAGE, "patch_size": 2})), "shape"),
    "another vocabulary": (
        gpt2, lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)), "20",
    ),
    "another kind": (llama(), vit, "another architecture"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_part_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other, message = REFUSED[case]
    base().save_pretrained(tmp_path / "base")
    other().save_pretrained(tmp_path / "a")
    capsys.readouterr()
    flags = ["--base", str(tmp_path / "base"), "--finetuned.a", str(tmp_path / "a"), "--output", str(tmp_path / "out")]
    assert main(["fuse", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.parametrize("case", ["vision tower of CLIP", "BERT under classes", "Llama", "GPT-2", "text tower of CLIP"])
def test_what_a_part_lacks_in_its_place_is_named(case: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved(case)
    name = next(name for name in tensors(folder / "part1") if "norm" in name.lower() or "ln_" in name)
    part = rename(folder / "part1", tmp_path / "a", str)
    state = {key: value for key, value in tensors(part).items() if key != name}
    save_file(state, part / "model.safetensors", metadata={"format": "pt"})
    [note] = fuse(folder / "whole0", tmp_path / "out", a=part)["notes"]
    assert re.search(rf"lacks in their place: .*{re.escape(name)}", note)


IMPORTED = """
import sys
from fusionlab.__main__ import main
assert main(sys.argv[1:]) == 0
modeling = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
assert not [name for name in modeling if not name.endswith(("modeling_auto",))], modeling
assert "peft" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vision tower of CLIP", "Llama", "T5's encoder"])
def test_no_model_class_is_imported(case: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved(case)
    inputs = ["--base", str(folder / "whole0"), "--finetuned.a", str(folder / "part1"), "--output", str(tmp_path / "o")]
    arguments = [sys.executable, "-c", IMPORTED, "fuse", *inputs, "--rule", "average"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["fusion.json", "fusionlab.json"])
def test_tangent_models_are_refused_with_the_reason(
    kind: str, saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("Llama")
    rename(folder / "whole1", tmp_path / "a", str)
    (tmp_path / "a" / kind).write_text(json.dumps({"linearization_point": "0" * 16}))
    arguments = ["--base", str(folder / "whole0"), "--finetuned.a", str(tmp_path / "a")]
    arguments += ["--output", str(tmp_path / "out")]
    assert main(["fuse", *arguments]) == 2
    assert "is a tangent model: it acts to first order about its base only" in capsys.readouterr().err

"""Pixels are those of the checkpoint's own processor: transformers' (either file), open_clip's, timm's; or refused."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    ViTConfig,
    ViTModel,
)

from fusionlab.backbones import ASSETS, OpenClipBackbone, TimmBackbone, load_backbone
from fusionlab.backbones.preprocessing import of_transformers
from fusionlab.data.images import ImageTasks
from fusionlab.data.pixels import decode, pixels
from fusionlab.errors import InputError
from fusionlab.evaluation.scores import evaluate
from fusionlab.modules import ClipModule

SIDE = 24


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Edges and gradients, as a photo has them, in colours, with half of it more or less transparent."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (max(2, height // 5), max(2, width // 5), 4), np.uint8)
    image = Image.fromarray(small, "RGBA").resize((width, height), Image.Resampling.NEAREST)
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    if mode == "P with transparency":
        found = image.convert("RGB").quantize(16)
        found.info["transparency"] = 3
        return found
    return image.convert("RGB").quantize(32) if mode == "P" else image.convert("RGB").convert(mode)


PICTURES = {
    "wide": picture(97, 31), "tall": picture(23, 88), "very wide": picture(301, 20), "tiny": picture(5, 3),
    "one pixel": picture(1, 1), "square": picture(SIDE, SIDE), "large": picture(130, 117), "odd": picture(35, 24),
    "grey": picture(40, 61, "L"), "palette": picture(61, 40, "P"), "alpha": picture(50, 33, "RGBA"),
    "grey alpha": picture(33, 50, "LA"), "palette with transparency": picture(44, 70, "P with transparency"),
    "one bit": picture(41, 41, "1"), "cmyk": picture(30, 47, "CMYK"),
}  # fmt: skip
EDGE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SQUASH = {"size": {"height": SIDE, "width": SIDE}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIP", EDGE),
    "clip, numbers for sizes": ("CLIP", {"size": SIDE, "crop_size": SIDE}),
    "clip, larger than its crop": ("CLIP", EDGE | {"size": {"shortest_edge": SIDE + 9}}),
    "clip, smaller than its crop": ("CLIP", EDGE | {"size": {"shortest_edge": SIDE - 9}}),
    "clip, cropped only": ("CLIP", EDGE | {"do_resize": False}),
    "clip, squashed": ("CLIP", SQUASH | {"do_center_crop": False}),
    "clip, bilinear": ("CLIP", EDGE | {"resample": 2}),
    "clip, lanczos": ("CLIP", EDGE | {"resample": 1}),
    "clip, own mean": ("CLIP", EDGE | {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 0.5, 2.0]}),
    "clip, not normalised": ("CLIP", EDGE | {"do_normalize": False}),
    "clip, not rescaled": ("CLIP", EDGE | {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3}),
    "clip, neither": ("CLIP", EDGE | {"do_rescale": False, "do_normalize": False}),
    "clip, other factor": (
        "CLIP",
        EDGE | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3},
    ),
    "vit": ("ViT", SQUASH),
    "vit, bicubic": ("ViT", SQUASH | {"resample": 3}),
    "vit, one number": ("ViT", {"size": SIDE}),
    "vit, nearest": ("ViT", SQUASH | {"resample": 0}),
    "vit, imagenet": ("ViT", SQUASH | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
    "siglip": ("Siglip", SQUASH),
    "deit": ("DeiT", {"size": {"height": 28, "width": 28}, "crop_size": {"height": SIDE, "width": SIDE}}),
    "bit": ("Bit", EDGE),
    "blip": ("Blip", SQUASH),
    "chinese clip": ("ChineseCLIP", EDGE),
}


def saved(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    getattr(transformers, f"{kind}ImageProcessor")(**settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_pil_processor(tmp_path: Path, case: str) -> None:
    kind, settings = PROCESSORS[case]
    folder = saved(tmp_path, kind, settings)
    how = of_transformers(str(folder), kind, SIDE)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil", do_convert_rgb=True)
    for name, image in PICTURES.items():
        ours = pixels(image, how)
        raw = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        assert ours.shape == raw.shape == (3, SIDE, SIDE), name
        assert np.abs(ours.astype(int) - raw).max() <= 1, name
        values = torch.from_numpy(ours) / how.divisor - torch.tensor(how.mean)[:, None, None]
        values = (values / torch.tensor(how.std)[:, None, None]).numpy()
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        step = 1 / how.divisor / min(how.std)
        assert np.abs(values - expected).max() <= step * 1.01, name


@pytest.mark.parametrize("kind", ["CLIP", "ViT", "Siglip"])
def test_the_torchvision_processor_differs_by_two_of_255_at_most_on_photos(tmp_path: Path, kind: str) -> None:
    """Its antialiasing rounds between the two passes; on noise that is shrunk one way it is up to 15."""
    folder = saved(tmp_path, kind, EDGE if kind == "CLIP" else SQUASH)
    how = of_transformers(str(folder), kind, SIDE)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="torchvision")
    assert theirs.backend == "torchvision"
    for name in ("wide", "tall", "tiny", "square", "large", "odd"):
        smooth = PICTURES[name].resize((9, 9)).resize(PICTURES[name].size, Image.Resampling.BICUBIC)
        raw = theirs(smooth, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        difference = np.abs(pixels(smooth, how).astype(int) - raw)
        assert difference.max() <= 2, name
        assert difference.mean() <= 0.5, name


# models as their libraries save them

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP without an image processor."""
    folder = tmp_path_factory.mktemp("clip")
    vision = TOWER | {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    tokenizer = CLIPTokenizerFast.from_pretrained(ASSETS / "tiny-clip")
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copied(folder: Path, target: Path, **files: Any) -> Path:
    shutil.copytree(folder, target)
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


OWN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}


def test_a_clip_of_transformers_5_has_its_own_mean_size_and_filter(clip: Path, tmp_path: Path) -> None:
    folder = copied(clip, tmp_path / "model")
    image_processor = transformers.CLIPImageProcessor(**EDGE, **OWN, resample=2)
    CLIPProcessor(image_processor, CLIPTokenizerFast.from_pretrained(folder)).save_pretrained(folder)
    assert (folder / "processor_config.json").exists()
    assert not (folder / "preprocessor_config.json").exists()
    check_backbone(folder)


def test_either_file_gives_the_scores_of_its_own_mean(tmp_path: Path) -> None:
    """A model whose pixels are rescaled by its processor alone, as a CLIP of transformers 5 and as an older one."""
    data = ImageTasks(["signs"], max_samples=100, image_size=32)
    data.setup("test")
    values = {}
    for case in ("embedded", "processor_config", "preprocessor_config"):
        folder = copied(ASSETS / "tiny-clip", tmp_path / case)
        content = json.loads((folder / "preprocessor_config.json").read_text())
        if case != "embedded":
            (folder / "preprocessor_config.json").unlink()
            content |= {"image_mean": [2.0] * 3, "image_std": [0.5] * 3}
            said = {"image_processor": content} if case == "processor_config" else content
            (folder / f"{case}.json").write_text(json.dumps(said))
        module = ClipModule(str(folder))
        module.prepare_tasks(data.tasks)
        values[case] = evaluate(module, data, ["signs"], "test")[0]["value"]
    assert values["processor_config"] == values["preprocessor_config"] < values["embedded"] - 0.1


@pytest.mark.parametrize("case", ["older", "both, the newer counts", "newer without images", "a feature extractor"])
def test_the_file_that_transformers_reads(clip: Path, tmp_path: Path, case: str) -> None:
    old = transformers.CLIPImageProcessor(**EDGE, **OWN).to_dict() | {"image_processor_type": "CLIPImageProcessor"}
    old = json.loads(json.dumps(old, default=dict))
    other = old | {"image_mean": [0.9] * 3}
    if case == "a feature extractor":
        old |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE}
        del old["image_processor_type"]
    files: dict[str, Any] = {"preprocessor_config": old}
    if case.startswith("both"):
        files = {"preprocessor_config": other, "processor_config": {"image_processor": old}}
    elif case.startswith("newer"):
        files["processor_config"] = {"processor_class": "CLIPProcessor"}
    check_backbone(copied(clip, tmp_path / "model", **files))


def check_backbone(folder: Path) -> None:
    """What the model sees of a file through the package is what the processor gives; the export keeps the files."""
    backbone = load_backbone(str(folder))
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    step = 1 / backbone.preprocessing.divisor / min(backbone.preprocessing.std)
    assert backbone.mean.flatten().tolist() == pytest.approx(OWN["image_mean"])
    for image in (PICTURES["wide"], PICTURES["tall"], PICTURES["alpha"]):
        ours = torch.from_numpy(decode(encoded(image), backbone.preprocessing))
        expected = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert (backbone.pixel_values(ours) - expected).abs().max() <= step * 1.01
    exported = folder.parent / "exported"
    exported.mkdir()
    backbone.save_files(exported)
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert (exported / name).exists() == (folder / name).exists()
        if (folder / name).exists():
            assert (exported / name).read_text() == (folder / name).read_text()


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_model_without_a_file_is_exported_with_what_it_was_run_by(clip: Path, tmp_path: Path, kind: str) -> None:
    folder = clip
    if kind == "vit":
        folder = tmp_path / "vit"
        ViTModel(ViTConfig(**TOWER, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    backbone = load_backbone(str(folder))
    exported = tmp_path / "exported"
    exported.mkdir()
    backbone.save_files(exported)
    theirs = AutoImageProcessor.from_pretrained(exported, backend="pil")
    for image in (PICTURES["wide"], PICTURES["large"], PICTURES["grey"]):
        ours = backbone.pixel_values(torch.from_numpy(pixels(image, backbone.preprocessing)))
        assert (ours - theirs(image, return_tensors="pt")["pixel_values"][0]).abs().max() < 0.02


def test_decoded_images_are_kept_by_how_they_are_decoded(clip: Path, tmp_path: Path) -> None:
    for index, (name, image) in enumerate([("a", PICTURES["wide"]), ("b", PICTURES["tall"])] * 2):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "set" / name / f"{index}.png")
    found = {}
    for case in ("clip", "clip, squashed", "clip, bilinear"):
        folder = copied(clip, tmp_path / case)
        saved(folder, *PROCESSORS[case])
        task = {"name": "own", "path": str(tmp_path / "set"), "train": "train[:1]", "test": "train[1:]"}
        data = ImageTasks([task], cache_dir=str(tmp_path / "cache"))
        module = type("Module", (), {"backbone": load_backbone(str(folder))})
        data.trainer = type("Trainer", (), {"lightning_module": module})  # type: ignore[assignment]
        data.setup("test")
        found[case] = data.splits["own"]["test"].batch(torch.arange(3))["images"]
        theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
        image = Image.open(tmp_path / "set/b/1.png")
        raw = theirs(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        assert (found[case].int() - raw).abs().amax(dim=(1, 2, 3)).min() <= 1
    assert not found["clip"].equal(found["clip, squashed"])
    assert not found["clip"].equal(found["clip, bilinear"])


REFUSED = {
    "another processor": (
        {"image_processor_type": "ConvNextImageProcessor"},
        "is a ConvNextImageProcessor; expected one",
    ),
    "a key with an effect": ({"do_pad": True}, r"asks for what is not done here: do_pad: true; remove it"),
    "an unknown key": ({"do_magic": 3, "crop_pct": 0.9}, r"not done here: do_magic: 3, crop_pct: 0\.9"),
    "channels last": ({"data_format": "channels_last"}, r'data_format: "channels_last"'),
    "own code": ({"auto_map": {"AutoImageProcessor": "code.Own"}}, r'AutoImageProcessor: "code\.Own"'),
    "the longest edge": ({"size": {"longest_edge": SIDE}}, r"CLIP|size"),
    "both edges": ({"size": {"shortest_edge": SIDE, "longest_edge": 99}}, r"does not make square images of one size"),
    "oblong": ({"size": {"height": SIDE, "width": 99}, "do_center_crop": False}, r"does not make square images"),
    "an oblong crop": ({"crop_size": {"height": SIDE, "width": 9}}, r"does not make square images: crop_size"),
    "no crop": ({"do_center_crop": False}, r"does not make square images of one size: size .*crop_size None"),
    "another size than the model": ({"crop_size": 99}, r"makes images of 99 pixels, and the model takes 24; mend one"),
    "two means": ({"image_mean": [0.5, 0.5]}, r"image_mean has 2 values, expected one for each"),
    "no deviation": ({"image_std": [0.5, 0.0, 0.5]}, r"image_std is 0, expected another number"),
    "no factor": ({"rescale_factor": 0.0}, r"rescale_factor is 0"),
    "a text for a number": ({"resample": "bicubic"}, r"resample: expected .*, got 'bicubic'"),
    "a text for a size": ({"size": "large"}, r"size: expected .*, got 'large'"),
    "a filter that is not there": ({"resample": 9}, r"resample: expected .*, got 9"),
}


@pytest.mark.parametrize("name", ["processor_config", "preprocessor_config"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused_by_name(clip: Path, tmp_path: Path, case: str, name: str) -> None:
    change, message = REFUSED[case]
    content = {"image_processor_type": "CLIPImageProcessor", **EDGE, **change}
    files = {name: {"image_processor": content} if name == "processor_config" else content}
    with pytest.raises(InputError) as caught:
        load_backbone(str(copied(clip, tmp_path / "model", **files)))
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("content", ["{", "[]", '{"image_processor": 3}'])
def test_a_broken_file_is_refused(clip: Path, tmp_path: Path, content: str) -> None:
    folder = copied(clip, tmp_path / "model")
    (folder / "processor_config.json").write_text(content)
    with pytest.raises(InputError, match=r"processor_config\.json"):
        load_backbone(str(folder))


def test_keys_without_effect_pass(clip: Path, tmp_path: Path) -> None:
    content = {"image_processor_type": "CLIPImageProcessorFast", **EDGE, "do_pad": None, "pad_size": None}
    content |= {
        "processor_class": "CLIPProcessor",
        "device": None,
        "_valid_processor_keys": ["images"],
        "do_thumbnail": False,
    }
    load_backbone(str(copied(clip, tmp_path / "model", preprocessor_config=content)))


def test_an_image_of_another_size_is_named_where_nothing_resizes(clip: Path, tmp_path: Path) -> None:
    content = {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False}
    backbone = load_backbone(str(copied(clip, tmp_path / "model", preprocessor_config=content)))
    assert pixels(PICTURES["square"], backbone.preprocessing).shape == (3, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"it is 97 x 31 pixels, and is not to be resized to 24 x 24"):
        pixels(PICTURES["wide"], backbone.preprocessing)


# open_clip and timm

OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def open_clip_folder(folder: Path, preprocess: dict[str, Any]) -> Path:
    folder.mkdir()
    model = open_clip.CLIP(**json.loads(json.dumps(OPEN_CLIP)))
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash", "interpolation": "bilinear", **{"mean": [0.5] * 3, "std": [0.5] * 3}},
        {"resize_mode": "longest"},
        {"resize_mode": "longest", "fill_color": 255, "interpolation": "bilinear"},
        {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]},
    ],
    ids=str,
)
def test_pixels_are_those_of_open_clip(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = open_clip_folder(tmp_path / "model", settings)
    backbone = load_backbone(str(folder))
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert isinstance(backbone, OpenClipBackbone)
    step = 1 / 255 / min(backbone.preprocessing.std)
    for name, image in PICTURES.items():
        ours = backbone.pixel_values(torch.from_numpy(pixels(image, backbone.preprocessing)))
        assert (ours - theirs(image)).abs().max() <= step * 1.01, name
    exported = tmp_path / "exported"
    exported.mkdir()
    backbone.save_files(exported)
    written = json.loads((exported / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert written | settings == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_mode": "stretch"}, 'resize_mode: "stretch"'),
        ({"interpolation": "lanczos"}, 'interpolation: "lanczos"'),
        ({"crop_pct": 0.9}, r"crop_pct: 0\.9"),
        ({"mode": "L"}, 'mode: "L"'),
        ({"mean": [0.5, 0.5]}, "mean has 2 values"),
    ],
)
def test_what_open_clip_says_else_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_backbone(str(open_clip_folder(tmp_path / "model", change)))


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_pct": 0.9, "interpolation": "bicubic"},
        {"crop_pct": 1.0, "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"crop_pct": 0.8, "crop_mode": "squash"},
        {"crop_pct": 0.95, "crop_mode": "border", "mean": (0.2, 0.4, 0.6)},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "lanczos"},
    ],
    ids=str,
)
def test_pixels_are_those_of_timm(settings: dict[str, Any]) -> None:
    overlay = {"input_size": (3, 32, 32), **settings}
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, pretrained_cfg_overlay=overlay
    )
    backbone = TimmBackbone(model, name="timm", model_args={})
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    step = 1 / 255 / min(backbone.preprocessing.std)
    for name, image in PICTURES.items():
        ours = backbone.pixel_values(torch.from_numpy(pixels(image, backbone.preprocessing)))
        assert (ours - theirs(image.convert("RGB"))).abs().max() <= step * 1.01, name

"""How an image becomes what a checkpoint takes, as its own files say: transformers', open_clip's and timm's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fusionlab.errors import InputError, name_list
from fusionlab.foreign import ImageProcessor, Processor, read_json

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
_FILES = PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
# transformers' processors that do nothing but resize, crop, rescale and normalise
_PLAIN = ("CLIP", "ViT", "Siglip", "DeiT", "Bit", "Blip", "ChineseCLIP")
_READ = ("do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size", "do_rescale")
_READ += ("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
_NEUTRAL = ("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "device")
_NEUTRAL += ("_valid_processor_keys", "_valid_kwargs_names", "input_data_format", "return_tensors", "disable_grouping")
_NEUTRAL += ("image_seq_length", "model_input_names")

Resize = Literal["shortest", "longest", "squash", "none"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the pixels and values that a model takes; by default CLIP's own way.

    Args:
        image_size: side of the square result in pixels.
        resize: ``shortest`` makes the shorter side ``resize_to`` and keeps the proportions, ``longest`` the longer one;
            ``squash`` makes both sides so; ``none`` leaves the image as it is.
        resize_to: in pixels; ``image_size`` by default.
        resample: Pillow's number of the filter.
        crop: cut out the centre, or pad around the image, where it is not of ``image_size`` then.
        fill: red, green and blue of what is padded.
        crop_rounds: half a pixel ``down``, as transformers does, or to ``even``, as torchvision does.
        resize_in_rgb: convert to RGB before all else, and not after it, as open_clip does.
        transparency: laid on ``white``, or ``dropped``.
        divisor: what pixels 0..255 are divided by.
        mean: subtracted per channel then.
        std: per channel, what it is divided by then.
    """

    image_size: int
    resize: Resize = "shortest"
    resize_to: int | None = None
    resample: int = _RESAMPLE["bicubic"]
    crop: bool = True
    fill: tuple[int, int, int] = (0, 0, 0)
    crop_rounds: Literal["down", "even"] = "even"
    resize_in_rgb: bool = True
    transparency: Literal["white", "dropped"] = "white"
    divisor: float = 255.0
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    @property
    def key(self) -> str:
        """What tells pixels by these settings from others of their size; empty for the default settings."""
        pixels = replace(self, divisor=255.0, mean=OPENAI_MEAN, std=OPENAI_STD, resize_to=self.resized_side)
        if pixels == Preprocessing(self.image_size, resize_to=self.image_size):
            return ""
        return hashlib.sha256(repr(pixels).encode()).hexdigest()[:16]

    @property
    def resized_side(self) -> int:
        """What a side is resized to."""
        return self.resize_to or self.image_size

    def to_transformers(self, kind: str) -> str:
        """The content of a ``preprocessor_config.json`` that says the same, for a processor of ``kind``."""
        side = {"height": self.image_size, "width": self.image_size}
        resized = dict.fromkeys(side, self.resized_side)
        settings: dict[str, Any] = {
            "image_processor_type": f"{kind}ImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize != "none",
            "size": {"shortest_edge": self.resized_side} if self.resize == "shortest" else resized,
            "resample": self.resample,
            "do_center_crop": self.crop,
            "do_rescale": True,
            "rescale_factor": 1 / self.divisor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        return json.dumps(settings | ({"crop_size": side} if self.crop else {}), indent=2) + "\n"


def processor_files(source: str) -> dict[str, str]:
    """The files of a checkpoint in transformers' format that say how images are processed, by name; as they are."""
    return {name: path.read_text(encoding="utf-8") for name, path in _paths(source).items()}


def of_transformers(source: str, kind: str, image_size: int) -> Preprocessing:
    """The settings of a checkpoint in transformers' format, by the file that transformers reads.

    Pixels are then those of the PIL-backed processor, bit for bit. The torchvision-backed one, which transformers
    prefers, rounds between its two passes: at most 2 of 255 apart on photos, 15 on noise that is shrunk one way only.

    Args:
        source: folder or hub id.
        kind: of processor, ``CLIP`` or ``ViT``, where the files do not say.
        image_size: the side of the images that the model takes.

    Raises:
        InputError: a processor, key or value that is not done here, or one that does not fit the model; by name.
    """
    said, where = _said(source), f"the image processor of {source!r}"
    called = str(said.get("image_processor_type") or said.get("feature_extractor_type") or f"{kind}ImageProcessor")
    called = called.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if called.removesuffix("ImageProcessor") not in _PLAIN:
        raise InputError(
            f"{where} is a {called}; expected one that does nothing but resize, crop, rescale and normalise: "
            f"{name_list((f'{each}ImageProcessor' for each in _PLAIN), 9)}"
        )
    _refuse_other_keys(said, where)
    values = _with_defaults(said, called, image_size)
    found = _geometry(values, where, image_size)
    if values["do_rescale"]:
        found = replace(found, divisor=1 / _nonzero(values["rescale_factor"], "rescale_factor", where))
    else:
        found = replace(found, divisor=1.0)
    if not values["do_normalize"]:
        return replace(found, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    mean, std = (_channels(values[key], key, where) for key in ("image_mean", "image_std"))
    return replace(found, mean=mean, std=tuple(_nonzero(value, "image_std", where) for value in std))


def _paths(source: str) -> dict[str, Path]:
    if Path(source).is_dir():
        paths = {name: Path(source) / name for name in _FILES}
        return {name: path for name, path in paths.items() if path.is_file()}
    from transformers.utils import cached_file

    cached = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in _FILES}
    return {name: Path(path) for name, path in cached.items() if path is not None}


def _said(source: str) -> dict[str, Any]:
    """The image processor's keys: of ``processor_config.json`` where that has them, else of the older file."""
    paths = _paths(source)
    if PROCESSOR in paths:
        inner = read_json(paths[PROCESSOR], Processor).get("image_processor")
        if inner is not None:
            return dict(inner)
    return read_json(paths[PREPROCESSOR], ImageProcessor) if PREPROCESSOR in paths else {}


def _refuse_other_keys(said: Mapping[str, Any], where: str) -> None:
    other = {key: value for key, value in said.items() if key not in (*_READ, *_NEUTRAL) and value not in (None, False)}
    code = other.pop("auto_map", {})
    other |= {key: value for key, value in code.items() if key in ("AutoImageProcessor", "AutoFeatureExtractor")}
    if other.get("data_format") == "channels_first":
        del other["data_format"]
    if other:
        asked = name_list(f"{key}: {json.dumps(value)}" for key, value in other.items())
        raise InputError(f"{where} asks for what is not done here: {asked}; remove it, or give another checkpoint")


def _with_defaults(said: Mapping[str, Any], called: str, image_size: int) -> dict[str, Any]:
    """The keys that are read, with the processor's own defaults, and the model's size, where they are not given."""
    import transformers

    processor = getattr(transformers, called)
    values = {key: said[key] if said.get(key) is not None else getattr(processor, key, None) for key in _READ}
    if said.get("size") is None:
        values["size"] = dict.fromkeys(processor.size, image_size)
    if said.get("crop_size") is None:
        values["crop_size"] = image_size
    return values


def _geometry(values: Mapping[str, Any], where: str, image_size: int) -> Preprocessing:
    """What is done to the pixels: resize and crop."""
    crop = _sides(values["crop_size"], "crop_size", where) if values["do_center_crop"] else {}
    size = _sides(values["size"], "size", where, values["default_to_square"]) if values["do_resize"] else {}
    if set(size) == {"shortest_edge"} and crop:
        resize, resize_to = "shortest", size["shortest_edge"]
    elif set(size) == {"height", "width"} and size["height"] == size["width"]:
        resize, resize_to = "squash", size["height"]
    elif not size:
        resize, resize_to = "none", image_size
    else:
        raise InputError(f"{where} does not make square images of one size: size {size}, crop_size {crop or None}")
    if len(set(crop.values())) > 1:
        raise InputError(f"{where} does not make square images: crop_size {crop}")
    side = crop.get("height", resize_to)
    if side != image_size:
        raise InputError(f"{where} makes images of {side} pixels, and the model takes {image_size}; mend one of them")
    return Preprocessing(
        image_size,
        resize=resize,
        resize_to=resize_to,
        resample=int(values["resample"]),
        crop=bool(crop),
        crop_rounds="down",
    )


def _sides(value: Any, key: str, where: str, default_to_square: bool | None = True) -> dict[str, int]:
    from transformers.image_processing_utils import get_size_dict

    if isinstance(value, dict):
        value = {name: side for name, side in value.items() if side is not None}
    try:
        return dict(get_size_dict(value, default_to_square=bool(default_to_square), param_name=key))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _channels(value: Any, key: str, where: str) -> tuple[float, ...]:
    found = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    found = found * 3 if len(found) == 1 else found
    if len(found) != 3:
        raise InputError(f"{where}: {key} has {len(found)} values, expected one for each of red, green and blue")
    return tuple(map(float, found))


def _nonzero(value: float, key: str, where: str) -> float:
    if not value:
        raise InputError(f"{where}: {key} is 0, expected another number")
    return float(value)


def of_open_clip(config: Mapping[str, Any], image_size: int, where: str) -> Preprocessing:
    """The settings of open_clip's ``preprocess_cfg``: it resizes in the image's own mode and converts to RGB last.

    Raises:
        InputError: as :func:`check_open_clip`.
    """
    check_open_clip(config, where)
    resize = config.get("resize_mode") or "shortest"
    return Preprocessing(
        image_size,
        resize=resize,
        resample=_RESAMPLE["bilinear" if config.get("interpolation") == "bilinear" else "bicubic"],
        crop=resize != "squash",
        fill=(int(config.get("fill_color") or 0),) * 3,
        resize_in_rgb=False,
        transparency="dropped",
        mean=_channels(config.get("mean") or OPENAI_MEAN, "mean", where),
        std=_channels(config.get("std") or OPENAI_STD, "std", where),
    )


def check_open_clip(config: Mapping[str, Any], where: str) -> None:
    """Raise unless a ``preprocess_cfg`` asks only for what is done here; open_clip itself drops keys without a word.

    Raises:
        InputError: a key or value that is not done here; by name.
    """
    choices: dict[str, tuple[Any, ...]] = {
        "mode": (None, "RGB"),
        "resize_mode": (None, "shortest", "longest", "squash"),
        "interpolation": (None, "bicubic", "bilinear", "random"),
    }
    known = {*choices, "size", "mean", "std", "fill_color"}
    other = [
        f"{key}: {json.dumps(value)}"
        for key, value in config.items()
        if value is not None and (key not in known or value not in choices.get(key, (value,)))
    ]
    if other:
        raise InputError(f"the preprocess_cfg of {where} asks for what is not done here: {name_list(other)}; remove it")


def of_timm(config: Mapping[str, Any], image_size: int, where: str) -> Preprocessing:
    """The settings of timm's ``pretrained_cfg`` for evaluation, as its ``create_transform`` reads them.

    Raises:
        InputError: a value that is not done here; by name.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=dict(config))
    if config["interpolation"] not in _RESAMPLE:
        known = name_list(_RESAMPLE, 6)
        raise InputError(f"{where}: interpolation {config['interpolation']!r} is not done here, but {known}")
    mode = config["crop_mode"]
    mean = _channels(config["mean"], "mean", where)
    return Preprocessing(
        image_size,
        resize={"squash": "squash", "border": "longest"}.get(mode, "shortest"),
        resize_to=math.floor(image_size / config["crop_pct"]),
        resample=_RESAMPLE[config["interpolation"]],
        fill=tuple(round(255 * value) for value in mean) if mode == "border" else (0, 0, 0),
        transparency="dropped",
        mean=mean,
        std=_channels(config["std"], "std", where),
    )

"""CLIP in open_clip's format: by architecture and pretrained tag, architecture and local file, or a folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.adapters.fused_attention import SplitAttention, split_attention_
from fusionlab.backbones.clip import ClipBackbone
from fusionlab.backbones.preprocessing import check_open_clip, of_open_clip
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.foreign import read_json
from fusionlab.tensors.hub import open_clip_folder

CONFIG = "open_clip_config.json"
_HUB = "hf-hub:"
SCHEMAS = ("local-dir:", _HUB)


class OpenClipBackbone(ClipBackbone):
    """A frozen open_clip model with its tokenizer and pixel normalisation, behind the interface of transformers' CLIP.

    The image tower's fused attention is split into q, k and v, so that ``q_proj`` and ``v_proj`` are adapted as in
    transformers' models; adapters and weights are exported in the stock layout.

    Args:
        model: an open_clip model; its image tower is changed in place, with the same function.
        tokenizer: the matching tokenizer, texts to a tensor of token ids.
        name: what the user called the model; it goes into adapters and result rows.
        config: the architecture, as ``open_clip_config.json`` has it under ``model_cfg``.

    Raises:
        InputError: an image tower without transformer blocks, or with oblong images.
    """

    scope = "visual"
    full_scopes = ("visual",)

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str, config: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        split_attention_(model, self.scope)
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.name, self.config = tokenizer, name, config
        size = model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise InputError(f"the model {name!r} takes images of {height} x {width} pixels; expected square ones")
        self.preprocess_by(of_open_clip(model.visual.preprocess_cfg, int(height), name))
        self.default_target_modules = _attention_targets(model.visual, name)
        self._checked_prompts = set()

    @classmethod
    def load(cls, source: str, *, name: str) -> OpenClipBackbone:
        """Load in float32.

        Args:
            source: ``ARCHITECTURE:TAG``, ``ARCHITECTURE:FILE``, ``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``, or a
                folder with ``open_clip_config.json``.
            name: what the user called it.

        Raises:
            InputError: an unknown architecture or tag, no such file or folder, or weights that do not fit.
        """
        import open_clip

        if source.startswith(_HUB):
            source = f"local-dir:{open_clip_folder(source.removeprefix(_HUB))}"
        elif Path(source).expanduser().is_dir():
            source = f"local-dir:{Path(source).expanduser()}"
        architecture, pretrained = _parse(source)
        if source.startswith(SCHEMAS):
            check_open_clip(_preprocess_cfg(source), repr(name))
        overrides = {} if pretrained is None else _activation(architecture, pretrained)
        try:
            config = copy.deepcopy(open_clip.get_model_config(architecture))
            model = open_clip.create_model(architecture, pretrained, require_pretrained=True, **overrides)
            tokenizer = open_clip.get_tokenizer(architecture)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise InputError(f"the open_clip model {name!r} could not be loaded: {str(error)[:500]}") from error
        config |= {"quick_gelu": True} if overrides else {}
        return cls(model, tokenizer, name=name, config=config)

    @property
    def encoder(self) -> nn.Module:
        """The part that is adapted and fused: the image tower."""
        return self.model.visual

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features beside weights and images."""
        return {"network": self.config, "kind": "open_clip", "preprocessing": asdict(self.preprocessing)}

    def image_features(self, images: Tensor) -> Tensor:
        """Unnormalised image features.

        Args:
            images: uint8, shape ``(batch, 3, image_size, image_size)``.

        Returns:
            shape ``(batch, dim)``.
        """
        return self.model.encode_image(self.pixel_values(images))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Normalised text features, shape ``(len(texts), dim)``."""
        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size])).to(self.mean.device)
            rows.append(F.normalize(self.model.encode_text(tokens), dim=-1))
        return torch.cat(rows)

    def tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each text as the text tower reads them, and whether the text has more than it reads."""
        length = self.max_text_tokens + max(len(text.encode()) for text in texts)  # no text has a token more
        *whole, empty = self.tokenizer([*texts, ""], context_length=length).split(1)
        padded = self.tokenizer(list(texts))
        expected = F.pad(padded, (0, length - padded.shape[1]), value=int(empty[0, -1]))
        return padded.tolist(), (torch.cat(whole) != expected).any(dim=1).tolist()

    @property
    def max_text_tokens(self) -> int:
        """Tokens of a text that the text tower reads."""
        return int(self.model.context_length)

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside weights, so that ``local-dir:`` loads the folder: configuration and tokenizer."""
        known = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        preprocess = {key: value for key, value in self.model.visual.preprocess_cfg.items() if key in known}
        (folder / CONFIG).write_text(json.dumps({"model_cfg": self.config, "preprocess_cfg": preprocess}, indent=2))
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)


def is_open_clip(name: str) -> bool:
    """Whether ``name`` asks for open_clip: a schema, ``ARCHITECTURE:...``, or a folder in its format alone."""
    if name.startswith(SCHEMAS):
        return True
    path = Path(name).expanduser()
    if path.is_dir():
        return (path / CONFIG).is_file() and not (path / "config.json").is_file()
    return ":" in name and not name.startswith((".", "/", "~"))


def _parse(source: str) -> tuple[str, str | None]:
    """``(architecture or schema, tag or file)``."""
    import open_clip

    if source.startswith(SCHEMAS):
        folder = Path(source.partition(":")[2])
        if source.startswith("local-dir:") and not (folder / CONFIG).is_file():
            raise InputError(f"no {CONFIG} in {str(folder)!r}; give a folder in open_clip's format")
        return source, None
    architecture, _, pretrained = source.partition(":")
    if architecture not in open_clip.list_models():
        raise InputError(
            f"unknown open_clip architecture {architecture!r} in {source!r}; "
            f"{did_you_mean(architecture, open_clip.list_models())} Write ARCHITECTURE:TAG, as in ViT-B-32:openai."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained not in tags and not Path(pretrained).expanduser().is_file():
        raise InputError(
            f"{pretrained!r} is neither a pretrained tag of {architecture} nor a file; {did_you_mean(pretrained, tags)}"
        )
    return architecture, pretrained if pretrained in tags else str(Path(pretrained).expanduser())


def _preprocess_cfg(source: str) -> dict[str, Any]:
    """What a folder says in its own configuration."""
    return read_json(Path(source.partition(":")[2]) / CONFIG).get("preprocess_cfg") or {}


def _activation(architecture: str, pretrained: str) -> dict[str, bool]:
    """QuickGELU where the tag was trained with it: open_clip alone warns and computes other features."""
    import open_clip

    wanted = open_clip.get_pretrained_cfg(architecture, pretrained).get("quick_gelu", False)
    has = open_clip.get_model_config(architecture).get("quick_gelu", False)
    return {"force_quick_gelu": True} if wanted and not has else {}


def _attention_targets(visual: nn.Module, name: str) -> tuple[str, ...]:
    """The layers adapted by default: q and v where attention was split, timm's joint ``qkv`` layers else."""
    modules = dict(visual.named_modules())
    if any(isinstance(module, SplitAttention) for module in modules.values()):
        return ("q_proj", "v_proj")
    if any(isinstance(module, nn.Linear) and path.endswith(".qkv") for path, module in modules.items()):
        return ("qkv",)
    kinds = sorted({type(module).__name__ for module in modules.values()})
    raise InputError(f"the image tower of {name!r} has no attention that can be adapted (it has {name_list(kinds, 8)})")

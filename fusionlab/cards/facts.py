"""What is known of a folder of weights: what it says of itself, and what its maker tells beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError
from fusionlab.files import is_there
from fusionlab.foreign import ModelConfig, PeftConfig, read_json
from fusionlab.foreign.cards import card_head
from fusionlab.layout import ADAPTER_CONFIG, CARD
from fusionlab.tensors.hub import embedded, is_hub_id
from fusionlab.tensors.records import own_record

_OPEN_CLIP, _TRANSFORMERS = "open_clip_config.json", "config.json"
_HUB_SCHEME = "hf-hub:"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_BY_TYPE = {"clip": "CLIPModel", "vit": "ViTModel"}  # where a configuration names no class
# what the hub calls what a model does, where its base does not say it
_PIPELINES = {
    "clip": "zero-shot-image-classification",
    "vit": "image-feature-extraction",
    "timm": "image-feature-extraction",
    "open_clip": "zero-shot-image-classification",
    "t5": "text-generation",
}


@dataclass(frozen=True)
class DataSet:
    """Where a task's samples are on the hub.

    Args:
        path: the set's id.
        config: its configuration.
        revision: its commit or tag.
    """

    path: str
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Origin:
    """What a folder of weights does not say of itself.

    Args:
        base: what the user called the base.
        base_folder: the base's own folder, None where it has none here.
        name: of the model, the card's title; the folder's own name by default.
        datasets: by task, for tasks whose samples are on the hub.
        recipe: how it was trained, as names and values.
        rows: result rows of the run, of which those of this model and of what it is compared with are shown.
        models: the models that were fused, by task, as the user called them.
    """

    base: str
    base_folder: Path | None = None
    name: str = ""
    datasets: Mapping[str, DataSet] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """All that a card tells.

    Args:
        origin: what the maker told.
        record: what the folder says of itself in ``fusion.json`` or ``fusionlab.json``.
        adapter: its ``adapter_config.json``; None for full weights.
        config: the configuration of the network, for an adapter the base's; empty where there is none.
    """

    origin: Origin
    record: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    config: Mapping[str, Any]
    is_open_clip: bool

    @classmethod
    def of(cls, folder: Path, origin: Origin) -> Facts:
        """What ``folder`` and its maker say."""
        adapter = read_json(folder / ADAPTER_CONFIG, PeftConfig) if is_there(folder / ADAPTER_CONFIG) else None
        record = own_record(folder)
        over_base = adapter is not None or record.get("masks") or record.get("routed")
        network = origin.base_folder if over_base else folder
        config, is_open_clip = {}, network is None and (":" in origin.base and not origin.base.startswith("timm:"))
        if network is not None and is_there(network / _TRANSFORMERS):
            config = read_json(network / _TRANSFORMERS, ModelConfig)
        elif network is not None and is_there(network / _OPEN_CLIP):
            is_open_clip = True
        return cls(origin, record, adapter, config, is_open_clip)

    @property
    def row(self) -> Mapping[str, Any]:
        """What a result row says of the model: kind, rule, method."""
        return self.record.get("row") or {}

    @property
    def is_fused(self) -> bool:
        """Whether it was fused of several."""
        return self.row.get("model") == "fused"

    @property
    def is_linearized(self) -> bool:
        """Whether the weights act to first order about the base only."""
        return bool(self.record.get("linearization_point"))

    @property
    def masks(self) -> Mapping[str, Any]:
        """What it says of masks of one vector, of which each task has its own weights; empty for other weights."""
        return self.record.get("masks") or {}

    @property
    def routed(self) -> Mapping[str, Any]:
        """What it says of experts and routers, of which each sample has its own weights; empty for other weights."""
        return self.record.get("routed") or {}

    @property
    def method(self) -> str:
        """How it was fine-tuned, empty where that is not known."""
        return str(self.row.get("method") or (self.record.get("method") if self.adapter is not None else None) or "")

    @property
    def base_id(self) -> str | None:
        """The base by the name that others know it by, without a revision; None for a local folder or file."""
        name = self.origin.base.removeprefix(_HUB_SCHEME)
        if embedded(name) is not None:
            return name
        return name.partition("@")[0] if is_hub_id(name) else None

    @property
    def base_shown(self) -> str:
        """The base as a reader elsewhere may be told it: no path of this machine."""
        return self.origin.base if self.base_id or not _is_path(self.origin.base) else Path(self.origin.base).name

    @property
    def kind(self) -> str:
        """The kind of network, as configurations call it; empty where none is known."""
        if self.is_open_clip:
            return "open_clip"
        is_timm = "pretrained_cfg" in self.config or self.origin.base.startswith("timm:")
        return "timm" if is_timm else str(self.config.get("model_type") or "")

    @property
    def transformers_class(self) -> str | None:
        """The class of transformers that loads the network; None where it is not transformers', or not known."""
        if self.kind == "t5":
            return "AutoModelForSeq2SeqLM"
        name = (self.config.get("architectures") or [None])[0] or _BY_TYPE.get(self.kind)
        if name is None or self.kind in ("open_clip", "timm", ""):
            return None
        return "AutoModelForCausalLM" if str(name).endswith(_CAUSAL) else str(name)

    @property
    def base_card(self) -> Mapping[str, Any]:
        """The metadata of the base's own card; empty where it has none that can be read."""
        return self._base_card[0]

    @property
    def card_problem(self) -> str:
        """Why the base's own card is not known."""
        return self._base_card[1]

    @cached_property
    def _base_card(self) -> tuple[Mapping[str, Any], str]:
        folder = self.origin.base_folder
        if folder is None or not is_there(folder / CARD):
            return {}, "the base came without a card"
        try:
            return card_head(folder / CARD), ""
        except InputError:  # the model is none the worse for it; the message would show a path of this machine
            return {}, "the base's card has no metadata that can be read"

    @property
    def pipeline(self) -> str | None:
        """What the hub calls what the model does, as its base says it; None where that is not known."""
        if said := self.base_card.get("pipeline_tag"):
            return str(said)
        causal = self.transformers_class == "AutoModelForCausalLM"
        return "text-generation" if causal else _PIPELINES.get(self.kind)

    def scores(self) -> list[Mapping[str, Any]]:
        """The rows of this model, each once."""
        key = "rule" if self.is_fused else "finetuned_on"
        of_model = (self.row.get("model"), self.row.get(key))
        return [
            row for row in self.origin.rows
            if (row["model"], row[key]) == of_model and row.get("denominator") != "full" and None not in of_model
        ]  # fmt: skip

    def compared(self, row: Mapping[str, Any], model: str) -> Mapping[str, Any] | None:
        """The row of the ``pretrained`` model, or of the one ``finetuned`` on the same task alone."""
        same = {"model": model, "finetuned_on": row["task"] if model == "finetuned" else None}
        same |= {key: row[key] for key in ("task", "split", "metric")}
        return next((each for each in self.origin.rows if all(each[key] == same[key] for key in same)), None)


def _is_path(name: str) -> bool:
    return "/" in name or Path(name).expanduser().exists()

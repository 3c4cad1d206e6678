"""Schemas of files that others wrote: the types of the fields that are read here; other fields pass."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Rows = Annotated[tuple[NonNegativeInt, PositiveInt], Field(strict=False)]


class Schema(BaseModel):
    """Types of fields; others pass. Nothing is converted."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class PeftConfig(Schema):
    """``adapter_config.json`` of a LoRA adapter, as PEFT writes it."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    inference_mode: bool | None = None
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    rank_pattern: dict[Pattern, PositiveInt] | None = None
    alpha_pattern: dict[Pattern, FiniteFloat] | None = None
    use_rslora: bool | None = None
    lora_dropout: Share | None = None
    target_modules: list[str] | Pattern | None = None
    exclude_modules: list[str] | Pattern | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    layer_replication: list[Any] | None = None
    init_lora_weights: bool | str | None = None
    bias: str = "none"
    lora_bias: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    loftq_config: dict[str, Any] | None = None


class MasksRecord(Schema):
    """What ``fusion.json`` says of masks."""

    scales: dict[str, FiniteFloat]


class OwnRecord(Schema):
    """``fusionlab.json`` and ``fusion.json``: what this package wrote of an adapter or a model."""

    method: str = "lora"
    space: str = "delta_weight"
    a0_hash: str = ""
    seed: int | None = None
    base_hash: str | None = None
    linearization_point: str | None = None
    fused_attention: dict[str, dict[Literal["q_proj", "k_proj", "v_proj", "out_proj"], Rows]] = {}
    out_proj_counted: PositiveInt | None = None
    unpadded_ranks: dict[str, PositiveInt] = {}
    lora_alpha: dict[str, Annotated[tuple[FiniteFloat, bool], Field(strict=False)]] = {}
    cosines: dict[str, dict[str, FiniteFloat]] | None = None
    row: dict[str, Any] | None = None
    masks: MasksRecord | None = None


class RoutedRest(Schema):
    """What ``wemoe.json`` says of an adapter that acts on all but the MLPs."""

    method: Literal["lora", "l_lora"] = "lora"
    base_model: str = ""
    fused_attention: list[str] = []
    lora_alpha: dict[str, FiniteFloat]
    layouts: dict[str, Literal["linear", "transposed", "embedding", "convolution"]] = {}
    kernels: dict[str, list[PositiveInt]] = {}


class RoutedRecord(Schema):
    """``wemoe.json``: what the tensors beside it are."""

    schema_: Literal[1] = Field(alias="schema")
    tasks: list[str]
    mlps: dict[str, dict[str, bool]]
    ranks: dict[str, list[NonNegativeInt]] = {}
    rest: RoutedRest | None = None


class ResultRow(Schema):
    """A row of ``results.json``."""

    model: str
    method: str | None
    task: str
    split: str
    metric: str
    value: FiniteFloat
    num_samples: NonNegativeInt
    rule: str | None
    scaling_coefficients: dict[str, Any] | None
    fused_tasks: list[str] | None
    finetuned_on: str | None
    denominator: str | None
    data_version: str | None
    seed: int | None


class Results(Schema):
    """``results.json``."""

    rows: list[ResultRow]


class BegunConfig(Schema):
    """``config.yaml`` of a run, whose module and data may be of another package."""

    model: dict[str, Any]
    data: dict[str, Any] = {}
    seed_everything: int | None = None


class TrainedPart(Schema):
    """``trained.json`` of a run's part."""

    tasks: list[str]


class Measured(Schema):
    """One entry of ``fusion_stats.json``."""

    squared_norm: dict[str, list[FiniteFloat]]


class KeptStats(Schema):
    """``fusion_stats.json``."""

    task_vectors: dict[str, Measured]


class ModelConfig(Schema):
    """``config.json`` of transformers."""

    model_type: str | None = None
    architectures: list[str] | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] | None = None


class ImageProcessor(Schema):
    """``preprocessor_config.json`` of transformers, or the part of ``processor_config.json`` that is about images."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_resize: bool | None = None
    size: PositiveInt | list[PositiveInt] | dict[str, PositiveInt | None] | None = None
    default_to_square: bool | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None
    do_center_crop: bool | None = None
    crop_size: PositiveInt | list[PositiveInt] | dict[str, PositiveInt | None] | None = None
    do_rescale: bool | None = None
    rescale_factor: FiniteFloat | None = None
    do_normalize: bool | None = None
    image_mean: FiniteFloat | list[FiniteFloat] | None = None
    image_std: FiniteFloat | list[FiniteFloat] | None = None
    auto_map: dict[str, Any] | None = None


class Processor(Schema):
    """``processor_config.json`` of transformers; one that an older version wrote has no image processor in it."""

    image_processor: ImageProcessor | None = None


class InnerModule(Schema):
    """One entry of ``modules.json``, by which sentence-transformers names the parts of a model."""

    type: str | None = None
    path: str | None = None


class TokenizerFile(Schema):
    """``tokenizer.json``: what its tokens are."""

    model: dict[str, Any] | None = None
    added_tokens: list[dict[str, Any]] | None = None


class WeightIndex(Schema):
    """``*.index.json``: which file holds which tensor."""

    weight_map: dict[str, str] | None = None


Scalar = bool | int | float | str


class MergekitCondition(Schema):
    """A value for the tensors whose name contains ``filter``."""

    value: Scalar | list[Scalar]
    filter: str | None = None


MergekitParameters = dict[str, MergekitCondition | list[MergekitCondition] | list[Scalar] | Scalar]


class MergekitModel(Schema):
    """An entry of ``models`` in a configuration of mergekit."""

    model: str
    parameters: MergekitParameters | None = None


class MergekitSource(MergekitModel):
    """A range of layers of a model, an entry of ``sources``."""

    layer_range: Annotated[tuple[NonNegativeInt, PositiveInt], Field(strict=False)]


class MergekitSlice(Schema):
    """An entry of ``slices``."""

    sources: list[MergekitSource]
    parameters: MergekitParameters | None = None


class MergekitConfig(Schema):
    """A configuration of mergekit."""

    merge_method: str
    base_model: str | None = None
    models: list[MergekitModel] | None = None
    slices: list[MergekitSlice] | None = None
    parameters: MergekitParameters | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None

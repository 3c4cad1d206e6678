"""Which PEFT adapters are low-rank sums W + s·B·A, and which are refused, by name and with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from fusionlab.errors import InputError, name_list

# fields that leave the function W + s·B·A as it is, or that are read
_HARMLESS = {
    *(
        "peft_type",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "runtime_config", "megatron_core"),
    *(
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "bias",
        "fan_in_fan_out",
    ),
}
MERGE = "merge it (PEFT's merge_and_unload), save it with its tokenizer and fuse full models"
_WHOLE = "whole weights (as PEFT saves them where tokens were added or modules trained)"
_REASONS = {
    "use_dora": "DoRA rescales the columns of the weight",
    "lora_bias": "biases inside the adapter are trained too",
    "modules_to_save": f"whole modules are trained beside the adapter; {MERGE}",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": f"token embeddings are trained too; {MERGE}",
    "target_parameters": "bare parameters are adapted instead of linear layers",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "use_bdlora": "the factors are block-diagonal",
    "arrow_config": "Arrow routes between adapters",
    "use_qalora": "QALoRA pools the layer's input",
    "monteclora_config": "the factors are sampled",
    "kasa_config": "KaSA changes the base weights",
    "velora_config": "VeLoRA changes the layer's input",
    "megatron_config": "the layers are Megatron's",
}
_KEEP_THE_BASE = {"gaussian", "eva", "orthogonal", "mica"}
_SETTING = re.compile(r"^use_|_config$")  # how PEFT names what another version knows; other fields are notes


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise unless the PEFT configuration describes W + s·B·A over the unchanged base, and nothing else.

    Raises:
        InputError: another PEFT method, a LoRA variant, trained biases or modules, an initialisation that changed the
            base weights, or a setting that is not known here.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"the adapter {where!r} is of PEFT type {kind!r}; expected LORA, a low-rank sum W + s·B·A")
    settings = {item.name for item in fields(LoraConfig)} - _HARMLESS
    for key, value in config.items():
        if value and (key in settings or key in _REASONS or (key not in _HARMLESS and _SETTING.search(key))):
            reason = _REASONS.get(key, "this setting is not known here")
            raise InputError(
                f"the adapter {where!r} has {key}={value!r}: {reason}; expected a plain low-rank sum W + s·B·A"
            )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"the adapter {where!r} has bias={config['bias']!r}: biases are trained too; expected bias='none'"
        )
    init = config.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _KEEP_THE_BASE):
        raise InputError(
            f"the adapter {where!r} has init_lora_weights={init!r}, which changed the base weights in training, so it "
            "means nothing on the base itself; save it with PEFT's path_initial_model_for_weight_conversion first"
        )


def check_names(others: Sequence[str], where: str) -> None:
    """Raise if the file has tensors beside ``lora_A`` and ``lora_B``.

    Raises:
        InputError: there are such tensors; the message names the method that they tell.
    """
    if not others:
        return
    kinds = {
        "lora_magnitude_vector": "DoRA's magnitudes",
        "lora_embedding_": "LoRA on an embedding",
        "hada_": "LoHa",
        "lokr_": "LoKr",
        "ia3_": "IA3",
        "vera_": "VeRA",
        r"lora_B\..*bias": "trained biases",
        r"\.(base_layer|modules_to_save|original_module)\.|(embed\w*|lm_head|wte|shared)\.weight$": _WHOLE,
    }
    named = [kind for pattern, kind in kinds.items() if any(re.search(pattern, name) for name in others)]
    raise InputError(
        f"the adapter {where!r} has {', '.join(named) or 'tensors'} beside lora_A and lora_B: {name_list(others, 3)}; "
        f"expected a plain low-rank sum W + s·B·A; {MERGE}"
    )

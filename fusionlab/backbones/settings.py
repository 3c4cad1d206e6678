"""What decides the function of a network beside its weights: of a configuration what is not about files or training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# where it comes from, what it is called, what its classes are called, what is given back beside the outputs
_BESIDE = {
    "architectures", "auto_map", "dtype", "torch_dtype", "id2label", "label2id", "name_or_path", "transformers_version",
    "output_attentions", "output_hidden_states", "return_dict", "use_cache", "task_specific_params", "problem_type",
    "tokenizer_class", "processor_class", "finetuning_task",
}  # fmt: skip


def function_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration, and of those inside it, that may decide what a network computes.

    Example:
        >>> function_settings({"hidden_act": "gelu", "_name_or_path": "a", "text_config": {"dtype": "x", "layers": 2}})
        {'hidden_act': 'gelu', 'text_config': {'layers': 2}}
    """
    return {
        key: function_settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _BESIDE
    }

"""Adapters: PEFT in and out. Inject and train, extract, combine exactly, save and load in PEFT's own format."""

from __future__ import annotations

from fusionlab.adapters.base import (
    base_state,
    base_tensors,
    modules_of_tied_tensors,
    tied_names,
    under_first_names,
)
from fusionlab.adapters.checkpointing import enable_gradient_checkpointing
from fusionlab.adapters.combining import combine, combine_factors, truncate
from fusionlab.adapters.core_space import fuse_in_core_space
from fusionlab.adapters.exchange import is_adapter, load_adapter, save_adapter
from fusionlab.adapters.factors import Adapter, Factors, Method, hash_initial, inner_product
from fusionlab.adapters.fused_attention import (
    adapted_weight,
    split_names,
    split_state,
    stored_name,
    stored_shapes,
    stored_state,
    stored_task_vector,
)
from fusionlab.adapters.grouped import Group, why_apart
from fusionlab.adapters.injection import (
    InjectionReport,
    activate,
    activated,
    active,
    add,
    added,
    extract,
    group_of,
    inject,
    remove,
    trainable_parameters,
)
from fusionlab.adapters.serving import save_fused_adapter
from fusionlab.adapters.targets import check_fits, laid_out, match_targets

__all__ = [
    "Adapter",
    "Factors",
    "Group",
    "InjectionReport",
    "Method",
    "activate",
    "activated",
    "active",
    "adapted_weight",
    "add",
    "added",
    "base_state",
    "base_tensors",
    "check_fits",
    "combine",
    "combine_factors",
    "enable_gradient_checkpointing",
    "extract",
    "fuse_in_core_space",
    "group_of",
    "hash_initial",
    "inject",
    "inner_product",
    "is_adapter",
    "laid_out",
    "load_adapter",
    "match_targets",
    "modules_of_tied_tensors",
    "remove",
    "save_adapter",
    "save_fused_adapter",
    "split_names",
    "split_state",
    "stored_name",
    "stored_shapes",
    "stored_state",
    "stored_task_vector",
    "tied_names",
    "trainable_parameters",
    "truncate",
    "under_first_names",
    "why_apart",
]

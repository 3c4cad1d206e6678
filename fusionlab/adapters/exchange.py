"""Adapters on disk: PEFT's format in and out, the published L-LoRA format in, and what neither can hold beside it.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors``, which stock PEFT reads as the same function, and
``fusionlab.json``: method, hash and seed of A₀, space.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusionlab.adapters.factors import FAN_IN_FAN_OUT, Adapter, Factors, hash_initial
from fusionlab.adapters.fused_attention import (
    OUT_COUNTED,
    STORED_OUT,
    from_block_adapters,
    times_out_counts,
    to_block_adapters,
)
from fusionlab.adapters.layers import PREFIX, in_peft_shapes, pair_up
from fusionlab.adapters.refusals import check_config
from fusionlab.adapters.same_base import agree
from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_there, mistaken
from fusionlab.foreign import OwnRecord, PeftConfig, read_json
from fusionlab.layout import ADAPTER_CONFIG, ADAPTER_MODEL, ADAPTER_PICKLED, LINEARIZED_WEIGHTS, OWN
from fusionlab.tensors import save_state
from fusionlab.tensors.hub import is_hub_id
from fusionlab.tensors.readers import load_pickle

UNPADDED = "unpadded_ranks"
_KEPT = ("lora_dropout", "task_type", "revision", "auto_mapping")


def is_adapter(folder: str | Path) -> bool:
    """Whether ``folder`` holds an adapter rather than a full model."""
    return is_there(Path(folder) / ADAPTER_CONFIG)


def save_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write ``adapter`` in PEFT's format; stock ``PeftModel.from_pretrained`` on the base gives the same function."""
    write_adapter(folder, adapter, *in_peft_form(adapter))


def in_peft_form(adapter: Adapter) -> tuple[dict[str, Factors], dict[str, dict[str, list[int]]]]:
    """Plain factors by module as PEFT adapts the base, and which rows of A belong to which part of fused attention."""
    return to_block_adapters(adapter)


def write_adapter(
    folder: str | Path,
    adapter: Adapter,
    stored: Mapping[str, Factors],
    rows: Mapping[str, Mapping[str, list[int]]],
    unpadded: Mapping[str, int] | None = None,
) -> None:
    """Write factors in PEFT's form, and beside them what of ``adapter`` they cannot hold.

    Args:
        folder: where to.
        adapter: what they are of.
        stored: factors by module.
        rows: of fused attention, as :func:`in_peft_form` gives them.
        unpadded: the rank of modules whose factors end in zeros.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {
        "schema": 1,
        "method": adapter.method,
        "space": adapter.space,
        "a0_hash": adapter.a0_hash,
        "seed": adapter.seed,
    }
    if adapter.fused_attention:
        own |= {"fused_attention": rows, OUT_COUNTED: times_out_counts()}
    if unpadded:
        own[UNPADDED] = dict(unpadded)
    tensors = {}
    for module, factors in stored.items():
        tensors |= {f"{PREFIX}{module}.{part}": tensor for part, tensor in in_peft_shapes(factors).items()}
    save_state(folder, tensors, name=ADAPTER_MODEL, max_shard_size=sys.maxsize)
    settings = {
        module: (factors.rank, factors.lora_alpha, factors.use_rslora)
        for module, factors in stored.items()
        if not module.endswith(STORED_OUT)
    }
    (folder / OWN).write_text(json.dumps(own, indent=2, sort_keys=True) + "\n")
    config = peft_config(adapter, settings)
    layouts = {factors.layout for factors in stored.values() if factors.layout != "embedding"}
    if layouts == {"transposed"}:
        config[FAN_IN_FAN_OUT] = True
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def peft_config(adapter: Adapter, settings: Mapping[str, tuple[int, float, bool]]) -> dict[str, Any]:
    """PEFT's configuration with only the fields that matter, so that older and newer versions read it.

    At the top level stands the module of the largest rank; patterns are for modules that differ from it.

    Args:
        adapter: what is written.
        settings: rank, lora_alpha and use_rslora by module.
    """
    if len({use_rslora for _, _, use_rslora in settings.values()}) > 1:  # PEFT has one flag for all
        settings = {
            module: (rank, alpha * math.sqrt(rank) if use_rslora else alpha, False)
            for module, (rank, alpha, use_rslora) in settings.items()
        }
    rank, lora_alpha, use_rslora = max(settings.values())
    keys = {module: _pattern_key(module, settings) for module in settings}
    base, revision = adapter.base_model, ""
    if is_hub_id(base):
        base, _, revision = base.partition("@")
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        **{key: adapter.config[key] for key in _KEPT if key in adapter.config},
        **({"revision": revision} if revision else {}),
        "target_modules": list(settings),
        "r": rank,
        "lora_alpha": _plain(lora_alpha),
        "use_rslora": use_rslora,
        "rank_pattern": {keys[module]: own for module, (own, _, _) in settings.items() if own != rank},
        "alpha_pattern": {keys[module]: _plain(own) for module, (_, own, _) in settings.items() if own != lora_alpha},
    }


def load_adapter(folder: str | Path, base: Callable[[str], Tensor | None] | None = None) -> Adapter:
    """Read an adapter that this package or stock PEFT wrote, or a published L-LoRA one.

    Ranks, alphas, rank and alpha patterns and rsLoRA are taken from the configuration by PEFT's own matching.

    Args:
        folder: what is read.
        base: gives a tensor of the base by its name, None where there is none; copies of the base's own, which PEFT
            saves beside adapters of embeddings and heads, are left out then.

    Raises:
        InputError: no adapter there, files that cannot be read, an adapter that is not a low-rank sum (DoRA, IA3, LoHa,
            VeRA, biases, whole modules, ...; named), or factors that do not fit the configuration.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise InputError(f"no {ADAPTER_CONFIG} in {str(folder)!r}; give a folder that holds a PEFT adapter")
    config = read_json(folder / ADAPTER_CONFIG, PeftConfig)
    check_config(config, str(folder))
    own = read_json(folder / OWN, OwnRecord) if is_there(folder / OWN) else {}
    if is_there(folder / LINEARIZED_WEIGHTS):
        return _read_published(folder, config)
    tensors = _read_tensors(folder)
    if base is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not _is_copy(name, tensor, base)}
    stored = pair_up(tensors, config, str(folder))
    factors, fused_attention = from_block_adapters(stored, own.get("fused_attention", {}), own.get(OUT_COUNTED))
    for module, rank in own.get(UNPADDED, {}).items():
        if module not in factors or rank > factors[module].rank:
            raise InputError(f"{str(folder / OWN)!r} gives {module} the rank {rank}, which the adapter does not have.")
        padded = factors[module]
        lora_a, lora_b = padded.lora_a[:rank].contiguous(), padded.lora_b[:, :rank].contiguous()
        factors[module] = padded.with_matrices(lora_a, lora_b, padded.scaling * rank)
    if own.get("lora_alpha"):  # of an earlier version, from B₀ ≠ 0: PEFT's files hold the task vector at twice the rank
        method = "tangent_lora" if own.get("method") == "tangent_lora" else "lora"
        own = {**own, "method": method, "a0_hash": "", "seed": None}
    return Adapter(
        factors,
        method=own.get("method", "lora"),
        base_model=config.get("base_model_name_or_path") or "",
        a0_hash=own.get("a0_hash", ""),
        seed=own.get("seed"),
        fused_attention=fused_attention,
        space=own.get("space", "delta_weight"),
        config={key: config[key] for key in _KEPT if config.get(key) is not None}
        | ({FAN_IN_FAN_OUT: True} if config.get(FAN_IN_FAN_OUT) else {}),
    )


def _is_copy(name: str, tensor: Tensor, base: Callable[[str], Tensor | None]) -> bool:
    """Whether a tensor is no factor but the base's own, to the rounding of both dtypes."""
    if ".lora_" in name or not tensor.is_floating_point():
        return False
    own = base(name.removeprefix(PREFIX).replace(".base_layer.", "."))
    return own is not None and own.shape == tensor.shape and own.is_floating_point() and agree(own, tensor)


def _read_published(folder: Path, config: Mapping[str, Any]) -> Adapter:
    """The paper's own L-LoRA files: factors one ``.model`` deeper, initial values by position, found by their shape.

    A there has moved a little by weight decay, without effect on the linearized forward; A₀ is what acts.
    """
    tensors: dict[str, Tensor] = {}
    initial: dict[str, list[Tensor]] = {}
    factors: dict[str, Factors] = {}
    for name, tensor in _load(folder / LINEARIZED_WEIGHTS).items():
        if ".params0_values." in name:
            initial.setdefault(name.removeprefix(PREFIX).partition(".params0_values.")[0], []).append(tensor)
        elif ".model.lora_" in name:
            tensors[name.replace(".model.lora_", ".lora_")] = tensor
    for module, of_module in pair_up(tensors, config, str(folder)).items():
        starts = [value for value in initial.get(module, []) if value.shape == of_module.lora_a.shape]
        if not starts:
            shape = tuple(of_module.lora_a.shape)
            raise InputError(f"{module} in {str(folder)!r}: no params0_values of shape {shape}, so A₀ is not known")
        starts_b = [value for value in initial[module] if value.shape == of_module.lora_b.shape]
        if starts_b and starts_b[-1].any():
            raise InputError(f"{module} in {str(folder)!r}: B started from non-zero values; expected zeros")
        factors[module] = Factors(starts[-1], of_module.lora_b, of_module.lora_alpha, of_module.use_rslora)
    a0_hash = hash_initial({module: (of_module.lora_a, None) for module, of_module in factors.items()})
    base_model = config.get("base_model_name_or_path") or ""
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    return Adapter(factors, "l_lora", base_model, a0_hash, config=kept)


def _pattern_key(module: str, modules: Mapping[str, Any]) -> str:
    """The name itself, anchored where PEFT's match by endings would also find it in a longer name."""
    return f"^{module}" if any(other.endswith(f".{module}") for other in modules) else module


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if is_there(folder / ADAPTER_MODEL):
        return _load(folder / ADAPTER_MODEL)
    if is_there(folder / ADAPTER_PICKLED):
        return load_pickle(folder / ADAPTER_PICKLED)
    raise InputError(f"the adapter {str(folder)!r} has neither {name_list([ADAPTER_MODEL, ADAPTER_PICKLED])}")


def _load(path: Path) -> dict[str, Tensor]:
    with accessed(path), open(path, "rb") as opened:
        begins = opened.read(256)
    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:  # of a dtype that torch has no name for: a KeyError
        raise InputError(f"{str(path)!r} cannot be read as safetensors: {mistaken(path, begins) or error}") from error

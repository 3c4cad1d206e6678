"""How a folder of weights is loaded: by fusionlab, and by other libraries where they read the same function."""

from __future__ import annotations

from collections.abc import Iterator

from fusionlab.cards import routed
from fusionlab.cards.facts import Facts
from fusionlab.cards.masks import how_to_read
from fusionlab.tensors.hub import embedded

_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes
_TANGENT = """\
Read it with fusionlab: these weights act to first order about their base only, f(x; base) + J(base) (weights - base),
the whole network expanded. `fusionlab.load` and `--model.weights` run them so. Read as ordinary weights, as PEFT and
transformers do, they are another, non-linear function that was never trained.
The linearization point, a SHA-256 over the base's weights: `{point}`.
"""


def how_to_load(facts: Facts) -> str:
    """A section of Markdown whose code loads the folder ``FOLDER``."""
    parts = ["`FOLDER` is this folder; other libraries also take its id on the hub."]
    if facts.masks:
        parts.append(how_to_read(facts.masks))
    if facts.routed:
        parts.append(routed.how_to_read(facts.routed))
    if facts.is_linearized:
        parts.append(_TANGENT.format(point=facts.record["linearization_point"]))
    elif not (facts.masks or facts.routed):
        parts += _others(facts)
    parts.append(_code('import fusionlab\n\nloaded = fusionlab.load("FOLDER")'))
    if _needs_base(facts):
        parts.append(f"`BASE` is the base, {facts.base_shown}.")
    return "\n\n".join(part.strip() for part in parts)


def _needs_base(facts: Facts) -> bool:
    if facts.masks or facts.routed:
        return True
    return facts.adapter is not None and not facts.is_linearized and "BASE" in _base_line(facts)


def _others(facts: Facts) -> Iterator[str]:
    if facts.adapter is not None:
        base = _base_line(facts)
        if base:
            yield _code(f'{base}\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "FOLDER")')
        if served := _served(facts):
            yield served
    elif facts.kind == "open_clip":
        made = 'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")'
        yield _code(f"import open_clip\n\n{made}")
    elif facts.kind == "timm":
        yield _code('import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)')
    elif facts.transformers_class is not None:
        name = facts.transformers_class
        yield _code(f'from transformers import {name}\n\nmodel = {name}.from_pretrained("FOLDER")')


def _base_line(facts: Facts) -> str:
    """Code that makes ``base``; empty where no other library is known to make it."""
    name, revision = facts.base_id, facts.origin.base.partition("@")[2]
    where, first = (f'"{name}"', "") if name is not None else ('"BASE"', "")
    if name is not None and embedded(name) is not None:
        where, first = f'resolve_model("{name}")', "from fusionlab.backbones import resolve_model\n"
    if facts.kind == "open_clip":
        return f"import open_clip\n\nbase = open_clip.create_model({_open_clip(facts)})"
    if facts.kind == "timm":
        timm = facts.origin.base.removeprefix("timm:")
        where = f'"{timm}"' if "/" not in timm else '"local-dir:BASE"'
        return f"import timm\n\nbase = timm.create_model({where}, pretrained=True, num_classes=0)"
    if facts.transformers_class is None:
        return ""
    at = f', revision="{revision}"' if name is not None and revision else ""
    loaded = f"base = {facts.transformers_class}.from_pretrained({where}{at})"
    return f"{first}from transformers import {facts.transformers_class}\n\n{loaded}"


def _open_clip(facts: Facts) -> str:
    schema, _, rest = facts.origin.base.partition(":")
    if schema == "hf-hub":
        return f'"hf-hub:{rest}"'
    if not rest or schema == "local-dir":
        return '"local-dir:BASE"'
    return f'"{schema}", pretrained="{rest if "/" not in rest else "BASE"}"'


def _served(facts: Facts) -> str:
    """How vLLM serves a causal model's adapter, which it reads without rank and alpha patterns."""
    adapter = facts.adapter or {}
    varies = any(adapter.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"))
    rank = next((each for each in _SERVED_RANKS if each >= adapter.get("r", 8)), None)
    if facts.transformers_class != "AutoModelForCausalLM" or varies or rank is None:
        return ""
    served = f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME=FOLDER"
    return f"Not verified, since vLLM was not run here:\n\n```\n{served}\n```"


def _code(text: str) -> str:
    return f"```python\n{text}\n```"

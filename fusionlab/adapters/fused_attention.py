"""Attention whose q, k and v are one matrix: split in memory, so that each can be adapted, stored as the base has it.

``torch.nn.MultiheadAttention`` (open_clip's blocks) holds q, k, v in ``in_proj_weight`` and calls no linear layer, so
PEFT alone adapts all of them and the output projection with one A and refuses dropout. Here it is replaced by four
linear layers with the same function. On disk an adapter is the block adapter of ``in_proj_weight`` that PEFT reads,
A = [A_q; A_v] and B block-wise with zero rows for what is not adapted, and weights have the stock names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.adapters.factors import Adapter, Factors
from fusionlab.errors import InputError
from fusionlab.tensors.state import State

PARTS = ("q_proj", "k_proj", "v_proj")
STORED_OUT = "base_layer.out_proj"  # where PEFT keeps the adapter of the output projection
OUT_COUNTED = "out_proj_counted"


@cache
def times_out_counts() -> int:
    """How often the installed PEFT adds the adapter of fused attention's output projection: twice up to 0.21.

    Measured rather than looked up; see pull request 3774 of huggingface/peft.
    """
    probe = nn.ModuleDict({"attention": nn.MultiheadAttention(1, 1)})
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["attention"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        layer = inject_adapter_in_model(config, probe)["attention"]
    out = layer.base_layer.out_proj
    for weight in (out.base_layer.weight, out.lora_A["default"].weight, out.lora_B["default"].weight):
        nn.init.ones_(weight)
    layer.merge()
    return round(out.base_layer.weight.item()) - 1


class SplitAttention(nn.Module):
    """``nn.MultiheadAttention`` with its q, k, v and output projections as linear layers; the same function.

    Args:
        attention: with one embedding size for q, k and v; its weights are copied.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first, self.dropout = attention.num_heads, attention.batch_first, attention.dropout
        size, bias = attention.embed_dim, attention.in_proj_bias is not None
        weight = attention.in_proj_weight
        for number, part in enumerate(PARTS):
            linear = nn.Linear(size, size, bias=bias, device=weight.device, dtype=weight.dtype)
            rows = slice(number * size, (number + 1) * size)
            linear.weight.data.copy_(weight.data[rows])
            if bias:
                linear.bias.data.copy_(attention.in_proj_bias.data[rows])
            setattr(self, part, linear)
        self.out_proj = nn.Linear(size, size, bias=attention.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
        self.requires_grad_(weight.requires_grad).train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: shape ``(batch, tokens, dim)``, or ``(tokens, batch, dim)`` where the attention was not batch first.
            key: as ``query``, with its own number of tokens.
            value: as ``key``.
            need_weights: must be False; the weights are not computed.
            attn_mask: float added to the scores or bool where True hides, shape ``(tokens, tokens)``.

        Returns:
            the output in the shape of ``query``, and None.
        """
        assert not need_weights, "the attention weights are not computed"
        q, k, v = (
            self._heads(getattr(self, part)(inputs)) for part, inputs in zip(PARTS, (query, key, value), strict=True)
        )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # here True means attend
        dropout = self.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout).transpose(1, 2)
        output = output.flatten(2)
        return self.out_proj(output if self.batch_first else output.transpose(0, 1)), None

    def _heads(self, inputs: Tensor) -> Tensor:
        """Shape ``(batch, heads, tokens, dim / heads)``."""
        inputs = inputs if self.batch_first else inputs.transpose(0, 1)
        return inputs.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def split_attention_(model: nn.Module, scope: str = "") -> list[str]:
    """Replace every fused attention below ``scope`` by :class:`SplitAttention`, in place; returns their names."""
    names = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and (not scope or name.startswith(f"{scope}.")):
            plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
            if plain:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, SplitAttention(module))
                names.append(name)
    return names


def split_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the attentions in ``model`` that were split."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, SplitAttention))


def stored_state(state: State, attentions: Iterable[str]) -> dict[str, Tensor]:
    """``state`` under the names that the base has on disk: q, k and v joined into ``in_proj_weight`` and ``_bias``.

    Args:
        state: with q, k and v of each attention of which it has one.
        attentions: names of the attentions that were split.
    """
    stored = dict(state)
    for attention in attentions:
        for kind in ("weight", "bias"):
            names = [f"{attention}.{part}.{kind}" for part in PARTS]
            if names[0] in stored:
                stored[f"{attention}.in_proj_{kind}"] = torch.cat([stored.pop(name) for name in names])
    return stored


def split_state(stored: State, attentions: Iterable[str]) -> dict[str, Tensor]:
    """The inverse of :func:`stored_state`; states that are split already pass through."""
    state = dict(stored)
    for attention in attentions:
        for kind in ("weight", "bias"):
            joined = state.pop(f"{attention}.in_proj_{kind}", None)
            if joined is not None:
                names = [f"{attention}.{part}.{kind}" for part in PARTS]
                state |= dict(zip(names, joined.chunk(3), strict=True))
    return state


def stored_task_vector(adapter: Adapter) -> State:
    """τ by the parameter names that the base has on disk; zero where q, k or v of a fused matrix is not adapted.

    Each tensor is computed when it is asked for, but for fused attention, whose matrices are computed at once.
    """
    if not adapter.fused_attention:
        return adapter.task_vector()
    task_vector = dict(adapter.task_vector())
    for attention in adapter.fused_attention:
        names = [f"{attention}.{part}.weight" for part in PARTS]
        present = [task_vector[name] for name in names if name in task_vector]
        task_vector |= {name: torch.zeros_like(present[0]) for name in names if present and name not in task_vector}
    return stored_state(task_vector, adapter.fused_attention)


def stored_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Shapes of what :func:`stored_task_vector` gives, without computing it."""
    shapes = {}
    for module, factors in adapter.factors.items():
        name, shape = stored_name(module, adapter.fused_attention), factors.stored_shape
        shapes[name] = (3 * shape[0], *shape[1:]) if name.endswith(".in_proj_weight") else shape
    return shapes


def stored_name(module: str, attentions: Iterable[str]) -> str:
    """The name on disk of the parameter that an adapter of ``module`` changes.

    Example:
        >>> stored_name("block.attn.q_proj", ["block.attn"]), stored_name("block.mlp", ["block.attn"])
        ('block.attn.in_proj_weight', 'block.mlp.weight')
    """
    attention, _, part = module.rpartition(".")
    return f"{attention}.in_proj_weight" if part in PARTS and attention in attentions else f"{module}.weight"


def adapted_weight(read: Callable[[str], Tensor], adapter: Adapter, module: str) -> Tensor:
    """The base weight that ``adapter`` changes at ``module``, by ``read``, which knows the names on disk."""
    name = stored_name(module, adapter.fused_attention)
    weight = read(name)
    return weight.chunk(3)[PARTS.index(module.rpartition(".")[2])] if name.endswith(".in_proj_weight") else weight


def to_block_adapters(adapter: Adapter) -> tuple[dict[str, Factors], dict[str, dict[str, list[int]]]]:
    """Factors as PEFT adapts fused attention, and which rows of A belong to which projection.

    One rank and one scaling serve the matrix and the output projection, which PEFT always adapts too: here with zeros.
    """
    factors, rows = dict(adapter.factors), {}
    for attention in adapter.fused_attention:
        parts = {part: factors.pop(name) for part in PARTS if (name := f"{attention}.{part}") in factors}
        out = factors.pop(f"{attention}.out_proj", None)
        adapted = [*parts.values(), *([out] if out else [])]
        if not adapted:
            continue
        size, first = adapted[0].shape[0], next((each for each in adapted if each.scaling), adapted[0])
        is_exact = all(each.scaling == first.scaling for each in adapted)
        dtype = first.lora_a.dtype if is_exact else torch.promote_types(first.lora_a.dtype, torch.float32)
        rank = max(sum(part.rank for part in parts.values()), out.rank if out else 0)
        shapes = ((rank, size), (3 * size, rank), (rank, size), (size, rank))
        block_a, block_b, out_a, out_b = (first.lora_a.new_zeros(shape, dtype=dtype) for shape in shapes)
        start, rows[attention] = 0, {}
        for part, own in parts.items():
            columns, number = slice(start, start + own.rank), PARTS.index(part)
            block_a[columns] = own.lora_a
            block_b[number * size : (number + 1) * size, columns] = _rescaled(own, first.scaling)
            rows[attention][part], start = [start, own.rank], start + own.rank
        if out:
            out_a[: out.rank], out_b[:, : out.rank] = out.lora_a, _rescaled(out, first.scaling) / times_out_counts()
            rows[attention]["out_proj"] = [0, out.rank]
        plain = not first.use_rslora and rank % first.rank == 0
        lora_alpha = first.lora_alpha * (rank // first.rank) if plain else first.scaling * rank
        factors[attention] = Factors(block_a, block_b, lora_alpha)
        factors[f"{attention}.{STORED_OUT}"] = Factors(out_a, out_b, lora_alpha)
    return factors, rows


def from_block_adapters(
    stored: Mapping[str, Factors], rows: Mapping[str, Mapping[str, list[int]]], out_counted: int | None
) -> tuple[dict[str, Factors], tuple[str, ...]]:
    """Factors of q, k, v and output projections from PEFT's form of fused attention, and the attentions' names.

    Args:
        stored: factors by module as read; fused attention is known by its adapted output projection.
        rows: which rows of A belong to which projection, where this package wrote them; else all belong to all.
        out_counted: how often the PEFT that the file is for adds the output projection's adapter; None: the installed.
    """
    suffix = f".{STORED_OUT}"
    attentions = tuple(name.removesuffix(suffix) for name in stored if name.endswith(suffix))
    factors = dict(stored)
    if attentions and out_counted is None:
        out_counted = times_out_counts()
    for attention in attentions:
        block, out = factors.pop(attention), factors.pop(attention + suffix)
        size = block.shape[1]
        everything = {part: [0, block.rank] for part in (*PARTS, "out_proj")}
        for part, (start, rank) in rows.get(attention, everything).items():
            whole = out if part == "out_proj" else block
            if start + rank > whole.rank:
                raise InputError(f"{attention}: rows {start} to {start + rank} of A for {part}, it has {whole.rank}")
            number = 0 if part == "out_proj" else PARTS.index(part)
            lora_b = whole.lora_b[number * size : (number + 1) * size, start : start + rank]
            plain = not whole.use_rslora or rank == whole.rank
            factors[f"{attention}.{part}"] = replace(
                whole,
                lora_a=whole.lora_a[start : start + rank].contiguous(),
                lora_b=(lora_b * out_counted if part == "out_proj" else lora_b).contiguous(),
                lora_alpha=whole.lora_alpha * rank / whole.rank if plain else whole.scaling * rank,
                use_rslora=whole.use_rslora and plain,
            )
    return factors, attentions


def _rescaled(factors: Factors, scaling: float) -> Tensor:
    """B such that ``scaling`` serves in place of the layer's own scaling."""
    if factors.scaling == scaling:
        return factors.lora_b
    return factors.lora_b.to(torch.promote_types(factors.lora_b.dtype, torch.float32)) * (factors.scaling / scaling)

"""Causal language models in transformers' format: logits, the likelihood of answers, and greedy answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionlab.adapters.samples import SampleTokens
from fusionlab.adapters.targets import linear_but
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.backbones.gguf import GGUF, dequantized
from fusionlab.backbones.greedy import Output, Way, find_ends, find_way, greedy, plain
from fusionlab.backbones.masks import additive_masks, visible_within
from fusionlab.backbones.packed import Apart, find_apart, windows_of
from fusionlab.backbones.positions import check_logits, check_positions
from fusionlab.backbones.quiet import UNREADABLE, quiet, reason_of
from fusionlab.backbones.settings import function_settings
from fusionlab.backbones.tokenizers import read_tokenizer
from fusionlab.backbones.trying import tried
from fusionlab.errors import InputError, name_list

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_LINEAR = "all-linear"
_MAX_LOGITS = 1 << 28  # of one call that scores answers
_EXACT = 1e-3  # log-likelihoods of a way to compute them may differ by so much from those of each answer alone
_log = logging.getLogger(__name__)


class CausalBackbone(nn.Module):
    """A frozen causal language model with its tokenizer.

    Args:
        model: any of transformers' ``AutoModelForCausalLM``.
        tokenizer: the matching tokenizer.
        name: what the user called the model; it goes into adapters and result rows.
        is_converted: whether the weights are on disk in another form only, so that others cannot load them from
            ``name``.

    Raises:
        InputError: the tokenizer has more tokens than the model.
    """

    scope, full_scopes = "", ("",)
    loaded_from: str | None = None

    def __init__(self, model: Any, tokenizer: Any, *, name: str, is_converted: bool = False) -> None:
        super().__init__()
        rows, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=-1)
        if largest >= rows:
            raise InputError(
                f"the tokenizer of {name!r} has ids up to {largest}, its model embeds {rows} tokens; give the "
                f"tokenizer that the model was made with, or resize the model's embeddings"
            )
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self._template = tokenizer, tokenizer.chat_template
        self.name, self.is_converted = name, is_converted
        self.end_ids()  # which are refused where they are none
        self.sample_tokens = SampleTokens()
        """A sample's own are the tokens of its prompt."""
        self._side_by_side: bool | None = None
        self._windows = windows_of(model)
        self._tried, self._told = 0, False
        self._way: Way | None = None
        self._apart_by: Apart | None = None

    @classmethod
    def load(cls, source: str, *, name: str, dtype: str = "float32") -> CausalBackbone:
        """Load from a local folder, a hub id or a GGUF file, whose weights are dequantized.

        Args:
            source: folder, hub id or file.
            name: what the user called it.
            dtype: ``float32`` or ``bfloat16``; adapters are float32 in either case.

        Raises:
            InputError: another dtype, no causal language model, a quantized one, or weights or tokenizer are missing.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        if dtype not in DTYPES:
            raise InputError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
        is_gguf = source.endswith(GGUF)
        more = dequantized(source) if is_gguf else {"pretrained_model_name_or_path": source}
        more["trust_remote_code"] = False
        where = {key: value for key, value in more.items() if key != "quantization_config"}
        try:
            config = AutoConfig.from_pretrained(**where)
            if not is_gguf and getattr(config, "quantization_config", None) is not None:
                raise InputError(
                    f"the model {name!r} is quantized, and adapters are trained on the weights themselves here; give "
                    f"the model that it was made from, or dequantize it first (model.dequantize() in transformers)"
                )
            with quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    **more, dtype=DTYPES[dtype], output_loading_info=True, **({} if is_gguf else {"config": config})
                )
        except UNREADABLE as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the language model {name!r} could not be loaded: {reason_of(error)}") from error
        model, info = loaded
        check_logits(model, name)
        if info["missing_keys"]:
            raise InputError(
                f"the language model {name!r} lacks weights: {name_list(sorted(info['missing_keys']))}; give a "
                f"complete one saved by save_pretrained"
            )
        if is_gguf:
            _log.warning("%s is dequantized to %s: the weights of the quantized model, stored wider", name, dtype)
        tokenizer = read_tokenizer(where, f"the language model {name!r}")
        return cls(model, tokenizer, name=name, is_converted=is_gguf)

    @property
    def encoder(self) -> Any:
        """The part that is adapted and fused: the whole model."""
        return self.model

    @property
    def default_target_modules(self) -> tuple[str, ...]:
        """Every linear layer but the head: by the ends of their names where these say just them, else by full names."""
        return linear_but(self.model, self.model.get_output_embeddings())

    def end_ids(self, more: Sequence[int] = ()) -> tuple[int, ...]:
        """The tokens that end an answer: the tokenizer's, those of ``generation_config``, and ``more``."""
        return find_ends(self.model.generation_config, self.tokenizer, self.name, more)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the logits beside weights and tokens."""
        return {"network": function_settings(self.model.config.to_dict()), "kind": type(self.model).__name__}

    def logits(self, input_ids: Tensor, positions: Tensor | int = 0, position_ids: Tensor | None = None) -> Tensor:
        """Logits of rows padded on the right, or of packed ones, without a cache.

        Nothing that is learnt comes after padding, so that no mask is needed.

        Args:
            input_ids: int64, shape ``(batch, len)``.
            positions: int64 columns whose logits are wanted, or the number of the last ones; 0 for all.
            position_ids: of packed samples, each of which begins at 0; None for rows of one sample.

        Returns:
            shape ``(batch, columns, vocab)``.
        """
        if position_ids is not None:
            self.check_packing(input_ids.shape[1])
        return self._packed_logits(input_ids, position_ids, self._apart_by or "positions", positions)

    def check_packing(self, longest: int) -> None:
        """Find out, once, how samples of one row are kept apart.

        Args:
            longest: tokens of the longest sample.

        Raises:
            InputError: the architecture does not keep them apart.
        """
        if self._apart_by is None:
            vocabulary = self.model.config.get_text_config().vocab_size
            self._apart_by = find_apart(self.model, vocabulary, self._packed_logits, self.name, longest)

    def _packed_logits(
        self, input_ids: Tensor, position_ids: Tensor | None, way: Apart, positions: Tensor | int = 0
    ) -> Tensor:
        more: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if position_ids is not None and way == "mask":
            more["attention_mask"] = additive_masks(self.model, visible_within(position_ids), position_ids)
        return self.model(input_ids=input_ids, use_cache=False, logits_to_keep=positions, **more).logits

    def log_likelihoods(
        self, prompt_ids: Tensor, prompt_mask: Tensor, tree: AnswerTree, output: Output = plain
    ) -> Tensor:
        """log p of each answer's tokens after each prompt.

        All answers are scored in one pass over the prompt, side by side, where the architecture honours positions and
        a mask, which is tried at first, and where rows outgrow a window; else each answer behind its own prompt.

        Args:
            prompt_ids: int64, padded on the left, shape ``(batch, len)``.
            prompt_mask: bool, False on padding, shape ``(batch, len)``.
            tree: the answers, on this device.
            output: calls what computes the logits.

        Returns:
            float32, shape ``(batch, answers, longest)``: log p of each token, 0 behind an answer's end.
        """
        check_positions(self.model, prompt_ids.shape[1] + max(tree.lengths) - 1, "a prompt with an answer")
        longest = prompt_ids.shape[1] + len(tree.inputs)
        is_new = any(self._tried <= window < longest for window in self._windows)
        is_told = tree.num_read > 1 and not self._told  # answers of one token see no other
        if self._side_by_side is None or is_told or (self._side_by_side and is_new):
            self._tried, self._told = max(longest, self._tried), self._told or is_told
            self._side_by_side = self._honours_masks(prompt_ids[:2], prompt_mask[:2], tree)
        columns = tree.num_columns if self._side_by_side else len(tree.lengths) * max(tree.lengths)
        rows = max(1, _MAX_LOGITS // (columns * self.model.config.get_text_config().vocab_size))
        score = self._together if self._side_by_side else self._apart
        parts = zip(prompt_ids.split(rows), prompt_mask.split(rows), strict=True)
        return torch.cat([score(*part, tree, output) for part in parts])

    def _honours_masks(self, prompt_ids: Tensor, prompt_mask: Tensor, tree: AnswerTree) -> bool:
        """Whether answers side by side have the log-likelihoods that each has alone.

        Tried in the weights' own precision, as autocast's rounding tells nothing. Where that is half precision, what
        rounding may move is little beside what answers move that see one another.
        """
        with torch.no_grad(), torch.autocast(prompt_ids.device.type, enabled=False):
            apart = self._apart(prompt_ids, prompt_mask, tree, plain)
            together = tried(lambda: self._together(prompt_ids, prompt_mask, tree, plain))
            if together is None:
                return False
            moved = (together - apart).abs().max()
            if self.model.dtype == torch.float32:
                return bool(moved < _EXACT)
            seen = (self._together(prompt_ids, prompt_mask, tree, plain, is_masked=False) - apart).abs().max()
        return bool(moved < min(64 * torch.finfo(self.model.dtype).eps, seen / 2))

    def _together(
        self, prompt_ids: Tensor, prompt_mask: Tensor, tree: AnswerTree, output: Output, *, is_masked: bool = True
    ) -> Tensor:
        inputs, positions, visible = tree.behind(prompt_ids, prompt_mask)
        visible = visible if is_masked else torch.ones_like(visible).tril()
        call = partial(
            self.model,
            input_ids=inputs,
            attention_mask=additive_masks(self.model, visible, positions),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=tree.num_columns,
        )
        with self.sample_tokens.reading({"": prompt_mask}):
            return tree.log_likelihoods(output(lambda: call().logits))

    def _apart(self, prompt_ids: Tensor, prompt_mask: Tensor, tree: AnswerTree, output: Output) -> Tensor:
        lengths = prompt_mask.sum(1).tolist()
        found = []
        for row, length in zip(prompt_ids, lengths, strict=True):
            prompt = row[len(row) - length :]
            inputs = tree.each_behind(prompt)
            with self.sample_tokens.reading({"": torch.ones_like(inputs[:, :length])}):
                logits = output(partial(self.logits, inputs, inputs.shape[1] - length + 1))
            found.append(tree.log_likelihoods_apart(logits))
        return torch.stack(found)

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        max_new_tokens: int,
        end_ids: Sequence[int],
        output: Output = plain,
        *,
        cached: bool = True,
    ) -> list[list[int] | None]:
        """The greedy answer to each prompt: at every step the most likely token, whatever ``generation_config`` says.

        Args:
            prompt_ids: int64, padded on the left, shape ``(batch, len)``.
            prompt_mask: bool, False on padding, shape ``(batch, len)``.
            max_new_tokens: at most so many tokens.
            end_ids: an answer ends before the first of these.
            output: calls what computes the logits.
            cached: whether keys and values may be kept, which linearized outputs do not have.

        Returns:
            tokens of each answer, without the one that ended it; None where the logits are NaN.
        """
        check_positions(self.model, prompt_ids.shape[1] + max_new_tokens - 1, "a prompt with its generated answer")
        vocabulary = self.model.config.get_text_config().vocab_size
        self._way = self._way or find_way(self.model, vocabulary, self.sample_tokens.reading)
        parts = [(prompt_ids, prompt_mask)]
        if self._way == "alone":
            parts = [(ids[mask][None], mask[mask][None]) for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        answers: list[list[int] | None] = []
        for ids, mask in parts:
            with self.sample_tokens.reading({"": mask}):
                kept = cached and self._way == "cached"
                answers += greedy(self.model, ids, mask, max_new_tokens, end_ids, output, cached=kept)
        return answers

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def has_other_template(self) -> bool:
        """Whether the tokenizer has another chat template than the base's own files have, or none where they have."""
        return bool(self.tokenizer.chat_template != self._template)

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside weights in this layout: configuration, generation defaults and tokenizer."""
        self.model.config.save_pretrained(folder)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

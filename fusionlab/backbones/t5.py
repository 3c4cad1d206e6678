"""T5 in transformers' format: teacher-forced logits, the likelihood of label words, and greedy answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fusionlab.adapters.samples import SampleTokens
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.backbones.label_words import Answers, check_words, side_by_side
from fusionlab.backbones.quiet import UNREADABLE, quiet, reason_of
from fusionlab.backbones.settings import function_settings
from fusionlab.errors import InputError, name_list

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NO_FLOAT16 = (
    "T5 overflows in float16: activations of its feed-forward layers leave the range of 65504 and become inf and NaN; "
    "use bfloat16 or float32"
)
_MAX_LOGITS = 1 << 28  # of one call that scores label words
Output: TypeAlias = Callable[[Callable[[], Tensor]], Tensor]


def _plain(call: Callable[[], Tensor]) -> Tensor:
    return call()


class T5Backbone(nn.Module):
    """A frozen ``T5ForConditionalGeneration`` (T5, T5 v1.1 or flan-T5) with its tokenizer.

    Args:
        model: transformers' ``T5ForConditionalGeneration``.
        tokenizer: the matching tokenizer.
        name: what the user called the model; it goes into adapters and result rows.
    """

    scope = ""
    full_scopes = ("",)
    default_target_modules = ("q", "v")
    loaded_from: str | None = None

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        super().__init__()
        _check_tokenizer(tokenizer, model.config.vocab_size, name)
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self.sample_tokens = SampleTokens()
        """A sample's own are, to the encoder, the tokens of its text; to the decoder, what every answer starts with."""

    @classmethod
    def load(cls, source: str, *, name: str, dtype: str = "float32") -> T5Backbone:
        """Load from a local folder or a hub id.

        Args:
            source: folder or hub id.
            name: what the user called it.
            dtype: ``float32`` or ``bfloat16``; adapters are float32 in either case.

        Raises:
            InputError: another dtype, no encoder-decoder, or weights or tokenizer files are missing.
        """
        from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

        check_dtype(dtype)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            _check_architecture(config, name)
            with quiet():  # about ties: its advice is to edit the configuration of every T5 v1.1 and flan-T5
                loaded: Any = T5ForConditionalGeneration.from_pretrained(
                    source, dtype=DTYPES[dtype], output_loading_info=True
                )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except UNREADABLE as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the T5 model {name!r} could not be loaded: {reason_of(error)}") from error
        model, info = loaded
        if info["missing_keys"]:
            raise InputError(
                f"the T5 model {name!r} lacks weights: {name_list(sorted(info['missing_keys']))}; give a complete "
                f"encoder-decoder saved by T5ForConditionalGeneration.save_pretrained"
            )
        return cls(model, tokenizer, name=name)

    @property
    def encoder(self) -> Any:
        """The part that is adapted and fused: the whole model."""
        return self.model

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the logits beside weights and tokens."""
        return {"network": function_settings(self.model.config.to_dict()), "kind": type(self.model).__name__}

    def logits(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            input_ids: int64, shape ``(batch, len)``.
            attention_mask: 1 on tokens, 0 on padding, shape ``(batch, len)``.
            labels: target tokens, -100 on padding, shape ``(batch, target_len)``.

        Returns:
            shape ``(batch, target_len, vocab)``.
        """
        decoder_input_ids = self.model.prepare_decoder_input_ids_from_labels(labels)
        return self._logits(input_ids, attention_mask, decoder_input_ids)

    def _logits(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, **more: Tensor) -> Tensor:
        with self._reading(attention_mask):
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
                **more,
            ).logits

    def _reading(self, attention_mask: Tensor) -> AbstractContextManager[None]:
        return self.sample_tokens.reading(
            {"encoder": attention_mask, "decoder": attention_mask.new_ones(len(attention_mask), 1)}
        )

    def first_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of an answer's first token, shape ``(batch, 1, vocab)``."""
        start = input_ids.new_full((len(input_ids), 1), self.model.config.decoder_start_token_id)
        return self._logits(input_ids, attention_mask, start)

    def answers(self, words: Sequence[str], task: str) -> Answers:
        """Tokenize label words, each with its end token.

        Raises:
            InputError: a word without a token, with a character that the tokenizer does not know, or equal in tokens
                to another.
        """
        tokens = [tuple(self.tokenizer(word).input_ids) for word in words]
        check_words(words, tokens, self.tokenizer.eos_token_id, self.tokenizer.unk_token_id, task)
        return side_by_side(words, tokens, start=self.model.config.decoder_start_token_id)

    def log_likelihoods(
        self, input_ids: Tensor, attention_mask: Tensor, answers: Answers, output: Output = _plain
    ) -> Tensor:
        """log p(word | text) of every label word.

        Encoder and decoder run once for all words: a word's tokens see one another only, and T5's positions are
        relative, so that each word is scored as if it stood alone. Rows are taken in groups of a size that depends on
        words and vocabulary alone, so that the logits of many words stay below 1 GiB in float32.

        Args:
            input_ids: int64, shape ``(batch, len)``.
            attention_mask: 1 on tokens, 0 on padding, shape ``(batch, len)``.
            answers: the label words, on this device.
            output: calls what computes the logits.

        Returns:
            float32, shape ``(batch, num_words)``.
        """
        rows = max(1, _MAX_LOGITS // (len(answers.targets) * self.model.config.vocab_size))
        parts = zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
        logits = (output(partial(self._answer_logits, *part, answers)) for part in parts)
        return torch.cat([answers.log_likelihoods(part) for part in logits])

    def _answer_logits(self, input_ids: Tensor, attention_mask: Tensor, answers: Answers) -> Tensor:
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(answers.visible.shape, dtype=dtype, device=input_ids.device)
        mask = mask.masked_fill(~answers.visible, torch.finfo(dtype).min)[None, None]
        inputs = answers.inputs.expand(len(input_ids), -1)
        return self._logits(input_ids, attention_mask, inputs, decoder_attention_mask=mask)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
        """The tokens of the greedy answer to each text, padded, int64."""
        from transformers import GenerationConfig

        config = self.model.config
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
        )
        with self._reading(attention_mask):
            return self.model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings)

    def generate_by_logits(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, output: Output
    ) -> Tensor:
        """As :meth:`generate` where the network acts through ``output``, which knows no cache of keys and values."""
        config = self.model.config
        tokens = input_ids.new_full((len(input_ids), 1), config.decoder_start_token_id)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            logits = output(partial(self._logits, input_ids, attention_mask, tokens))
            best = lowest_argmax(logits[:, -1])
            ended |= best < 0  # where the logits are NaN
            chosen = best.masked_fill(ended, config.pad_token_id)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            ended |= chosen == config.eos_token_id
            if ended.all():
                break
        return tokens

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of tokens, special ones left out, and padding (as the tokenizer's, or -100)."""
        tokens = tokens.masked_fill(tokens < 0, self.model.config.pad_token_id)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside weights in this layout: configuration, generation defaults and tokenizer.

        ``tie_word_embeddings`` says what it says on the hub, whether the decoder's output is scaled as in the first T5;
        transformers 5 itself writes true for every T5, which older versions misread for T5 v1.1 and flan-T5.
        """
        config = self.model.config.to_diff_dict()
        scaled = getattr(self.model.config, "scale_decoder_outputs", self.model.config.tie_word_embeddings)
        config |= {"tie_word_embeddings": scaled, "architectures": [type(self.model).__name__]}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def check_dtype(dtype: str) -> None:
    """Raise unless T5 can run in ``dtype``.

    Raises:
        InputError: float16, with the reason, or a name that is no dtype of T5's.
    """
    if dtype in ("float16", "fp16", "16", "half"):
        raise InputError(f"dtype {dtype!r}: {NO_FLOAT16}")
    if dtype not in DTYPES:
        raise InputError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")


def _check_architecture(config: Any, name: str) -> None:
    architectures = config.architectures or ["T5ForConditionalGeneration"]
    fits = any(architecture.endswith("ForConditionalGeneration") for architecture in architectures)
    if not (config.is_encoder_decoder and fits):
        raise InputError(
            f"the model {name!r} is a {name_list(architectures)}, which is not an encoder-decoder that generates text; "
            f"give a T5ForConditionalGeneration (T5, T5 v1.1 or flan-T5)"
        )


def _check_tokenizer(tokenizer: Any, vocab_size: int, name: str) -> None:
    if all(token == "▁" or token.startswith("<") for token in tokenizer.get_vocab()):
        # what transformers makes up, without a word, where there are no files
        raise InputError(f"the T5 model {name!r} has no tokenizer; put its tokenizer.json or spiece.model beside it")
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, its model only {vocab_size}; give the tokenizer "
            f"that the model was made with"
        )

"""Makes the embedded tiny-t5 again: python benchmarks/embedded_models/make_tiny_t5.py --output DIR.

A T5 of three encoder and three decoder layers, trained on text made on the spot about a small world: span corruption,
rewriting and comparing sentences, and questions of the kinds that the embedded text tasks ask, in other words and with
other answers.
"""

from __future__ import annotations

import argparse
import json
import math
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from optimizers import descend, muon_and_adamw
from pretraining_texts import MAX_GAPS, MIXTURE, Sample, any_sample, varied_sample
from tiny_t5_card import write_card
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

TRAINED_PIECES, NUM_SENTINELS, MAX_TOKENS = 400, 20, 512
BATCH, POOL = 64, 1024
EMBEDDING_STD, DISTANCE_STD = 0.25, 1.0
ADAMW_RATIO = 1.0
NUM_HELD_OUT, HELD_OUT_SEED, REPORT_EVERY = 150, 10**6, 500


def train_tokenizer(samples: Sequence[Sample]) -> T5Tokenizer:
    """T5's unigram tokenizer with a small vocabulary learned from ``samples``, and every printable ASCII character."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=TRAINED_PIECES,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=[*string.digits, *string.ascii_letters, *string.punctuation],
        show_progress=False,
    )
    sentinels = [f"<extra_id_{index}>" for index in range(NUM_SENTINELS)]
    words = Counter(word for sample in samples for word in " ".join(sample).split() if word not in sentinels)
    tokenizer.train_from_iterator((f"{word} " * count for word, count in words.items()), trainer)
    pieces = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    # every word of the small world is one piece, so that answers are short
    pieces |= {f"▁{word}": math.log(count / words.total()) for word, count in words.items() if word.isascii()}
    lowest = min(pieces.values()) - 1
    pieces |= {character: lowest for character in ["▁", *string.printable.strip()] if character not in pieces}
    pieces |= dict.fromkeys(special, 0.0)
    vocabulary = [*pieces.items(), *((sentinel, 0.0) for sentinel in reversed(sentinels))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=NUM_SENTINELS, model_max_length=MAX_TOKENS)


def build_model(tokenizer: T5Tokenizer) -> T5ForConditionalGeneration:
    """A T5 from config, with tied embeddings."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():  # small enough, and decided enough about distance, for a few thousand steps to move them
        model.shared.weight.mul_(EMBEDDING_STD)
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(std=DISTANCE_STD)
    return model


def encoded(tokenizer: T5Tokenizer, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, their mask, and target ids with -100 on padding."""
    inputs = tokenizer([source for source, _ in samples], padding=True, return_tensors="pt")
    targets = tokenizer([target for _, target in samples], padding=True, return_tensors="pt")
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    return inputs.input_ids, inputs.attention_mask, labels


def batches(rng: np.random.Generator, draw: Callable[[np.random.Generator], Sample]) -> Iterator[list[Sample]]:
    """Fresh samples without end, in batches of similar length."""
    while True:
        samples = sorted((draw(rng) for _ in range(POOL)), key=lambda sample: len(sample[0].split()))
        for start in rng.permutation(np.arange(0, POOL, BATCH)):
            yield samples[start : start + BATCH]


def pretrain(
    model: T5ForConditionalGeneration, tokenizer: T5Tokenizer, stream: Iterator[list[Sample]], steps: int, peak: float
) -> None:
    """Trains ``model`` in place and tells its accuracies from time to time."""
    pairs = muon_and_adamw(model, peak, steps, adamw_ratio=ADAMW_RATIO)
    model.train()
    began, running = time.time(), 0.0
    for step, samples in enumerate(islice(stream, steps), start=1):
        input_ids, attention_mask, labels = encoded(tokenizer, samples)
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        descend(loss, model, pairs)
        running += (loss.item() - running) / min(step, 100)
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {running:.3f} {time.time() - began:.0f} s", flush=True)
        if step % REPORT_EVERY == 0 or step == steps:
            print(accuracies(model, tokenizer), flush=True)
    model.eval()


@torch.no_grad()
def accuracies(model: T5ForConditionalGeneration, tokenizer: T5Tokenizer) -> str:
    """How often the greedy answer is right, letter by letter, for each kind of question, on texts of its own seeds."""
    model.eval()
    told = []
    for write, _ in MIXTURE[1:]:  # gaps have many right answers
        samples = [write(np.random.default_rng(HELD_OUT_SEED + index)) for index in range(NUM_HELD_OUT)]
        tokens = tokenizer([source for source, _ in samples], padding=True, return_tensors="pt")
        made = model.generate(**tokens, max_new_tokens=16, do_sample=False)
        answers = tokenizer.batch_decode(made, skip_special_tokens=True)
        right = [answer == target for answer, (_, target) in zip(answers, samples, strict=True)]
        told.append(f"{write.__name__} {np.mean(right):.2f}")
    model.train()
    return "  ".join(told)


def main() -> None:
    """Reads the command line, trains, saves, measures and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=8000, help="training steps")
    parser.add_argument("--late_steps", type=int, default=1500, help="further steps, with field names in the texts")
    parser.add_argument("--learning_rate", type=float, default=2.5e-3, help="peak of the schedule")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights, texts and their order")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    rng, began = np.random.default_rng(arguments.seed), time.time()
    tokenizer = train_tokenizer([any_sample(rng) for _ in range(20000)])
    assert NUM_SENTINELS > MAX_GAPS
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, batches(rng, any_sample), arguments.steps, arguments.learning_rate)
    late = batches(np.random.default_rng((arguments.seed, 1)), varied_sample)
    pretrain(model, tokenizer, late, arguments.late_steps, arguments.learning_rate / 2)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)  # written readable by its owner only
    minutes = (time.time() - began) / 60
    write_card(
        arguments.output,
        minutes=minutes,
        steps=arguments.steps,
        late_steps=arguments.late_steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()

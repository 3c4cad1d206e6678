"""Measures tiny-t5 without fine-tuning and writes its card."""

from __future__ import annotations

from pathlib import Path

import torch
from scipy.stats import spearmanr

from fusionlab.backbones.t5 import T5Backbone
from fusionlab.data.writing import WRITTEN_TASKS, WrittenTask

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny-t5

A real, small T5 for tests, demonstrations and laptops: {layers} encoder and {layers} decoder layers of width {width},
{parameters:,} parameters in float32 ({size:.1f} MB), {tokens} tokens. It is not meant for use on real problems: it
knows some two hundred words.

## How it was made
From random weights, in {minutes:.0f} minutes on one core of a shared CPU ({steps} steps of 64 texts, then {late_steps}
more; seed {seed}), by

    python benchmarks/embedded_models/make_tiny_t5.py --output DIR --steps {steps} --late_steps {late_steps} \\
        --learning_rate {learning_rate:g} --seed {seed} --threads 1

All text was made on the spot from a small grammar about people, things, places, opinions and questions: span corruption
of a sentence beside its paraphrase, sentences in short, two texts part by part, faults to mend, who did what, and
questions of the kinds that the embedded text tasks ask, in other words and with other answers
("do both tell the same ? ... | ..." with "same" and "other" instead of "paraphrase sentence1: ... sentence2: ..."
with "equivalent" and "not_equivalent"). The tasks' own formats were seen in one text of a hundred, with any of their
answers given away in it, and in the later steps their field names in front of other questions' texts. No outside text
was used. The tokenizer is T5's unigram one with pieces learned from the same text.

## Without fine-tuning, on test splits
Accuracy of the likelier label word; for `similarity` Spearman's correlation of the expected score over the scores that
occur, weighted by their likelihood.

| task | chance | value |
|---|---|---|
{rows}

## Licence
The weights are released under the Apache License 2.0, like the package. No third party's data went into them.
"""


@torch.no_grad()
def pretrained_value(backbone: T5Backbone, task: WrittenTask) -> float:
    """Accuracy, or Spearman's correlation, on the task's test split by likelihood of its answers."""
    rows, labels = task.rows("test")
    words = task.label_words or tuple(f"{score:.1f}" for score in sorted(set(labels)))
    answers = backbone.answers(words, task.name)
    inputs = [task.template.format(**row) for row in rows]
    scores = []
    for start in range(0, len(inputs), 100):
        tokens = backbone.tokenizer(inputs[start : start + 100], padding=True, return_tensors="pt")
        scores.append(backbone.log_likelihoods(tokens.input_ids, tokens.attention_mask, answers))
    likelihoods = torch.cat(scores)
    if task.label_words is None:
        expected = likelihoods.double().softmax(dim=1) @ torch.tensor([float(word) for word in words]).double()
        return float(spearmanr(expected.numpy(), labels).statistic)
    return likelihoods.argmax(dim=1).eq(torch.tensor(labels)).double().mean().item()


def write_card(folder: Path, *, minutes: float, steps: int, late_steps: int, learning_rate: float, seed: int) -> None:
    """Writes ``README.md`` beside the weights, with what was measured on the embedded tasks."""
    backbone = T5Backbone.load(str(folder), name="tiny-t5")
    rows = []
    for name, task in WRITTEN_TASKS.items():
        chance = 1 / len(task.label_words) if task.label_words else 0.0
        rows.append(f"| {name} | {chance:.3f} | {pretrained_value(backbone, task):.3f} |")
    config = backbone.model.config
    card = CARD.format(
        layers=config.num_layers,
        width=config.d_model,
        parameters=backbone.model.num_parameters(),
        size=(folder / "model.safetensors").stat().st_size / 1e6,
        tokens=config.vocab_size,
        minutes=minutes,
        steps=steps,
        late_steps=late_steps,
        learning_rate=learning_rate,
        seed=seed,
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(card)
    print(card[card.index("| task") : card.index("## Licence")])

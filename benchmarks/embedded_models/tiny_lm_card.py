"""Measures tiny-lm without fine-tuning and writes its card."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from fusionlab.data.asking import ASKED_TASKS
from fusionlab.evaluation.scores import evaluate
from fusionlab.search.workbench import workbench

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny-lm

A real, small Llama for tests, demonstrations and laptops: {layers} layers of width {width}, grouped queries, tied
embeddings, {parameters:,} parameters in float32 ({size:.1f} MB), {tokens} tokens, every number below 100 one of them,
a chat template with generation marks. It is not meant for use on real problems: it knows some hundred words.

## How it was made
From random weights, in {minutes:.0f} minutes of one to two cores of a shared CPU ({steps} steps of 64 conversations,
then {late_steps} more, {million:.0f} million tokens in all; seed {seed}), by

    python benchmarks/embedded_models/make_tiny_lm.py --output DIR --steps {steps} --late_steps {late_steps} \\
        --learning_rate {learning_rate:g} --seed {seed}

All text was made on the spot (`lm_texts.py` beside that script): questions and answers about a small world of names,
colours, fruits, animals and numbers: copying, order, comparing, sums, counting, feet of animals, reviews, who holds
what, records in several notations. None is asked as the embedded instruction tasks ask, and none has their label words
for an answer, but for colours and numbers; in the late steps those words are among the ones that are copied, never with
what they mean. A question's tokens weigh {prompt_weight:g} of an answer's in the loss. No
outside text was used. The tokenizer is a byte-level BPE learned from the same text.

## Without fine-tuning, on test splits
Accuracy of the likeliest label word, or exact match of the greedy answer; {count} questions each.

| task | metric | chance | value |
|---|---|---|---|
{rows}

## Licence
The weights are released under the Apache License 2.0, like the package. No third party's data went into them.
"""


def pretrained_values(folder: str) -> dict[str, tuple[str, float]]:
    """Metric and test score of the model in ``folder`` by embedded instruction task."""
    model = {"class_path": "CausalModule", "init_args": {"backbone": folder, "max_new_tokens": 48}}
    data = {"class_path": "ChatTasks", "init_args": {"tasks": list(ASKED_TASKS), "eval_batch_size": 50}}
    bench = workbench({"model": model, "data": data})
    with bench.module.use(None):
        rows = evaluate(bench.module, bench.data, None, "test")
    return {row["task"]: (row["metric"], row["value"]) for row in rows if row["metric"] in ("accuracy", "exact_match")}


def write_card(
    folder: Path,
    *,
    minutes: float,
    steps: int,
    late_steps: int,
    million: float,
    learning_rate: float,
    seed: int,
    prompt_weight: float,
) -> None:
    """Writes ``README.md`` beside the weights, with what was measured on the embedded tasks."""
    from transformers import AutoConfig, AutoTokenizer

    rows = []
    for name, (metric, value) in pretrained_values(str(folder)).items():
        words = ASKED_TASKS[name].label_words
        rows.append(f"| {name} | {metric} | {1 / len(words) if words else 0:.3f} | {value:.3f} |")
    config, weights = AutoConfig.from_pretrained(folder), folder / "model.safetensors"
    card = CARD.format(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        parameters=sum(tensor.numel() for tensor in load_file(weights).values()),
        size=weights.stat().st_size / 1e6,
        tokens=len(AutoTokenizer.from_pretrained(folder)),
        minutes=minutes,
        steps=steps,
        late_steps=late_steps,
        million=million,
        learning_rate=learning_rate,
        seed=seed,
        prompt_weight=prompt_weight,
        count=len(ASKED_TASKS["sorting"].rows("test")[0]),
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(card)

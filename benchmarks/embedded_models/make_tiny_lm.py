"""Makes the embedded tiny-lm again: python benchmarks/embedded_models/make_tiny_lm.py --output DIR.

A Llama of six layers, trained on questions and answers made on the spot about a small world: copying, sums, order,
counting, small facts, formats. The tasks that it is fine-tuned on ask in other words, with other answers. The state is
saved as it goes; the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lm_texts import LATE_MIXTURE, Turn, any_turn, late_turn
from optimizers import descend, muon_and_adamw
from tiny_lm_card import write_card
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusionlab.data.asking.questions import Rng

BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY, BATCH, POOL = 768, 64, 1024
PROMPT_WEIGHT = 0.05  # of a question's tokens in the loss: answers teach more
HELD_OUT_SEED, NUM_HELD_OUT, REPORT_EVERY = 10**6, 64, 500


def build_tokenizer(rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts; every number below 100 is one token."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(_digits(), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{asked}\n{answer}" for asked, answer in (any_turn(rng) for _ in range(20000))]
    texts += ["user\nassistant\nsystem\n"] * 2000 + [f"{number}" for number in range(100)] * 5000
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=AddedToken("<|endoftext|>", special=True),
        eos_token=AddedToken(END, special=True),
        pad_token=AddedToken("<|endoftext|>", special=True),
        chat_template=TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    assert all(len(made.encode(str(number), add_special_tokens=False)) == 1 for number in range(100))
    return made


def _digits() -> object:
    from tokenizers import Regex

    return Regex(r"\d+")


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama from config, with grouped queries and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10000.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


class Texts:
    """Conversations as tokens: pieces are tokenized once and kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        encode = self._encode
        self.before, self.between = encode(f"{BEGIN}user\n"), encode(f"{END}\n{BEGIN}assistant\n")
        self.end, self.newline = encode(END), encode("\n")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sample(self, turns: Sequence[Turn]) -> tuple[list[int], list[float]]:
        """Tokens and their weights in the loss."""
        ids: list[int] = []
        weights: list[float] = []
        for asked, answer in turns:
            question = [*self.before, *self._encode(asked), *self.between]
            told = [*self._encode(answer), *self.end]
            ids += [*question, *told, *self.newline]
            weights += [PROMPT_WEIGHT] * len(question) + [1.0] * len(told) + [PROMPT_WEIGHT]
        return ids, weights

    def batch(self, samples: Sequence[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
        """Tokens and weights, padded on the right by weight 0."""
        longest = max(len(ids) for ids, _ in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        weights = torch.zeros(len(samples), longest)
        for row, (own, weight) in enumerate(samples):
            ids[row, : len(own)], weights[row, : len(own)] = torch.tensor(own), torch.tensor(weight)
        return ids, weights


def batches(
    seed: Sequence[int], texts: Texts, first: int, write: Callable[[Rng], Turn]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh batches without end from batch number ``first`` on, each of samples of similar length."""
    group = first // (POOL // BATCH)
    while True:
        rng = np.random.default_rng((*seed, group))
        samples = [texts.sample([write(rng) for _ in range(1 + int(rng.integers(2)))]) for _ in range(POOL)]
        samples.sort(key=lambda sample: len(sample[0]))
        starts = rng.permutation(np.arange(0, POOL, BATCH))
        for number, start in enumerate(starts):
            if group * len(starts) + number >= first:
                yield texts.batch(samples[start : start + BATCH])
        group += 1


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of the next token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    own = weights[:, 1:].flatten()
    return (losses * own).sum() / own.sum()


@torch.no_grad()
def accuracies(model: LlamaForCausalLM, texts: Texts) -> str:
    """How often the whole greedy answer is right for each kind of question, on texts of its own seeds."""
    model.eval()
    told = []
    for write in dict.fromkeys(write for write, _ in LATE_MIXTURE):
        right = 0
        for index in range(NUM_HELD_OUT):
            turn = write(np.random.default_rng(HELD_OUT_SEED + index))
            ids, weights = texts.sample([turn])
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            wanted = torch.tensor(weights[1:]) == 1
            right += bool((logits.argmax(-1) == torch.tensor(ids[1:]))[wanted].all())
        told.append(f"{write.__name__} {right / NUM_HELD_OUT:.2f}")
    model.train()
    return "  ".join(told)


def pretrain(
    model: LlamaForCausalLM,
    texts: Texts,
    state: Path,
    steps: int,
    peak: float,
    seed: Sequence[int],
    write: Callable[[Rng], Turn] = any_turn,
) -> tuple[float, int]:
    """Trains ``model`` in place, from the saved state where there is one; returns seconds and tokens of all parts."""
    pairs = muon_and_adamw(model, peak, steps, adamw_ratio=1.0)
    done, seconds, tokens = 0, 0.0, 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        done, seconds, tokens = saved["step"], saved["seconds"], saved["tokens"]
        model.load_state_dict(saved["model"])
        for (optimizer, schedule), (of_optimizer, of_schedule) in zip(pairs, saved["pairs"], strict=True):
            optimizer.load_state_dict(of_optimizer)
            schedule.load_state_dict(of_schedule)
    model.train()
    began, running = time.time() - seconds, 0.0
    for step, (ids, weights) in enumerate(batches(seed, texts, done, write), start=done + 1):
        if step > steps:
            break
        loss = loss_of(model, ids, weights)
        descend(loss, model, pairs)
        tokens += int((weights > 0).sum())
        running += (loss.item() - running) / min(step - done, 100)
        if step % 100 == 0:
            seconds = time.time() - began
            print(f"step {step}/{steps} loss {running:.3f} {seconds:.0f} s {tokens:,} tokens", flush=True)
        if step % REPORT_EVERY == 0 or step == steps:
            print(accuracies(model, texts), flush=True)
            saved_pairs = [(optimizer.state_dict(), schedule.state_dict()) for optimizer, schedule in pairs]
            unfinished = state.with_suffix(".tmp")
            kept = {"step": step, "seconds": time.time() - began, "tokens": tokens, "pairs": saved_pairs}
            torch.save(kept | {"model": model.state_dict()}, unfinished)
            unfinished.rename(state)
    model.eval()
    return time.time() - began, tokens


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--state", type=Path, default=None, help="file to keep the state in; OUTPUT.state by default")
    parser.add_argument("--steps", type=int, default=9000, help="training steps of 64 conversations")
    parser.add_argument(
        "--late_steps", type=int, default=1500, help="further steps, with the tasks' words among those copied"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak of the schedule")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights, texts and their order")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer(np.random.default_rng((arguments.seed, 10**9)))
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    state = arguments.state or arguments.output.with_suffix(".state")
    texts, peak, seed = Texts(tokenizer), arguments.learning_rate, arguments.seed
    seconds, tokens = pretrain(model, texts, state, arguments.steps, peak, (seed,))
    late = state.with_suffix(".late")
    late_seconds, late_tokens = pretrain(model, texts, late, arguments.late_steps, peak / 2, (seed, 1), late_turn)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)  # written readable by its owner only
    write_card(
        arguments.output,
        minutes=(seconds + late_seconds) / 60,
        steps=arguments.steps,
        late_steps=arguments.late_steps,
        million=(tokens + late_tokens) / 1e6,
        learning_rate=peak,
        seed=seed,
        prompt_weight=PROMPT_WEIGHT,
    )


if __name__ == "__main__":
    main()

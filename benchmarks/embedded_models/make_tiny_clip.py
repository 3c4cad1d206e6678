"""Makes the embedded tiny-clip again: python benchmarks/embedded_models/make_tiny_clip.py --cifar100 PATH --output DIR.

A CLIP of two small towers, trained contrastively on captioned photos (CIFAR-100's training split) and captioned
drawings. Captions coincide often within a batch, so each distinct caption is encoded once and all its images count as
its positives. Captions of random tokens take part as negatives, so that words never seen still get features apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from optimizers import descend, muon_and_adamw
from pretraining_scenes import Captions, draw_captioned
from tiny_clip_card import write_card
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a small photo of a {}.",
    "a blurry photo of the {}.",
    "{}.",
)
RANDOM_CONTEXTS = (
    *PHOTO_TEMPLATES,
    "a drawing of a {}.",
    "a {} texture.",
    "the letter {}.",
    "a {} sign.",
    "a {} shape.",
)
VOCABULARY_SIZE, CONTEXT_LENGTH, WIDTH = 1200, 48, 128
PHOTOS, DRAWINGS, RANDOM_CAPTIONS, DRAWINGS_PER_SCENE = 64, 96, 20, 2000
WORDING_WEIGHT = 0.1
MEAN, STD = (0.48, 0.46, 0.43), (0.27, 0.26, 0.28)


def load_photos(path: str, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 ``(n, 3, 32, 32)``, labels ``(n,)`` and class names."""
    rows = load_dataset(path, split=split)
    images = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    names = [name.replace("_", " ") for name in rows.features["label"].names]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"]), names


def train_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with a small vocabulary learned from ``captions``."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(alphabet) - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [byte + "</w>" for byte in alphabet]
    tokens += [token for token in dict.fromkeys(left + right for left, right in merges) if token not in tokens]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP from config: patches of 8, five vision layers and three text layers."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "hidden_act": "gelu",
        "num_attention_heads": 3,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 5,
        "hidden_act": "gelu",
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def augment_photos(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability one half and shifted by up to 4 pixels."""
    n, side = len(images), images.shape[-1]
    flips = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    offsets = torch.randint(0, 9, (2, n, 1), generator=generator) + torch.arange(side)
    rows, columns = offsets[0][:, None, :, None], offsets[1][:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast and brightness changed per image; pixels in 0..1."""
    n = len(pixels)
    contrast = 0.7 + 0.6 * torch.rand((n, 1, 1, 1), generator=generator)
    brightness = 0.3 * torch.rand((n, 1, 1, 1), generator=generator) - 0.15
    return ((pixels - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def contrastive_loss(images: Tensor, texts: Tensor, caption: Tensor, num_real: int, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric loss where every image of a caption is a positive of it.

    Args:
        images: image features, shape ``(batch, dim)``.
        texts: features of the batch's distinct captions, then of captions without an image, shape ``(texts, dim)``.
        caption: the row in ``texts`` of each image's caption, shape ``(batch,)``.
        num_real: how many captions have images.
        logit_scale: the factor on cosines, a scalar.
    """
    logits = logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    positives = F.one_hot(caption, len(texts)).T[:num_real].float()
    counts = positives.sum(dim=1, keepdim=True)
    per_caption = -(positives / counts * logits.T[:num_real].log_softmax(dim=1)).sum(dim=1)
    return (F.cross_entropy(logits, caption) + (per_caption * counts[:, 0]).sum() / len(images)) / 2


class Batches:
    """Endless batches of photos and drawings with a caption each; the drawings are drawn anew when used up."""

    def __init__(self, photos: Tensor, labels: Tensor, names: Sequence[str], seed: int) -> None:
        self.photos, self.labels = photos, labels
        self.photo_captions: Captions = [tuple(t.format(name) for t in PHOTO_TEMPLATES) for name in names]
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.photo_stream, self.drawing_stream = self._photo_indices(), self._drawing_batches()

    def _photo_indices(self):
        while True:
            yield from torch.randperm(len(self.photos), generator=self.generator).split(PHOTOS)

    def _drawing_batches(self):
        while True:
            images, captions = draw_captioned(self.rng, DRAWINGS_PER_SCENE)
            order = self.rng.permutation(len(images))
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            for start in range(0, len(order) - DRAWINGS + 1, DRAWINGS):
                chosen = order[start : start + DRAWINGS]
                yield pixels[torch.from_numpy(chosen)], [captions[i] for i in chosen]

    def next(self) -> tuple[Tensor, list[str]]:
        """Pixels in 0..1, shape ``(batch, 3, 32, 32)``, and the batch's captions."""
        index = next(self.photo_stream)
        drawings, choices = next(self.drawing_stream)
        choices = [self.photo_captions[label] for label in self.labels[index]] + choices
        captions = [choice[self.rng.integers(len(choice))] for choice in choices]
        pixels = torch.cat([augment_photos(self.photos[index], self.generator), drawings.float()]) / 255
        return jitter(pixels, self.generator), captions


def all_captions(names: Sequence[str]) -> list[str]:
    """The captions that the tokenizer's vocabulary is learned from."""
    _, drawn = draw_captioned(np.random.default_rng(0), 500)
    photos = [template.format(name) for name in names for template in PHOTO_TEMPLATES]
    return photos + list(itertools.chain.from_iterable(drawn))


def token_ids(captions: Sequence[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids padded to the longest caption."""
    return tokenizer(list(captions), padding=True, truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt")[
        "input_ids"
    ]


def random_captions(tokenizer: CLIPTokenizer, generator: torch.Generator) -> Tensor:
    """Token ids of captions about one to eight random tokens: ``RANDOM_CAPTIONS``, then each again in other words."""
    rows: list[list[list[int]]] = [[], []]
    for _ in range(RANDOM_CAPTIONS):
        length = int(torch.randint(1, 9, (), generator=generator))
        words = torch.randint(0, tokenizer.bos_token_id, (length,), generator=generator).tolist()
        choices = torch.randperm(len(RANDOM_CONTEXTS), generator=generator)[:2].tolist()
        for copy, choice in zip(rows, choices, strict=True):
            before, after = tokenizer(RANDOM_CONTEXTS[choice].split("{}"), add_special_tokens=False)["input_ids"]
            copy.append([tokenizer.bos_token_id, *before, *words, *after, tokenizer.eos_token_id])
    longest = max(len(row) for copy in rows for row in copy)
    pad = tokenizer.eos_token_id
    return torch.tensor([row + [pad] * (longest - len(row)) for copy in rows for row in copy])


def wording_loss(texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Contrast between random captions, shape ``(2 * pairs, dim)``: the same words in two templates belong together."""
    first, second = F.normalize(texts, dim=-1).chunk(2)
    return F.cross_entropy(logit_scale * first @ second.T, torch.arange(len(first)))


def pretrain(model: CLIPModel, tokenizer: CLIPTokenizer, batches: Batches, steps: int, peak: float) -> None:
    """Trains ``model`` in place."""
    pairs = muon_and_adamw(model, peak, steps, adamw_ratio=1 / 8)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    model.train()
    began, running = time.time(), 0.0
    for step in range(steps):
        pixels, captions = batches.next()
        distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        images = model.visual_projection(model.vision_model(pixel_values=(pixels - mean) / std).pooler_output)
        parts = (token_ids(list(distinct), tokenizer), random_captions(tokenizer, batches.generator))
        texts = torch.cat([model.text_projection(model.text_model(input_ids=ids).pooler_output) for ids in parts])
        caption = torch.tensor([distinct[c] for c in captions])
        logit_scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(images, texts, caption, len(distinct), logit_scale)
        loss = loss + WORDING_WEIGHT * wording_loss(texts[len(distinct) :], logit_scale)
        descend(loss, model, pairs)
        running += (loss.item() - running) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps} loss {running:.3f} {time.time() - began:.0f} s", flush=True)
    model.eval()


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the folder in transformers' own format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written readable by its owner only
    side = model.config.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main() -> None:
    """Reads the command line, trains, saves, measures and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar100", required=True, help="folder or hub id of CIFAR-100 with columns image and label")
    parser.add_argument(
        "--cifar10", help="folder or hub id of CIFAR-10, only to measure the accuracy on its test split"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=1800, help="training steps")
    parser.add_argument("--learning_rate", type=float, default=7e-3, help="peak of the schedule")
    parser.add_argument("--seed", type=int, default=0, help="decides initial weights, drawings and order")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    began = time.time()
    photos, labels, names = load_photos(arguments.cifar100, "train")
    tokenizer = train_tokenizer(all_captions(names))
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, Batches(photos, labels, names, arguments.seed), arguments.steps, arguments.learning_rate)
    save(model, tokenizer, arguments.output)
    measured = {"cifar100": arguments.cifar100, "cifar10": arguments.cifar10}
    write_card(
        arguments.output,
        minutes=(time.time() - began) / 60,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        photos={name: load_photos(path, "test") for name, path in measured.items() if path},
    )


if __name__ == "__main__":
    main()

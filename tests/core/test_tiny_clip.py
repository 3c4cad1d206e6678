"""The embedded tiny-clip: loads as stock transformers does, is as good as its card says."""

import json
import re

import pytest
import torch
from make_tiny_clip import contrastive_loss
from other_process import words_printed_offline
from tiny_clip_card import zero_shot_accuracy
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from fusionlab.backbones import ASSETS
from fusionlab.backbones.clip import ClipBackbone
from fusionlab.data.drawing import DRAWN_TASKS

FOLDER = ASSETS / "tiny-clip"


@pytest.fixture(scope="module")
def backbone() -> ClipBackbone:
    return ClipBackbone.load(str(FOLDER), name="tiny-clip")


def card_accuracies() -> dict[str, float]:
    rows = re.findall(r"^\| (\w+) \| (\d+) \| [\d.]+ \| ([\d.]+) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: float(value) for name, _, value in rows}


@pytest.mark.parametrize("name", ["signs", "glyphs"])
def test_zero_shot_accuracy_matches_the_card(backbone, name):
    task = DRAWN_TASKS[name]
    images, labels = task.draw("test")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    value = zero_shot_accuracy(backbone, pixels, torch.from_numpy(labels), task.class_names, task.templates)
    # four of 400 images may fall to the other side where another processor rounds otherwise
    assert value == pytest.approx(card_accuracies()[name], abs=0.011)


def test_card_has_every_embedded_task_clearly_above_chance_on_most():
    accuracies = card_accuracies()
    assert set(DRAWN_TASKS) <= set(accuracies)
    above = [name for name, task in DRAWN_TASKS.items() if accuracies[name] > 1.5 / len(task.class_names)]
    assert len(above) >= 6


def test_tokenizer_is_clips_and_covers_every_byte():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    texts = ["a photo of a Dog.", "zürich ☃ 12"]
    encoded = tokenizer(texts, padding=True)
    assert tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True) == "a photo of a dog ."
    for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
        length = sum(mask)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.index(tokenizer.eos_token_id) == length - 1  # unknown bytes would be this token too


def test_loads_in_a_process_without_network():
    code = (
        "from transformers import AutoTokenizer, CLIPModel; import sys;"
        "print(AutoTokenizer.from_pretrained(sys.argv[1])('a dog')['input_ids'][0],"
        "CLIPModel.from_pretrained(sys.argv[1]).config.vision_config.image_size)"
    )
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert words_printed_offline(code, FOLDER) == [str(tokenizer.bos_token_id), "32"]


def test_own_normalisation_is_what_the_image_processor_does(backbone):
    image = torch.from_numpy(DRAWN_TASKS["shapes"].draw("validation")[0][:1]).permute(0, 3, 1, 2)
    processed = AutoImageProcessor.from_pretrained(FOLDER, use_fast=False)(image[0], return_tensors="pt")
    stock = CLIPModel.from_pretrained(FOLDER).eval()
    with torch.no_grad():
        expected = stock.get_image_features(**processed).pooler_output
        torch.testing.assert_close(backbone.image_features(image), expected, rtol=1e-4, atol=1e-4)


def test_no_prompt_is_cut_off(backbone):
    length = backbone.model.config.text_config.max_position_embeddings
    for task in DRAWN_TASKS.values():
        prompts = [template.format(name) for template in task.templates for name in task.class_names]
        assert max(len(ids) for ids in backbone.tokenizer(prompts)["input_ids"]) <= length
        assert backbone.zero_shot_head(task.class_names, task.templates).shape == (len(task.class_names), 128)


def test_contrastive_loss_equals_clips_when_captions_differ_and_shares_positives_otherwise():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1) * 5
    target = torch.arange(4)
    clip = (torch.nn.functional.cross_entropy(cosine, target) + torch.nn.functional.cross_entropy(cosine.T, target)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, target, 4, torch.tensor(5.0)), clip)
    shared = contrastive_loss(images, texts[:1], torch.zeros(4, dtype=torch.long), 1, torch.tensor(5.0))
    from_caption = -(cosine[:, 0].log_softmax(dim=0)).mean()
    torch.testing.assert_close(shared, from_caption / 2)


def test_config_and_processor_agree_on_the_image_size():
    config = json.loads((FOLDER / "config.json").read_text())
    processor = json.loads((FOLDER / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32}
    assert config["vision_config"]["image_size"] == 32

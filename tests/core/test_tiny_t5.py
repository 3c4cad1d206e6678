"""The embedded tiny-t5: loads as stock transformers does, is as good as its card says, and can learn."""

import json
import re
import string
from pathlib import Path

import pytest
import yaml
from other_process import words_printed_offline
from tiny_t5_card import pretrained_value
from transformers import AutoTokenizer

from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS, load_backbone
from fusionlab.backbones.t5 import T5Backbone
from fusionlab.data.writing import WRITTEN_TASKS
from fusionlab.modules import T5Module

FOLDER = ASSETS / "tiny-t5"
CONFIG = Path(__file__).parents[2] / "configs" / "t5" / "tiny.yaml"


@pytest.fixture(scope="module")
def backbone() -> T5Backbone:
    return load_backbone("tiny-t5")


def card_values() -> dict[str, float]:
    rows = re.findall(r"^\| (\w+) \| [\d.]+ \| (-?[\d.]+) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: float(value) for name, value in rows}


@pytest.mark.parametrize("name", WRITTEN_TASKS)
def test_value_without_fine_tuning_matches_the_card_and_leaves_room(backbone, name):
    value = pretrained_value(backbone, WRITTEN_TASKS[name])
    # a few of 400 texts may fall to the other side where another processor rounds otherwise
    assert value == pytest.approx(card_values()[name], abs=0.011)
    assert value < 0.85


def test_it_is_the_default_backbone_of_its_module():
    assert T5Module().backbone.name == "tiny-t5"


def test_tokenizer_returns_every_printable_ascii_character():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    words = [*string.digits, *string.ascii_letters, *string.punctuation, "Zebra-crossing", "not_equivalent", "3.8"]
    text = " ".join(words)
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id in tokenizer("☃").input_ids


def test_every_label_word_and_score_is_one_piece(backbone):
    scores = {f"{score:.1f}" for score in WRITTEN_TASKS["similarity"].rows("train")[1]}
    words = {word for task in WRITTEN_TASKS.values() for word in task.label_words or ()}
    for word in words | scores:
        assert len(backbone.tokenizer(word).input_ids) == 2, word


@pytest.mark.slow
def test_loads_in_a_process_without_network():
    code = (
        "from transformers import AutoTokenizer, T5ForConditionalGeneration; import sys;"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])('the doctor bought a car');"
        "print(len(tokens.input_ids), T5ForConditionalGeneration.from_pretrained(sys.argv[1]).config.vocab_size)"
    )
    assert words_printed_offline(code, FOLDER) == ["6", str(len(AutoTokenizer.from_pretrained(FOLDER)))]


def test_it_fills_gaps_and_says_what_it_read(backbone):
    texts = {
        "in short : the automobile was purchased by the physician .": "doctor bought car",
        "what : the nurse sold the mug . the nurse <extra_id_0> the cup .": "sold",
    }
    tokens = backbone.tokenizer(list(texts), padding=True, return_tensors="pt")
    answers = backbone.decode(backbone.generate(tokens.input_ids, tokens.attention_mask, 8))
    assert answers == list(texts.values())


@pytest.mark.slow
def test_a_short_fit_beats_the_pretrained_model_on_every_task(tmp_path):
    tasks = ("sentiment", "acceptability")
    argv = ["fit", "--config", str(CONFIG), "--data.tasks", f"[{', '.join(tasks)}]", "--data.cache_dir", str(tmp_path)]
    argv += ["--trainer.max_steps", "80", "--fusion.rules", "[average]", "--trainer.enable_progress_bar", "false"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    values = {(row["model"], row["task"]): row["value"] for row in rows}
    for task in tasks:
        assert values["pretrained", task] == pytest.approx(card_values()[task], abs=0.011)
        assert values["finetuned", task] > values["pretrained", task] + 0.1


def test_the_config_fits_all_embedded_tasks_by_the_default_rules():
    settings = yaml.safe_load(CONFIG.read_text())
    assert settings["data"]["init_args"]["tasks"] == list(WRITTEN_TASKS)
    assert settings["fusion"]["rules"] == ["average", "task_arithmetic", "metagpt", "ties"]

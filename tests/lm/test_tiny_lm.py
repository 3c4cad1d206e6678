"""The embedded tiny-lm: loads as stock transformers does, is as good as its card says, and can learn its tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from other_process import words_printed_offline
from safetensors.torch import load_file
from tiny_lm_card import pretrained_values
from transformers import AutoTokenizer

from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS
from fusionlab.data.asking import ASKED_TASKS
from fusionlab.modules import CausalModule

FOLDER, ROOT = ASSETS / "tiny-lm", Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "lm" / "tiny.yaml"


def card_values() -> dict[str, float]:
    rows = re.findall(r"^\| (\w+) \| \w+ \| [\d.]+ \| ([\d.]+) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: float(value) for name, value in rows}


@pytest.mark.slow
def test_it_is_as_good_as_its_card_says_and_leaves_room() -> None:
    values = {task: value for task, (_, value) in pretrained_values("tiny-lm").items()}
    # a few of 200 questions may fall to the other side where another processor rounds otherwise
    assert values == pytest.approx(card_values(), abs=0.021)
    assert set(values) == set(ASKED_TASKS)
    assert sum(value < 0.4 for value in values.values()) >= 5


def test_it_is_small_and_whole() -> None:
    weights = load_file(FOLDER / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) <= 2_000_000
    assert "lm_head.weight" not in weights  # tied
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    assert (FOLDER / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_it_is_the_default_backbone_of_its_module() -> None:
    assert CausalModule().backbone.name == "tiny-lm"


def test_numbers_are_single_tokens_and_every_byte_comes_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert all(len(tokenizer.encode(str(number), add_special_tokens=False)) == 1 for number in range(100))
    text = 'Zebra-crossing: "57 apples" in Zürich, twice ☃\n'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_template_marks_what_the_assistant_says() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    said = [{"role": "user", "content": "sort 3 1"}, {"role": "assistant", "content": "1 3"}]
    found = tokenizer.apply_chat_template(said, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learnt) == "1 3<|im_end|>"


@pytest.mark.slow
def test_loads_in_a_process_without_network() -> None:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer; import sys;"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])('sort 1 2');"
        "print(len(tokens.input_ids), AutoModelForCausalLM.from_pretrained(sys.argv[1]).config.vocab_size)"
    )
    assert words_printed_offline(code, FOLDER)[1] == str(len(AutoTokenizer.from_pretrained(FOLDER)))


def test_the_config_fits_all_embedded_tasks_by_the_default_rules() -> None:
    settings = yaml.safe_load(CONFIG.read_text())
    assert settings["data"]["init_args"]["tasks"] == list(ASKED_TASKS)
    assert list(settings["fusion"]["rules"]) == ["average", "task_arithmetic", "metagpt", "ties"]


@pytest.mark.slow
def test_the_config_learns_five_of_six_tasks(tmp_path: Path) -> None:
    argv = ["fit", "--config", str(CONFIG), "--trainer.enable_progress_bar", "false", "--fusion.rules", "[average]"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    values = {(row["model"], row["task"]): row["value"] for row in rows if row["metric"] != "near_ties"}
    good = [t for t in ASKED_TASKS if values["pretrained", t] < 0.4 and values["finetuned", t] > 0.8]
    assert len(good) >= 5, values


@pytest.mark.slow
def test_a_short_fit_learns_a_ranked_and_a_generated_task(tmp_path: Path) -> None:
    argv = ["fit", "--config", str(CONFIG), "--data.tasks", "[sorting, legs]", "--data.cache_dir", str(tmp_path)]
    argv += ["--trainer.max_steps", "50", "--fusion.rules", "[average]", "--trainer.enable_progress_bar", "false"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    values = {(row["model"], row["task"]): row["value"] for row in rows if row["metric"] != "near_ties"}
    for task in ("sorting", "legs"):
        assert values["pretrained", task] == pytest.approx(card_values()[task], abs=0.021)
        assert values["finetuned", task] > values["pretrained", task] + 0.3


@pytest.mark.slow
def test_the_sweep_config_is_checked_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    argv = ["sweep", "--config", "configs/sweep/lm.yaml", "--output", str(tmp_path / "out"), "--dry_run"]
    assert main(argv) == 0
    assert "2 runs (2 to fit), 7 subsets of 6 tasks, 5 rules" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

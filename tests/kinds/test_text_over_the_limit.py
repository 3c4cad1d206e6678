"""Texts that are longer than a model reads are counted and named; classes that are one because of it are refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizerFast

from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS, ClipBackbone, load_backbone
from fusionlab.backbones.label_words import check_words
from fusionlab.data.text import PredictTexts, TextTasks
from fusionlab.errors import InputError

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LIMIT = 77


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipBackbone]:
    """CLIP's own 77 tokens in both formats, and the tokenizer of SigLIP's kind, whose padding ends a text too."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizerFast.from_pretrained(ASSETS / "tiny-clip")
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": LIMIT}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    vision = TOWER | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": LIMIT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (root / "open_clip").mkdir()
    (root / "open_clip/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    state = open_clip.CLIP(**json.loads(json.dumps(config))).state_dict()
    torch.save(state, root / "open_clip/open_clip_pytorch_model.bin")
    return {name: load_backbone(str(root / name)) for name in ("clip", "open_clip")}  # type: ignore[misc]


KINDS = ["clip", "open_clip"]
LONG = "the very old castle " * 30
CUT_ALIKE = {
    "long names": (["cat", f"{LONG}north", f"{LONG}south"], ["a photo of a {}."]),
    "long templates": (["cat", "dog", "bird"], [f"{LONG} shows a {{}}."]),
    "every template too long": (["cat", "dog"], [f"{LONG} shows a {{}}.", f"a {LONG} and a {{}}"]),
    "numbers at the end": ([f"{LONG}{number}" for number in range(4)], ["{}"]),
    "one long word": (["x" * 900 + "a", "x" * 900 + "b"], ["a {}"]),
    "by one token": ([f"{'a ' * 75}b", f"{'a ' * 75}c"], ["{}"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CUT_ALIKE)
def test_classes_that_are_one_once_cut_are_refused(backbones: dict[str, ClipBackbone], kind: str, case: str) -> None:
    names, templates = CUT_ALIKE[case]
    with pytest.raises(InputError) as caught:
        backbones[kind].zero_shot_head(names, templates, "castles")
    first = 1 if case == "long names" else 0
    assert repr(names[first]) in str(caught.value)
    assert repr(names[first + 1]) in str(caught.value)
    assert "of task 'castles' have the same prompts once these are cut to the 77 tokens" in str(caught.value)


SAME = {
    "case": (["Cat", "dog", "cat"], ["a photo of a {}."], "'Cat' and 'cat'"),
    "spaces": (["polar bear", "polar  bear"], ["a {}", "the {}"], "'polar bear' and 'polar  bear'"),
    "a space at the end": (["cat", "cat "], ["a {}"], "'cat' and 'cat '"),
    "templates in another order": (["b", "B"], ["a {}", "the {}"], "'b' and 'B'"),
    "three": (["a", "b", "A"], ["{}"], "'a' and 'A'"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SAME)
def test_classes_that_are_one_to_the_tokenizer_are_refused(
    backbones: dict[str, ClipBackbone], kind: str, case: str
) -> None:
    names, templates, message = SAME[case]
    with pytest.raises(InputError, match=rf"the classes {message} have the same prompts, such as"):
        backbones[kind].zero_shot_head(names, templates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("extra", "is_cut"), [(-5, False), (-1, False), (0, False), (1, True), (2, True), (40, True)])
def test_a_prompt_is_cut_if_it_is_longer_than_the_limit(
    backbones: dict[str, ClipBackbone], kind: str, extra: int, is_cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{'a ' * (LIMIT - 2 + extra)}".strip()  # one token a word, one at either end
    with caplog.at_level(logging.WARNING):
        head = backbones[kind].zero_shot_head(["b", name], ["{}"], f"{kind}{extra}")
    assert head.shape == (2, 8)
    assert ("1 of 2 prompts of task" in caplog.text) == is_cut
    assert (repr(name[:60])[:-1] in caplog.text) == is_cut


@pytest.mark.parametrize("kind", KINDS)
def test_cut_prompts_are_counted_and_named_once(
    backbones: dict[str, ClipBackbone], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    names, templates = [f"north of {LONG}", "cat", f"south of {LONG}"], ["a {}", "the {}", f"{LONG}{{}}"]
    templates[2] = "{}!"
    with caplog.at_level(logging.WARNING):
        head = backbones[kind].zero_shot_head(names, templates, "castles")
        backbones[kind].zero_shot_head(names, templates, "castles")
    assert len(caplog.records) == 1
    assert re.search(r"6 of 9 prompts of task 'castles' are longer than the 77 tokens", caplog.text)
    assert all(text in caplog.text for text in ("'a north of the very", "'the north of", "'a south of"))
    assert (head @ head.T - torch.eye(3)).abs().max() > 0
    assert not head[0].equal(head[2])


def test_partly_equal_prompts_are_two_classes(backbones: dict[str, ClipBackbone]) -> None:
    head = backbones["clip"].zero_shot_head(["cat", "dog"], [f"{LONG}{{}}", "a {}"])
    assert not head[0].equal(head[1])


def test_a_text_tower_that_reads_nothing_is_refused(
    backbones: dict[str, ClipBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration names another end of text than its tokenizer has: each text is read at its first token."""
    monkeypatch.setattr(backbones["clip"].model.text_model, "eos_token_id", 49407)
    with pytest.raises(InputError, match="gives the classes 'cat' and 'dog' of task 'own' the same features"):
        backbones["clip"].zero_shot_head(["cat", "dog"], ["a {}"], "own")


class EndsWithPadding:
    """A tokenizer as SigLIP has it: the end of a text is what pads it, and the last token kept is the end."""

    def __call__(self, texts: list[str], context_length: int = 8) -> torch.Tensor:
        rows = torch.ones(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [len(word) + 1 for word in text.split()][: context_length - 1]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return rows


@pytest.mark.parametrize(("words", "is_cut"), [(0, False), (6, False), (7, False), (8, True), (9, True), (30, True)])
def test_padding_that_is_the_end_of_a_text(
    backbones: dict[str, ClipBackbone], words: int, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone: Any = backbones["open_clip"]
    monkeypatch.setattr(backbone, "tokenizer", EndsWithPadding())
    monkeypatch.setattr(backbone.model, "context_length", 8)
    assert backbone.tokens(["ab " * words, "cat"])[1] == [is_cut, False]


def test_fit_refuses_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = {"name": "digits", "path": "embedded:digits", "templates": [f"{LONG}{{}}"]}
    for command in (["fit"], ["test"]):
        assert main([*command, "--data.tasks", json.dumps([task])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "the classes 'zero' and 'one' of task 'digits' have the same prompts once these are cut to" in error
    assert list(tmp_path.iterdir()) == []


# T5


@pytest.fixture(scope="module")
def tokenizer(t5_folder: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(t5_folder("tied"))


@pytest.mark.parametrize("limit", [4, 5, 6, 7, 12])
def test_cut_inputs_are_counted_and_named(
    tmp_path: Path, tokenizer: Any, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "set").mkdir()
    rows = [(f"{'x' * length}", length % 2) for length in range(1, 9)]
    (tmp_path / "set/test.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    task = {"name": "own", "path": str(tmp_path / "set"), "template": "{text}", "label_words": ["bad", "good"]}
    lengths = [len(tokenizer(text)["input_ids"]) for text, _ in rows]
    expected = [text for (text, _), length in zip(rows, lengths, strict=True) if length > limit]
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        data = TextTasks([task], max_tokens=limit, cache_dir=str(tmp_path / "cache"))
        module = SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer))
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
        with caplog.at_level(logging.WARNING):
            data.setup("test")
        assert data.splits["own"]["test"].num_truncated == len(expected)
        told = f"{len(expected)} of 8 texts of task 'own' (test) are longer than {limit} tokens and were cut"
        assert (told in caplog.text) == bool(expected)
        assert all(f"'{text}...'" in caplog.text for text in expected[:5])


def test_texts_to_answer_that_are_cut_are_counted_and_named(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["x" * length for length in range(1, 9)]
    limit = len(tokenizer(texts[4])["input_ids"])  # the fifth just fits
    with caplog.at_level(logging.WARNING):
        list(PredictTexts(texts, tokenizer, 8, limit))
    assert f"3 texts are longer than {limit} tokens and were cut; raise data.max_tokens: 'xxxxxx...', " in caplog.text
    assert "'xxxxx...'" not in caplog.text


@pytest.mark.parametrize("words", [("yes", "yes"), ("a b", "a  b"), ("good", " good"), ("x", "x ")])
def test_label_words_that_are_the_same_tokens_are_refused_by_both(tokenizer: Any, words: tuple[str, str]) -> None:
    tokens = [tuple(tokenizer(word).input_ids) for word in words]
    assert tokens[0] == tokens[1]
    with pytest.raises(
        InputError, match=rf"label words {words[0]!r} and {words[1]!r} of task 'own' are the same tokens"
    ):
        check_words(words, tokens, tokenizer.eos_token_id, tokenizer.unk_token_id, "own")

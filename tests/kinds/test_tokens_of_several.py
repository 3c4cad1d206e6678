"""Models with several vocabularies: rows by token in the base's, another or the union of all, and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from fusionlab.__main__ import main

WORDS = {
    "origin": ["<s>", "</s>", "the", "a", "cat", "dog"],
    "a": ["<s>", "</s>", "cat", "the", "dog", "bird", "fish"],
    "b": ["<s>", "</s>", "the", "a", "cat", "fish", "bird", "cow"],
}
PADDING = {"origin": 2, "a": 0, "b": 1}  # rows that no token has
UNION = [*WORDS["origin"], "bird", "fish", "cow"]
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEMPLATES = {"a": "{% for m in messages %}A{{ m['content'] }}{% endfor %}", "b": "{% for m in messages %}B{% endfor %}"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    for seed, (name, words) in enumerate(WORDS.items()):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=len(words) + PADDING[name], tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(root / name)
        inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<s>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
        if name in TEMPLATES:
            tokenizer.chat_template = TEMPLATES[name]
        tokenizer.save_pretrained(root / name)
    return root


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def row(root: Path, name: str, table: str, word: str) -> Tensor | None:
    return weights(root / name)[table][WORDS[name].index(word)] if word in WORDS[name] else None


def expected(root: Path, table: str, word: str, names: tuple[str, ...], prefers_base: bool) -> dict[str, Tensor]:
    """The row of every model: its own, else the base's, else the mean of those that have one."""
    own = {name: row(root, name, table, word) for name in names}
    there = [each for each in own.values() if each is not None]
    default = own["origin"] if prefers_base and own["origin"] is not None else sum(there) / max(1, len(there))
    return {name: default if each is None else each for name, each in own.items()}


def placed(root: Path, content: Any) -> Any:
    """A recipe with the paths of the models in the place of their names."""
    if isinstance(content, dict):
        return {key: placed(root, each) for key, each in content.items()}
    if isinstance(content, list):
        return [placed(root, each) for each in content]
    return str(root / content) if content in WORDS else content


def run(root: Path, recipe: dict[str, Any], output: Path, *flags: str) -> int:
    output.with_suffix(".yaml").write_text(json.dumps(placed(root, recipe)))
    return main(["fuse", "--config", str(output.with_suffix(".yaml")), "--output", str(output), *flags])


MODELS = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("a", 0.5), ("b", 0.25))]
ARITHMETIC = {"merge_method": "task_arithmetic", "base_model": "origin", "models": MODELS}


@pytest.mark.parametrize("source", ["union", "base", "b"])
def test_task_arithmetic_by_token(source: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"union": UNION, "base": WORDS["origin"], "b": WORDS["b"]}[source]
    assert run(root, ARITHMETIC | {"tokenizer_source": source}, tmp_path / "out", "--dry_run") == 0
    assert f"{len(words)} tokens, of which not every model knows" in capsys.readouterr().out
    assert run(root, ARITHMETIC | {"tokenizer_source": source}, tmp_path / "out") == 0
    found = weights(tmp_path / "out")
    for table in TABLES:
        assert found[table].shape == (len(words), 8)
        for index, word in enumerate(words):
            each = expected(root, table, word, ("origin", "a", "b"), prefers_base=True)
            total = each["origin"] + 0.5 * (each["a"] - each["origin"]) + 0.25 * (each["b"] - each["origin"])
            torch.testing.assert_close(found[table][index], total)
    norm = "model.layers.1.mlp.up_proj.weight"
    base, a, b = (weights(root / name)[norm] for name in ("origin", "a", "b"))
    torch.testing.assert_close(found[norm], base + 0.5 * (a - base) + 0.25 * (b - base))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(words)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(list(range(len(words)))) == words
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(**tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)).logits.shape[-1] == len(
        words
    )


def test_an_average_has_no_base_to_prefer(root: Path, tmp_path: Path) -> None:
    listed = [{"model": name, "parameters": {"weight": 1.0}} for name in ("origin", "a", "b")]
    given = {"merge_method": "linear", "models": listed, "tokenizer_source": "union"}
    assert run(root, given, tmp_path / "out") == 0
    found = weights(tmp_path / "out")
    for table in TABLES:
        for index, word in enumerate(UNION):
            each = expected(root, table, word, ("origin", "a", "b"), prefers_base=False)
            torch.testing.assert_close(found[table][index], sum(each.values()) / 3)


def template_of(folder: Path) -> str:
    return str(transformers.AutoTokenizer.from_pretrained(folder).chat_template)


@pytest.mark.parametrize("given", ["auto", "text", "file"])
def test_chat_template(given: str, root: Path, tmp_path: Path) -> None:
    text = "{% for message in messages %}own{% endfor %}"
    (tmp_path / "own.jinja").write_text(text)
    value = {"auto": "auto", "text": text, "file": str(tmp_path / "own.jinja")}[given]
    assert (
        run(
            root,
            ARITHMETIC | {"tokenizer_source": "base_"},
            tmp_path / "out",
            "--tokenizer",
            "base",
            "--chat_template",
            value,
        )
        == 0
    )
    assert template_of(tmp_path / "out") == (TEMPLATES["a"] if given == "auto" else text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "has a vocabulary of 7 rows, the base one of 8"),
        ({"tokenizer": {"source": "union"}}, "'tokenizer' in"),
        ({"tokenizer_source": "union", "chat_template": "chatml"}, "chat_template: expected auto, a Jinja template or"),
        (
            {"tokenizer_source": "union", "chat_template": "{% for m in messages %}{{ m }"},
            "chat_template: it is no Jinja",
        ),
        ({"tokenizer_source": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_not_done_is_refused(
    more: dict[str, Any], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, ARITHMETIC | more, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_and_tied_embeddings_of_some(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "a")
    model.save_pretrained(tmp_path / "bare")
    models = [{"model": str(tmp_path / "bare"), "parameters": {"weight": 1.0}}]
    assert run(root, ARITHMETIC | {"models": models, "tokenizer_source": "union"}, tmp_path / "out") == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "bare")
    transformers.AutoTokenizer.from_pretrained(root / "a").save_pretrained(tmp_path / "bare")
    assert run(root, ARITHMETIC | {"models": models, "tokenizer_source": "union"}, tmp_path / "out") == 2
    assert "lm_head.weight has no row a token in 'bare', and has in others" in capsys.readouterr().err

"""The whole job on a tiny Llama through the commands: every method, its folders, stock PEFT and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from often import often
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionlab.__main__ import main

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
METHODS = ("lora", "l_lora", "tangent_lora", "tangent", "full")
WORDS = ("one", "two", "three", "four", "five")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of three tasks: words to rank, answers to generate, and texts."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "mood": [{"text": f"a film {i}", "label": i % 2} for i in range(60)],
        "count": [{"prompt": f"film {i}: {i % 5}:", "completion": f" {WORDS[i % 5]}", "id": i} for i in range(60)],
        "tale": [{"text": f"{WORDS[i % 5]} or {WORDS[i % 3]} film {i}"} for i in range(60)],
    }
    for name, of_task in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    tasks: list[dict[str, Any]] = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in rows]
    tasks[0] |= {"input_columns": ["text"], "label_words": ["positive", "negative"]}
    return ["--data", "ChatTasks", "--data.tasks", json.dumps(tasks), "--data.cache_dir", str(folder / "cache")]


@pytest.fixture(scope="module")
def run(
    causal_folder: Callable[[str], Path], data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[str]]]:
    """Runs by method and kind of model, two steps each, with the flags to score their folders with."""
    made: dict[tuple[str, ...], Path] = {}

    def of(method: str, kind: str = "llama", *more: str) -> tuple[Path, list[str]]:
        model = ["--model", "CausalModule", "--model.backbone", str(causal_folder(kind)), "--model.max_new_tokens", "4"]
        flags = [*model, *data]
        key = (method, kind, *more)
        if key not in made:
            root = tmp_path_factory.mktemp("runs") / "run"
            argv = ["fit", *flags, "--model.method", method, "--trainer.max_steps", "2", *more]
            argv += ["--fusion.rules", "[average, task_arithmetic, ties]", "--trainer.enable_progress_bar", "false"]
            assert main([*argv, "--trainer.default_root_dir", str(root)]) == 0
            made[key] = root
        return made[key], flags

    return of


def scores(folder: Path, **wanted: Any) -> dict[tuple[str, str], float]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return {(row["task"], row["metric"]): row["value"] for row in chosen}


@pytest.mark.parametrize("method", often(METHODS, "lora", "tangent_lora"))
def test_every_task_has_a_row_of_its_metric(run: Callable[..., Any], method: str) -> None:
    root, _ = run(method)
    metrics = {("mood", "accuracy"), ("mood", "near_ties"), ("count", "exact_match"), ("tale", "perplexity")}
    for wanted in ({"model": "pretrained"}, {"model": "finetuned"}, {"rule": "average"}, {"rule": "ties"}):
        assert set(scores(root, **wanted)) == metrics
    rows = json.loads((root / "results.json").read_text())["rows"]
    assert all(row["normalized"] is None for row in rows if row["metric"] == "perplexity")


@pytest.mark.parametrize(
    ("method", "kind"),
    often([*((method, "llama") for method in METHODS), ("lora", "gpt2"), ("full", "phi3")], "lora-llama", "full-phi3"),
)
@pytest.mark.parametrize("rule", ["average", "ties"])
def test_fused_folders_score_as_in_the_run(
    run: Callable[..., Any], tmp_path: Path, method: str, kind: str, rule: str
) -> None:
    root, flags = run(method, kind)
    argv = ["test", *flags, "--model.weights", str(root / "fused" / rule), "--model.method", method]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    found, expected = scores(tmp_path), scores(root, rule=rule)
    assert found.keys() == expected.keys()
    # the run holds the weights as it trained them, the folder as float32 on disk: perplexities to rounding
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "l_lora"])
@pytest.mark.parametrize("task", ["mood", "count"])
def test_stock_peft_gives_the_modules_logits(
    run: Callable[..., Any], causal_folder: Callable[[str], Path], method: str, task: str, kind: str
) -> None:
    from peft import PeftModel

    from fusionlab import CausalModule, load

    root, _ = run(method, kind)
    config = json.loads((root / "adapters" / task / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert "lm_head" not in config["target_modules"]
    base = AutoModelForCausalLM.from_pretrained(causal_folder(kind))
    ids = torch.arange(40, 70)[None]
    module = CausalModule(str(causal_folder(kind)))
    with torch.no_grad(), module.use(load(root / "adapters" / task)):
        expected = module.output(lambda: module.backbone.logits(ids))
        plain = module.backbone.model(ids).logits
    assert torch.equal(expected, plain)
    stock = PeftModel.from_pretrained(base, root / "adapters" / task).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=1e-5)
    merged = stock.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(causal_folder(kind))(ids).logits)


@pytest.mark.parametrize("rule", ["average", "ties"])
def test_fused_full_models_load_in_transformers_with_tokenizer_and_template(run: Callable[..., Any], rule: str) -> None:
    root, _ = run("full")
    model = AutoModelForCausalLM.from_pretrained(root / "fused" / rule)
    tokenizer = AutoTokenizer.from_pretrained(root / "fused" / rule)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_the_first_loss_of_a_zero_adapter_is_the_bases_own(
    causal_folder: Callable[[str], Path], run: Callable[..., Any], data: list[str]
) -> None:
    from fusionlab import CausalModule, ChatTasks

    tasks = json.loads(data[3])
    module = CausalModule(str(causal_folder("llama")))
    source = ChatTasks(tasks, tokenizer=module.backbone.tokenizer, cache_dir=data[5])
    source.setup()
    module.prepare_tasks(source.tasks)
    batch = next(iter(source.train_dataloader()))
    before = {task: module.loss(task, part).item() for task, part in batch.items()}
    from fusionlab import adapters

    adapters.inject(module.base_model, list(batch), target_modules=module.adaptation.target_modules)
    for task, part in batch.items():
        adapters.activate(module.base_model, task)
        assert module.loss(task, part).item() == before[task]


@pytest.mark.parametrize(
    "more",
    [
        ("--data.packing", "true", "--data.max_length", "128"),
        ("--model.gradient_checkpointing", "true"),
        ("--model.dtype", "bfloat16"),
        pytest.param(("--trainer.precision", "bf16-mixed"), marks=pytest.mark.slow),
        ("--model.ranking", "per_byte"),
        pytest.param(("--model.evaluation", "generate"), marks=pytest.mark.slow),
    ],
    ids=lambda more: more[0].rpartition(".")[2],
)
def test_options_run_from_fit_to_rows(run: Callable[..., Any], more: tuple[str, ...]) -> None:
    root, _ = run("lora", "llama", *more)
    found = {metric for task, metric in scores(root, rule="average") if task == "mood"}
    special = {"--model.ranking": {"accuracy_per_byte", "near_ties"}, "--model.evaluation": {"exact_match"}}
    assert found == special.get(more[0], {"accuracy", "near_ties"})


def test_gradient_checkpointing_changes_no_weight(run: Callable[..., Any]) -> None:
    from fusionlab import load

    plain, checkpointed = run("lora")[0], run("lora", "llama", "--model.gradient_checkpointing", "true")[0]
    for task in ("mood", "count", "tale"):
        first, second = (load(root / "adapters" / task) for root in (plain, checkpointed))
        for module, factors in first.factors.items():
            torch.testing.assert_close(second.factors[module].lora_b, factors.lora_b, rtol=0, atol=1e-6)


def test_predict_generates_and_ranks(run: Callable[..., Any], tmp_path: Path) -> None:
    root, flags = run("lora")
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "3:", "id": 7},
        {"messages": [{"role": "user", "content": "a film\u2028review"}]},
        {"instruction": "a film", "input": "x", "choices": ["positive", "negative"]},
    ]
    prompts.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    argv = ["predict", *flags[:6], "--data", "ChatTasks", "--data.prompts", str(prompts)]
    argv += ["--model.weights", str(root / "fused" / "average"), "--output", str(tmp_path / "out.jsonl")]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "predict")]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n") if line]
    assert [{key: row[key] for key in given} for row, given in zip(found, rows, strict=True)] == rows
    assert found[2]["answer"] in ("positive", "negative")
    best = max(range(2), key=lambda place: found[2]["scores"][place])
    assert rows[2]["choices"][best] == found[2]["answer"]
    assert all(isinstance(row["answer"], str) for row in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "line 1 is not JSON"),
        ('{"prompt": "x"}\n[1]\n', "line 2: expected a mapping"),
        ('{"question": "x"}\n', "line 1: a row needs messages, a prompt or an instruction"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "line 1: the last message is the assistant's"),
        ('{"prompt": "x", "choices": ["a"]}\n', "line 1: choices must be a list of at least two texts"),
        ("\n", "no question in"),
    ],
)
def test_prompts_that_are_none_are_refused(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    _, flags = run("lora")
    (tmp_path / "prompts.jsonl").write_text(text)
    argv = ["predict", *flags[:6], "--data", "ChatTasks", "--data.prompts", str(tmp_path / "prompts.jsonl")]
    argv += ["--output", str(tmp_path / "out.jsonl"), "--trainer.default_root_dir", str(tmp_path / "predict")]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_an_adapter_of_transposed_layers_knows_how_its_base_stores_them(
    run: Callable[..., Any], causal_folder: Callable[[str], Path]
) -> None:
    from oracles import merge_adapter

    from fusionlab import CausalModule
    from fusionlab.adapters import base_state
    from fusionlab.runs.loading import load_weights

    root, _ = run("lora", "gpt2")
    module = CausalModule(str(causal_folder("gpt2")))
    adapter = load_weights(root / "adapters" / "mood", module.base_model).weights
    assert {factors.layout for factors in adapter.factors.values()} == {"transposed"}
    ids = torch.arange(40, 70)[None]
    with torch.no_grad():
        with module.use(adapter):
            expected = module.backbone.logits(ids)
        with module.use(merge_adapter(base_state(module.base_model), adapter)):
            found = module.output(lambda: module.backbone.logits(ids))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("clip", "needs a causal language model, and 'tiny-clip' is a CLIPModel"),
        ("without tokenizer", "has no tokenizer that can be read"),
        ("short", "has ids up to 309, its model embeds 300 tokens"),
        ("quantized", "is quantized, and adapters are trained on the weights themselves"),
        ("dtype", "dtype must be float32 or bfloat16, got 'float16'"),
        ("target", "target module 'query' matches no layer"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(
    causal_folder: Callable[[str], Path], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    kind: str, message: str,
) -> None:  # fmt: skip
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(causal_folder("llama"), folder)
    flags = ["--model.backbone", "tiny-clip" if kind == "clip" else str(folder)]
    if kind == "without tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    if kind == "short":
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(300)
        model.save_pretrained(folder)
    if kind == "quantized":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))
    flags += {"dtype": ["--model.dtype", "float16"], "target": ["--model.target_modules", "[query]"]}.get(kind, [])
    argv = ["fit", "--model", "CausalModule", *flags, *data, "--trainer.max_steps", "1"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "[1]", "could not be loaded"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id '</s>'; expected the id of a token, or"),
        (
            "generation_config.json",
            '{"eos_token_id": [[2]]}',
            r"eos_token_id \[\[2\]\]; expected the id of a token, or",
        ),
        ("config.json", "[1]", "could not be loaded"),
        ("tokenizer_config.json", "[1]", "has no tokenizer that can be read"),
        ("tokenizer.json", "[1]", "has no tokenizer that can be read"),
    ],
)
def test_files_of_another_kind_are_refused(
    causal_folder: Callable[[str], Path], tmp_path: Path, file: str, content: str, message: str
) -> None:
    import shutil

    from fusionlab.backbones.causal import CausalBackbone
    from fusionlab.errors import InputError

    folder = tmp_path / "model"
    shutil.copytree(causal_folder("llama"), folder)
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        CausalBackbone.load(str(folder), name="odd")

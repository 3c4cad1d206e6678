"""lm-eval on the weights of a module: its log-likelihoods are ours, and its rows stand beside ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from fusionlab.__main__ import main
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.errors import InputError
from fusionlab.modules import CausalModule

pytest.importorskip("lm_eval")
from fusionlab.harness import HarnessTasks
from fusionlab.harness.bridge import bridged

pytestmark = [
    # PEFT asks transformers for a property under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # lm-eval's own libraries
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
METHODS = ("lora", "l_lora", "tangent_lora", "tangent", "full")
WORDS = ("one", "two", "three", "four", "five")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Tasks of lm-eval on local JSON: choices, texts, and generated answers."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"film {i} or {WORDS[i % 3]}", "choices": ["one", "two three", "four"], "answer": i % 3}
        for i in range(7)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "metadata": {"version": 3},
    }  # fmt: skip
    choices = {
        "task": "choose", **common, "output_type": "multiple_choice", "doc_to_text": "{{question}}:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
        ],
    }  # fmt: skip
    texts = {
        "task": "read", **common, "output_type": "loglikelihood", "doc_to_text": "{{question}}:",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }  # fmt: skip
    said = {
        "task": "say", **common, "output_type": "generate_until", "doc_to_text": "{{question}}:",
        "doc_to_target": "{{choices[answer]}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    return {"choose": choices, "read": texts, "say": said}


@pytest.fixture(scope="module")
def flags(causal_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    tasks = []
    for name in ("count", "tale"):
        rows = [{"prompt": f"{name} {i}:", "completion": f" {WORDS[i % 5]}"} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"name": name, "path": str(folder / f"{name}.jsonl")})
    model = ["--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), "--model.max_new_tokens", "4"]
    data = ["--data", "ChatTasks", "--data.tasks", json.dumps(tasks), "--data.cache_dir", str(folder / "cache")]
    return [*model, *data, "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def fitted(
    flags: list[str], local: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Runs of two steps by method, scored by lm-eval too."""
    made: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("runs") / method
            asked = [local["choose"], *([] if "tangent" in method else [local["say"]])]
            argv = ["fit", *flags, "--model.method", method, "--trainer.max_steps", "2", "--fusion.rules", "[average]"]
            argv += ["--model.learning_rate", ".01", "--harness", json.dumps(asked)]
            assert main([*argv, "--trainer.default_root_dir", str(made[method])]) == 0
        return made[method]

    return of


def rows_of(folder: Path, file: str = "results.json") -> list[dict[str, Any]]:
    return [row for row in json.loads((folder / file).read_text())["rows"] if "lm_eval" in row]


def check_log_likelihoods(module: CausalModule) -> None:
    module.eval()
    tokenizer = module.backbone.tokenizer
    prompts = [tokenizer.encode(text) for text in ("film:", "the answer is one, two three:", "a film review five or")]
    answers = [tokenizer.encode(text) for text in (" one", " two three", " positive or negative", "x")]
    requests = [(("", ""), prompt, answer) for prompt in prompts for answer in answers]
    with torch.no_grad():
        found = bridged(module, 3)._loglikelihood_tokens(requests, disable_tqdm=True)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
        ours = module.backbone.log_likelihoods(ids, mask, AnswerTree.of(answers), module.output).sum(2)
    assert [value for value, _ in found] == pytest.approx(ours.flatten().tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "phi3"])
def test_log_likelihoods_are_ours(causal_folder: Callable[[str], Path], kind: str) -> None:
    check_log_likelihoods(CausalModule(str(causal_folder(kind))))


@pytest.mark.parametrize("method", METHODS)
def test_log_likelihoods_of_fused_weights_are_ours(
    causal_folder: Callable[[str], Path], fitted: Callable[[str], Path], method: str
) -> None:
    from fusionlab import load

    module = CausalModule(str(causal_folder("llama")), method=method)
    with module.use(load(fitted(method) / "fused" / "average").weights):
        check_log_likelihoods(module)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_every_model_say_how_lm_eval_scored(fitted: Callable[[str], Path], method: str) -> None:
    root = fitted(method)
    rows = rows_of(root)
    models = [(row["model"], row["finetuned_on"], row["rule"]) for row in rows if row["metric"] == "acc"]
    assert models == [
        ("pretrained", None, None),
        ("finetuned", "count", None),
        ("finetuned", "tale", None),
        ("fused", None, "average"),
    ]
    metrics = [
        "choose acc",
        "choose acc_norm",
        "choose brier_score",
        *([] if "tangent" in method else ["say exact_match"]),
    ]
    assert list(dict.fromkeys(f"{row['task']} {row['metric']}" for row in rows)) == metrics
    for row in rows:
        own = row["lm_eval"]
        assert (own["version"], own["num_fewshot"], own["limit"]) == (3, 0, None)
        assert own["apply_chat_template"] is False
        assert row["num_samples"] == 7
        assert row["normalized"] is row["denominator"] is None
        assert (row["stderr"] is None) == (row["metric"] == "brier_score")
        assert row["higher_is_better"] == (row["metric"] != "brier_score")
    assert len({row["value"] for row in rows if row["metric"] == "brier_score"}) == 4, "other weights, other values"
    assert "Scored by lm-eval" in (root / "results.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_folders_score_as_in_the_run(
    fitted: Callable[[str], Path], flags: list[str], local: dict[str, dict[str, Any]], tmp_path: Path, method: str
) -> None:
    root = fitted(method)
    file = tmp_path / "choose.yaml"
    file.write_text(yaml.safe_dump(local["choose"]))
    asked = json.dumps([str(file)])
    argv = ["test", *flags, "--model.method", method, "--model.weights", str(root / "fused" / "average")]
    assert main([*argv, "--harness", asked, "--trainer.default_root_dir", str(tmp_path / "test")]) == 0
    found = {(row["task"], row["metric"]): row["value"] for row in rows_of(tmp_path / "test")}
    expected = {(row["task"], row["metric"]): row["value"] for row in rows_of(root) if row["rule"] == "average"}
    assert found == pytest.approx({key: value for key, value in expected.items() if key[0] != "say"}, rel=1e-4)


def test_few_shots_and_a_limit_are_said(flags: list[str], local: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    shown = local["choose"] | {"task": "shown", "fewshot_split": "test"}
    argv = ["test", *flags, "--harness", json.dumps([shown]), "--harness_limit", "3", "--harness_num_fewshot", "2"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    (acc,) = [row for row in rows_of(tmp_path) if row["metric"] == "acc"]
    assert acc["num_samples"] == 3
    assert (acc["lm_eval"]["num_fewshot"], acc["lm_eval"]["limit"]) == (2, 3)


@pytest.mark.parametrize(
    ("context", "answer", "spans"),
    [
        ("film:", " one", False),
        ("a fil", "m or", True),
        ("it is pos", "itive one", True),
        ("or ", "one", False),
        ("a", ", b", False),
    ],
)
def test_rows_whose_border_tokens_differ_are_counted(
    causal_folder: Callable[[str], Path], context: str, answer: str, spans: bool
) -> None:
    model = bridged(CausalModule(str(causal_folder("llama"))), 2)
    request = SimpleNamespace(args=(context, answer), task_name="own", doc_id=4)
    model.loglikelihood([request, request], disable_tqdm=True)
    assert model.spanned == ({"own": {4}} if spans else {})


def test_perplexities_have_a_standard_error_by_the_default_bootstrap(
    causal_folder: Callable[[str], Path], local: dict[str, dict[str, Any]]
) -> None:
    (row,) = HarnessTasks.load([local["read"]]).rows(CausalModule(str(causal_folder("llama"))), 2, model="pretrained")
    assert (row["model"], row["metric"], row["split"]) == ("pretrained", "perplexity", "test")
    assert row["stderr"] > 0


def test_the_modules_tokenizer_and_modes_stay_as_they_are(
    causal_folder: Callable[[str], Path], local: dict[str, dict[str, Any]]
) -> None:
    module = CausalModule(str(causal_folder("llama")))
    module.backbone.tokenizer.pad_token = None
    module.train()
    before = [part.training for part in module.modules()]
    HarnessTasks.load([local["choose"]]).rows(module, 2)
    assert [part.training for part in module.modules()] == before
    assert module.backbone.tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--harness", "[arc_eazy]"], "lm-eval has no task 'arc_eazy'; did you mean 'arc_easy'?"),
        (["--harness", "[gone.yaml]"], "no file 'gone.yaml'"),
        (["--harness", "[{output_type: multiple_choice}]"], "a mapping needs a task, its name"),
        (["--harness", "[]"], "harness: no task"),
        (["--harness_limit", "3"], "do nothing without --harness"),
        (["--harness", "[choose]", "--harness_limit", "0"], "harness_limit must be at least 1, got 0"),
        (["--harness", "[count]"], "count is a task of the data too"),
        (["--harness", "[say]", "--model.method", "tangent"], "say generates answers by transformers' own loop"),
        (["--harness", "[say]", "--model.method", "tangent_lora"], "say generates answers by transformers' own loop"),
        (["--harness", "[choose]", "--train_only", "true"], "train_only scores nothing by lm-eval"),
        (["--harness", "[lost]"], "lost cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_scored_is_refused_before_training(
    flags: list[str], local: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], message: str,
) -> None:  # fmt: skip
    lost = local["choose"] | {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}}}
    known = {**local, "count": local["choose"] | {"task": "count"}, "lost": lost}
    more = [json.dumps([known[word[1:-1]]]) if word.startswith("[") and word[1:-1] in known else word for word in more]
    argv = ["fit", *flags, "--trainer.max_steps", "1", *more, "--trainer.default_root_dir", str(tmp_path / "run")]
    if "--train_only" in more:
        argv.remove("true")
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_modules_and_commands_are_refused(
    flags: list[str], local: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--harness", json.dumps([local["choose"]]), "--trainer.default_root_dir", str(tmp_path / "run")]
    assert main(["validate", *flags, *asked]) == 2
    assert "validate scores nothing by lm-eval" in capsys.readouterr().err
    assert main(["test", "--data.tasks", "[digits]", *asked]) == 2
    assert "lm-eval scores causal language models, and ClipModule has none" in capsys.readouterr().err


def test_tangents_do_not_generate(causal_folder: Callable[[str], Path], fitted: Callable[[str], Path]) -> None:
    from fusionlab import load

    module = CausalModule(str(causal_folder("llama")), method="tangent_lora")
    weights = load(fitted("tangent_lora") / "adapters" / "count")
    with module.use(weights), pytest.raises(InputError, match="whole-network tangents do not pass through"):
        bridged(module, 2).model.generate(input_ids=torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.network
def test_tasks_of_the_hub(flags: list[str], tmp_path: Path) -> None:
    argv = ["test", *flags, "--harness", "[arc_easy]", "--harness_limit", "5"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    assert {row["metric"] for row in rows_of(tmp_path)} == {"acc", "acc_norm"}

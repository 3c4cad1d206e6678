"""Public kinds of fault of instruction data, each with its right tokens or numbers, from ``../shared/lm_cases``."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionlab import CausalModule, ChatTasks
from fusionlab.data.loader import StepLoader
from fusionlab.errors import InputError

CASES = Path(__file__).parents[2] / ".." / "shared" / "lm_cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases are not at {CASES}")


def of_cases(name: str) -> Any:
    return json.loads((CASES / name).read_text()) if CASES.is_dir() else {}


@pytest.fixture(scope="module")
def made() -> Any:
    """The functions of ``make_base.py``, without the run at its end."""
    source = (CASES / "make_base.py").read_text().rpartition("\nbase(")[0]
    names: dict[str, Any] = {"__file__": str(CASES / "make_base.py"), "__name__": "make_base"}
    exec(compile(source, "make_base.py", "exec"), names)
    return type("Made", (), {"tokenizer": staticmethod(names["tokenizer"]), "base": staticmethod(names["base"])})


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CASES / "rows" / f"{name}.jsonl").read_text().splitlines()]


def folder_of(name: str, parent: Path) -> Path:
    folder = parent / name
    folder.mkdir()
    for split in ("train", "validation", "test"):
        shutil.copyfile(CASES / "rows" / f"{name}.jsonl", folder / f"{split}.jsonl")
    return folder


def chat_tasks(made: Any, case: dict[str, Any], folder: Path, **options: Any) -> ChatTasks:
    tokenizer = made.tokenizer(CASES / "tokenizer", case["tokenizer"])
    template = str(CASES / "templates" / f"{case['template']}.jinja") if case["template"] else "none"
    task = {"name": case["rows"], "path": str(folder_of(case["rows"], folder))}
    limit = {"max_length": case["max_length"]} if "max_length" in case else {}
    cache = str(folder / "cache")
    return ChatTasks([task], tokenizer=tokenizer, chat_template_path=template, cache_dir=cache, **limit, **options)


@pytest.mark.parametrize("case", of_cases("cases.json"), ids=lambda case: case["id"])
def test_a_row_becomes_the_right_tokens(made: Any, case: dict[str, Any], tmp_path: Path) -> None:
    data = chat_tasks(made, case, tmp_path)
    for row, expected in zip(rows_of(case["rows"]), of_cases("expected.json")[case["id"]], strict=True):
        if "refused" in expected:
            with pytest.raises(InputError, match=expected["refused"]):
                data.encode(case["rows"], row)
            continue
        found = data.encode(case["rows"], row)
        learnt = {place for place, label in enumerate(found["labels"]) if label != -100}
        free = set(expected["either"])
        assert found["input_ids"] == expected["input_ids"]
        assert learnt - free == set(expected["learnt"]) - free
        assert all(found["labels"][place] == found["input_ids"][place] for place in learnt)
        assert found["prompt_ids"] == expected["prompt_ids"]


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in of_cases("cases.json")
        if not any("refused" in row for row in of_cases("expected.json")[case["id"]])
    ],
    ids=lambda case: case["id"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_learns_what_its_rows_learn_alone(made: Any, case: dict[str, Any], side: str, tmp_path: Path) -> None:
    data = chat_tasks(made, case, tmp_path)
    data.tokenizer.padding_side = side
    data.setup()
    split = data.splits[case["rows"]]["train"]
    batch = split.batch(torch.arange(len(split)))
    for place, row in enumerate(rows_of(case["rows"])):
        alone = data.encode(case["rows"], row)
        length = len(alone["input_ids"])
        assert batch["input_ids"][place, :length].tolist() == alone["input_ids"]
        assert batch["labels"][place].tolist() == [*alone["labels"], *[-100] * (batch["labels"].shape[1] - length)]
        prompt = batch["prompt_ids"][place][batch["prompt_mask"][place]].tolist()
        assert prompt == alone["prompt_ids"]


@pytest.mark.parametrize("case", ["truncated", "roles_refused", "no_answer", "no_completion"])
def test_a_file_with_rows_that_cannot_be_learnt_is_refused_by_their_numbers(
    made: Any, case: str, tmp_path: Path
) -> None:
    (chosen,) = (one for one in of_cases("cases.json") if one["id"] == case)
    expected = of_cases("expected.json")[case]
    numbers = [f"row {number}: .*" for number, row in enumerate(expected) if "refused" in row]
    data = chat_tasks(made, chosen, tmp_path)
    with pytest.raises(InputError, match=f"{len(numbers)} of {len(expected)} rows of .*" + "".join(numbers)):
        data.setup()


def test_rows_with_nothing_to_learn_are_left_out_and_counted(
    made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (case,) = (one for one in of_cases("cases.json") if one["id"] == "truncated")
    data = chat_tasks(made, case, tmp_path, on_empty="skip")
    data.setup("test")
    assert len(data.splits["long"]["test"]) == 2
    assert "1 of 3 rows of task 'long' (test) have nothing to learn and were left out: row 0" in caplog.text
    assert "1 of 3 samples of task 'long' (test) are longer than max_length 8 and were cut" in caplog.text


@pytest.fixture(scope="module")
def module(made: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalModule:
    folder = tmp_path_factory.mktemp("base") / "base"
    made.base(CASES / "tokenizer", folder, "plain", "-")
    return CausalModule(str(folder))


@pytest.fixture(scope="module")
def sampling_module(made: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalModule:
    folder = tmp_path_factory.mktemp("sampling") / "base"
    made.base(CASES / "tokenizer", folder, "plain", "-", "sampling")
    return CausalModule(str(folder))


@pytest.mark.parametrize(("batch_size", "accumulated"), [(2, 1), (1, 2)])
def test_the_loss_is_the_mean_over_a_steps_learnt_tokens(
    module: CausalModule, tmp_path: Path, batch_size: int, accumulated: int
) -> None:
    expected = of_cases("numbers.json")["accumulate"]
    data = ChatTasks(
        [{"name": "unequal", "path": str(folder_of("unequal", tmp_path))}],
        tokenizer=module.backbone.tokenizer,
        cache_dir=str(tmp_path / "cache"),
    )
    data.setup()
    splits = {"unequal": data.splits["unequal"]["train"]}
    loader = StepLoader(splits, batch_size, seed=0, length_multiple=accumulated, loss_counts=data.loss_counts(splits))
    losses = [module.loss("unequal", batch["unequal"]).item() for batch in loader]
    assert len(losses) == accumulated
    assert sum(losses) / accumulated == pytest.approx(expected["loss"], abs=1e-4)
    assert expected["loss"] != pytest.approx(expected["wrong_mean_of_means"], abs=0.1)


def test_packed_samples_lose_what_they_lose_apart(module: CausalModule, tmp_path: Path) -> None:
    expected = of_cases("numbers.json")["pack"]
    data = ChatTasks(
        [{"name": "unequal", "path": str(folder_of("unequal", tmp_path))}],
        packing=True,
        max_length=27,
        tokenizer=module.backbone.tokenizer,
        cache_dir=str(tmp_path / "cache"),
    )
    data.setup()
    split = data.splits["unequal"]["train"]
    assert len(split) == 1
    batch = split.batch(torch.tensor([0]))
    losses, counts = module._token_losses(batch)
    assert counts.tolist() == [15]
    assert losses.item() == pytest.approx(expected["summed_loss"], abs=1e-3)


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_answers_are_plain_argmax(sampling_module: CausalModule, cached: bool) -> None:
    expected = of_cases("numbers.json")["greedy"]
    backbone = sampling_module.backbone
    assert backbone.model.generation_config.repetition_penalty == 3.0
    longest = max(len(row["prompt_ids"]) for row in expected["rows"])
    ids = torch.zeros(len(expected["rows"]), longest, dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for place, row in enumerate(expected["rows"]):
        ids[place, longest - len(row["prompt_ids"]) :] = torch.tensor(row["prompt_ids"])
        mask[place, longest - len(row["prompt_ids"]) :] = True
    new = backbone.generate(ids, mask, expected["max_new_tokens"], backbone.end_ids(), cached=cached)
    assert new == [row["new_ids"] for row in expected["rows"]]


def test_make_base_is_the_one_these_tests_were_written_for() -> None:
    assert importlib.util.spec_from_file_location("make_base", CASES / "make_base.py") is not None
    assert "\nbase(*sys.argv[1:])" in (CASES / "make_base.py").read_text()

"""What must hold of every rule on whole matrices, for task matrices that have full rank, low rank, or one space."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from often import often
from safetensors.torch import save_file
from torch import Tensor

from fusionlab import adapters, rules
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors
from fusionlab.engine import fuse
from fusionlab.fusion.making import fuse_weights
from fusionlab.rules.config import from_config, known_rules
from fusionlab.rules.matrix_rule import MatrixRule

ARGUMENTS: dict[str, dict[str, Any]] = {"knots": {"density": 0.5}}
RULES = {
    name: from_config({"class_path": name, "init_args": ARGUMENTS.get(name, {})})
    for name, rule in known_rules().items()
    if issubclass(rule, MatrixRule)
} | {"wudi by adam": rules.Wudi(solver="adam"), "wudi in closed form": rules.Wudi(solver="closed_form")}
# TIES looks at entries of the right blocks: a turn of the right side's basis is another problem; Adam at all entries
SIDES = {"knots": "left", "wudi by adam": "none"}
KINDS = [
    "full", "low rank", "equal A", "equal B", "one zero", "one task", "twice", "vectors",
    "A apart by 1e-1", "A apart by 1e-2", "A apart by 1e-3", "A apart by 1e-7", "A apart by 1e-9",
]  # fmt: skip
SHAPES = {"tall": (36, 28), "wide": (20, 34), "square": (24, 24), "narrow": (40, 3)}

OFTEN = often(KINDS, "full", "low rank", "equal A", "one zero", "A apart by 1e-3")

Matrices = Callable[..., list[Tensor]]


def shapes_of(name: str) -> list[tuple[int, int]]:
    """All, but where the closed form of WUDI refuses: rows that together nearly fill the width."""
    return [shape for key, shape in SHAPES.items() if name != "wudi in closed form" or key != "narrow"]


def run(rule: Any, matrices: list[Tensor]) -> Tensor:
    """The update of the rule, float64."""
    base = {"w": torch.zeros_like(matrices[0])}
    return fuse(rule, base, {f"task {number}": {"w": each} for number, each in enumerate(matrices)}).state["w"]


def relative(found: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((found - expected).norm()) / (scale or 1.0)


def condition(matrix: Tensor) -> float:
    """σ_max/σ_min of what is kept."""
    sigma = torch.linalg.svdvals(matrix)
    kept = sigma[sigma > 1e-5 * sigma[0]]
    return float(kept[0] / kept[-1]) if len(kept) else 1.0


def conditions(matrices: list[Tensor]) -> float:
    """The worst of the decompositions: of each task's matrix times that of all vectors side by side."""
    found = [condition(each) for each in matrices]
    vectors = []
    for matrix in matrices:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = min(int((sigma > 1e-5 * sigma[0]).sum()), max(1, min(matrix.shape) // len(matrices)))
        vectors.append((left[:, :rank], right[:rank]))
    lefts, rights = torch.cat([left for left, _ in vectors], dim=1), torch.cat([right for _, right in vectors])
    return max(found) * max(condition(lefts), condition(rights))


def noisy(matrices: list[Tensor], noise: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [
        each
        + noise * each.norm() * torch.randn(each.shape, generator=generator, dtype=torch.float64) / each.numel() ** 0.5
        for each in matrices
    ]


def turn(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def test_all_rules_on_matrices_are_tested_here() -> None:
    assert {"tsv_m", "iso_c", "knots"} <= RULES.keys()
    on_tensors = {name for name, rule in known_rules().items() if getattr(rule, "granularity", "") == "tensor"}
    assert on_tensors == {
        name for name in RULES if " " not in name
    }  # DELLA, which ranks the rows of tensors, is a transform


@pytest.mark.parametrize("kind", OFTEN)
@pytest.mark.parametrize("name", RULES)
def test_noise_moves_the_result_by_no_more_than_the_condition_of_what_is_kept(
    name: str, kind: str, task_matrices: Matrices
) -> None:
    for shape in shapes_of(name):
        matrices = task_matrices(kind, *shape)
        clean = run(RULES[name], matrices)
        assert clean.norm() > 0
        for noise in (1e-12, 1e-10):
            moved = relative(run(RULES[name], noisy(matrices, noise)), clean)
            assert moved < 100 * noise * conditions(matrices), (shape, noise)


@pytest.mark.parametrize("kind", OFTEN)
@pytest.mark.parametrize("name", RULES)
def test_the_order_of_tasks_does_not_matter(name: str, kind: str, task_matrices: Matrices) -> None:
    for shape in shapes_of(name):
        matrices = task_matrices(kind, *shape)
        clean = run(RULES[name], matrices)
        for others in (matrices[::-1], matrices[1:] + matrices[:1]):
            assert relative(run(RULES[name], others), clean) < 1e-13 * conditions(matrices) + 1e-12, shape


@pytest.mark.parametrize("kind", OFTEN)
@pytest.mark.parametrize("name", RULES)
def test_an_orthogonal_change_of_basis_turns_the_result(name: str, kind: str, task_matrices: Matrices) -> None:
    for shape in shapes_of(name):
        matrices = task_matrices(kind, *shape)
        sides = SIDES.get(name, "both")
        assert RULES[name].sides == sides
        left = turn(shape[0], 1) if sides != "none" else torch.eye(shape[0], dtype=torch.float64)
        right = turn(shape[1], 2) if sides == "both" else torch.eye(shape[1], dtype=torch.float64)
        turned = run(RULES[name], [left @ each @ right for each in matrices])
        assert relative(turned, left @ run(RULES[name], matrices) @ right) < 1e-13 * conditions(matrices) + 1e-12, shape


@pytest.mark.parametrize("name", RULES)
def test_factors_that_are_equal_but_for_rounding_are_equal(name: str, task_matrices: Matrices) -> None:
    """A that differs by at most 1e-7 gives what equal A gives, up to that difference."""
    for shape in shapes_of(name):
        equal = run(RULES[name], task_matrices("equal A", *shape))
        for apart in ("1e-7", "1e-9", "1e-12"):
            found = run(RULES[name], task_matrices(f"A apart by {apart}", *shape))
            assert relative(found, equal) < 300 * float(apart), (shape, apart)


@pytest.mark.parametrize("name", RULES)
def test_zero_task_matrices_give_nothing(name: str, task_matrices: Matrices) -> None:
    assert not run(RULES[name], task_matrices("all zero")).any()


@pytest.mark.parametrize("kind", ["full", "low rank", "A apart by 1e-1"])
def test_full_rank_is_as_before(kind: str, task_matrices: Matrices) -> None:
    """TSV-M where nothing is deficient: the polar factors of all directions, from whole decompositions."""
    for rows, columns in ((36, 28), (20, 34)):
        matrices = task_matrices(kind, rows, columns, num_tasks=3)
        lefts, sigmas, rights = [], [], []
        for matrix in matrices:
            left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
            rank = min(min(rows, columns) // 3, int((sigma > 1e-5 * sigma[0]).sum()))
            lefts, sigmas, rights = [*lefts, left[:, :rank]], [*sigmas, sigma[:rank]], [*rights, right[:rank]]
        polar = []
        for whole in (torch.cat(lefts, dim=1), torch.cat(rights)):
            left, _, right = torch.linalg.svd(whole, full_matrices=False)
            polar.append(left @ right)
        expected = polar[0] @ torch.diag(torch.cat(sigmas)) @ polar[1]
        assert relative(run(rules.TsvM(), matrices), expected) < 1e-12


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 7])
def test_one_a_for_all_shortens_the_update_by_the_root_of_their_number(num_tasks: int, task_matrices: Matrices) -> None:
    """Orthogonal B over one A: U' is U, and V' is each V with 1/√T of its length."""
    right = turn(30, 1)[:2]
    matrices = [3.0 * turn(40, 2)[:, 2 * task : 2 * task + 2] @ right for task in range(num_tasks)]
    found = run(rules.TsvM(), matrices)
    torch.testing.assert_close(found, sum(matrices) / num_tasks**0.5, rtol=0, atol=1e-12)


def adapter(seed: int, apart: float) -> Adapter:
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    factors = {}
    for module in ("layers.0.q", "layers.1.q"):
        lora_a = torch.randn(3, 20, generator=shared, dtype=torch.float64)
        if module == "layers.1.q":
            lora_a = lora_a + apart * torch.randn(3, 20, generator=own, dtype=torch.float64)
        factors[module] = Factors(lora_a, torch.randn(24, 3, generator=own, dtype=torch.float64), 3.0)
    return Adapter(factors)


@pytest.mark.parametrize(("apart", "words"), [(3e-5, "kept"), (3e-6, "dropped"), (1e-3, ""), (0.0, "")])
def test_a_doubtful_rank_is_named(apart: float, words: str, tmp_path: Path) -> None:
    """A σ within ten times of the cut: in ``fuse``, from Python and in the run, for the tensor that has it."""
    made = {f"task {seed}": adapter(seed, apart) for seed in (1, 2, 3)}
    base = {f"layers.{number}.q.weight": torch.zeros(24, 20, dtype=torch.float64) for number in (0, 1)}
    fused = fuse(rules.TsvM(), base, {task: each.task_vector() for task, each in made.items()})
    in_run = fuse_weights(rules.TsvM(), base, made)
    assert fused.remarks == in_run.remarks
    assert list(fused.remarks) == (["layers.1.q.weight"] if words else [])
    for sentence in fused.remarks.get("layers.1.q.weight", ()):
        assert "right vectors of all tasks side by side" in sentence
        assert "within ten times of the cut" in sentence
        assert words in sentence
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "base" / "config.json").write_text("{}")
    for task, each in made.items():
        adapters.save_adapter(tmp_path / task, each)
    recipe = {"base": str(tmp_path / "base"), "finetuned": {task: str(tmp_path / task) for task in made}}
    recipe |= {"output": str(tmp_path / "out"), "rule": "tsv_m"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert list(json.loads((tmp_path / "out" / "fusion.json").read_text())["remarks"]) == list(fused.remarks)


def test_rules_that_depend_on_order_or_draws_are_known() -> None:
    """Slerp by definition; DARE, alone and in DELLA, draws by the task's name and not by its place."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(6, 5, generator=generator) for _ in range(2))
    base = {"w": torch.randn(6, 5, generator=generator)}
    forwards = fuse(rules.Slerp(0.3), base, {"a": {"w": first}, "b": {"w": second}}).state["w"]
    backwards = fuse(rules.Slerp(0.3), base, {"b": {"w": second}, "a": {"w": first}}).state["w"]
    assert not torch.allclose(forwards, backwards)
    rule = rules.Dare(rules.TaskArithmetic(1.0))
    forwards = fuse(rule, base, {"a": {"w": first}, "b": {"w": second}}).state["w"]
    backwards = fuse(rule, base, {"b": {"w": second}, "a": {"w": first}}).state["w"]
    renamed = fuse(rule, base, {"b": {"w": first}, "a": {"w": second}}).state["w"]
    torch.testing.assert_close(forwards, backwards)
    assert not torch.allclose(forwards, renamed)


def recipe_of(folder: Path, rank: int, **rule: Any) -> list[str]:
    """Three adapters on two layers of 24 x 20, and the arguments that fuse them."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{number}.q.weight": torch.zeros(24, 20) for number in (0, 1)}
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    (folder / "base" / "config.json").write_text("{}")
    recipe = {"base": str(folder / "base"), "output": str(folder / "out"), "finetuned": {}}
    recipe["rule"] = {"class_path": "wudi", "init_args": rule}
    for task in "abc":
        factors = {
            name.removesuffix(".weight"): Factors(
                torch.randn(rank, 20, generator=generator), torch.randn(24, rank, generator=generator), 2.0
            )
            for name in base
        }
        adapters.save_adapter(folder / task, Adapter(factors))
        recipe["finetuned"][task] = str(folder / task)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["fuse", "--config", str(folder / "recipe.yaml")]


def test_the_plan_says_how_long_many_steps_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = recipe_of(tmp_path, 2, solver="adam", num_steps=1000)
    assert main([*argv, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert re.search(
        r"forecast +about [0-9.e-]+ s for 3.8e\+07 operations, by a product of 24 x 20", plan
    )  # 2·1000·2·24·20²
    assert main(argv) == 0
    assert "forecast: about" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    assert main([*recipe_of(tmp_path / "other", 2, solver="closed_form"), "--dry_run"]) == 0
    assert "forecast" not in capsys.readouterr().out


def test_the_plan_refuses_ranks_that_fill_the_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*recipe_of(tmp_path, 6, solver="closed_form"), "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert "the closed form of layers.0.q.weight follows noise: 3 task vectors have a rank of 18 together" in said
    assert "near the width of 20; say solver: gradient" in said

"""Rules over many adapters whose task vectors take more memory than the engine's usual budget, in memory."""

from __future__ import annotations

import pytest
import torch

from fusionlab.adapters import Adapter, Factors
from fusionlab.engine import Resources
from fusionlab.engine import job as engine_job
from fusionlab.errors import InputError
from fusionlab.fusion import making
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.rules import Emr, Rule, TaskKnownRule, Ties

TASKS = "abcdefgh"
USUAL = 3_000_000


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE = {f"{name}.weight": draw(number, 400, 300) for number, name in enumerate("xyz")}
ADAPTERS = {
    task: Adapter({name: Factors(draw(seed, 4, 300), draw(seed + 9, 400, 4), 8.0) for name in "xyz"})
    for seed, task in enumerate(TASKS)
}


@pytest.mark.parametrize("rule", [Ties(density=0.3), Emr()])
def test_nobody_is_asked_for_a_budget(rule: Rule | TaskKnownRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight task vectors of 1.44 MB where 3 MB are usual: a matrix of each is kept, and the result is the same."""
    whole = making.fuse_weights(rule, BASE, ADAPTERS, resources=Resources(1, 10**9)).weights
    monkeypatch.setattr(engine_job, "DEFAULT_MEMORY_BUDGET", USUAL)
    monkeypatch.setattr(making, "DEFAULT_MEMORY_BUDGET", USUAL)
    fused = making.fuse_weights(rule, BASE, ADAPTERS).weights
    states = [each.unified if isinstance(rule, Emr) else each for each in (whole, fused)]
    read = [{name: state.read(name) for name in state.tensors} if isinstance(rule, Emr) else state for state in states]
    assert all(torch.equal(value, read[1][name]) for name, value in read[0].items())
    finetuned = Finetuned(making.Base.of(BASE), ADAPTERS)
    assert finetuned.make(finetuned.plan(rule, tuple(TASKS)))


def test_a_budget_that_was_given_is_kept() -> None:
    with pytest.raises(InputError, match=r"this rule on blocks of 8 tasks needs .* the budget is 3,000,000"):
        making.fuse_weights(Ties(density=0.3), BASE, ADAPTERS, resources=Resources(1, USUAL))

"""RegMean, RegMean++ and Fisher against slow versions in numpy and float64: the rules, and what is run over data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import own_regressor
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fusionlab.adapters import Adapter, Factors
from fusionlab.engine import fuse
from fusionlab.errors import InputError
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.making import fuse_weights
from fusionlab.rules import TaskArithmetic
from fusionlab.rules.config import from_config, to_config
from fusionlab.rules.weighted_by_fisher import WeightedByFisher
from fusionlab.rules.weighted_by_grams import LayerInputs, WeightedByGrams
from fusionlab.search import Adamerging, Fisher, Regmean, RegmeanPlusPlus, ValidationProblem

Array = np.ndarray
KINDS = ["full", "low rank", "equal A", "equal B", "one zero", "all zero", "one task", "twice"]
A, FLOOR = 0.9, 1e-3


def regmean(taus: list[Array], grams: list[Array], a: float = A, floor: float = FLOOR) -> Array:
    """The least squares that the formula solves: every task's rows, by roots of its matrix, one below the other."""
    roots = []
    for gram in grams:
        weight = a * gram + (1 - a) * np.diag(np.diag(gram)) + floor * np.eye(len(gram))
        values, vectors = np.linalg.eigh(weight)
        roots.append(np.sqrt(values)[:, None] * vectors.T)
    wanted = np.vstack([root @ tau.T for root, tau in zip(roots, taus, strict=True)])
    return np.linalg.lstsq(np.vstack(roots), wanted, rcond=None)[0].T


def fisher(taus: list[Array], fishers: list[Array], floor: float = FLOOR) -> Array:
    found = np.zeros_like(taus[0])
    for place in np.ndindex(*found.shape):
        weights = [each[place] + floor for each in fishers]
        found[place] = sum(w * tau[place] for w, tau in zip(weights, taus, strict=True)) / sum(weights)
    return found


def drawn_grams(count: int, width: int, rank: int, seed: int = 0) -> list[Tensor]:
    """Of ``rank`` inputs a task, so that they are rank-deficient where these are few."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(rank, width, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [each.T @ each / rank for each in rows]


def fused(rule: Any, taus: list[Array], dtype: torch.dtype, name: str = "w") -> Array:
    vectors = {f"task {number}": {name: torch.from_numpy(tau).to(dtype)} for number, tau in enumerate(taus)}
    base = {name: torch.zeros(taus[0].shape, dtype=dtype)}
    return fuse(rule, base, vectors).state[name].double().numpy()


def by_grams(grams: list[Any], *, transposed: bool = False, floor: float = FLOOR) -> WeightedByGrams:
    parts = {f"task {n}": of if isinstance(of, tuple) else (of,) for n, of in enumerate(grams)}
    return WeightedByGrams.of(A, floor, {"w": LayerInputs(parts, transposed)})


def by_fisher(fishers: list[Tensor]) -> WeightedByFisher:
    return WeightedByFisher.of(FLOOR, {"w": {f"task {n}": of for n, of in enumerate(fishers)}})


def close(found: Array, expected: Array, taus: list[Array], tolerance: float) -> None:
    scale = max(float(np.abs(each).max()) for each in (*taus, expected)) or 1.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rank", [5, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_rules_are_their_formulas(
    kind: str, rank: int, dtype: torch.dtype, tolerance: float, task_matrices: Callable[..., list[Tensor]]
) -> None:
    matrices = task_matrices(kind, 30, 22)
    taus = [each.to(dtype).double().numpy() for each in matrices]
    grams = drawn_grams(len(taus), 22, rank)
    numpy_grams = [each.numpy() for each in grams]
    close(fused(by_grams(grams), taus, dtype), regmean(taus, numpy_grams), taus, tolerance)
    close(
        fused(by_grams(grams, transposed=True), [t.T for t in taus], dtype).T,
        regmean(taus, numpy_grams),
        taus,
        tolerance,
    )
    fishers = [0.01 * torch.rand(30, 22, dtype=torch.float64) ** rank for _ in taus]
    close(fused(by_fisher(fishers), taus, dtype), fisher(taus, [f.numpy() for f in fishers]), taus, tolerance)


def test_a_matrix_of_several_layers_is_their_matrices(task_matrices: Callable[..., list[Tensor]]) -> None:
    taus = [each.numpy() for each in task_matrices("full", 30, 22)]
    parts = [drawn_grams(len(taus), 22, 40, seed) for seed in range(3)]
    found = fused(by_grams(list(zip(*parts, strict=True))), taus, torch.float64)
    for number, grams in enumerate(parts):
        rows = slice(10 * number, 10 * number + 10)
        expected = regmean([tau[rows] for tau in taus], [gram.numpy() for gram in grams])
        close(found[rows], expected, taus, 1e-10)


def test_identities(task_matrices: Callable[..., list[Tensor]]) -> None:
    taus = [each.numpy() for each in task_matrices("full", 30, 22)]
    grams = drawn_grams(len(taus), 22, 9)
    found = fused(by_grams(grams), taus, torch.float64)
    eye = [torch.eye(22, dtype=torch.float64)] * len(taus)
    close(fused(by_grams(eye), taus, torch.float64), sum(taus) / len(taus), taus, 1e-14)
    close(fused(by_fisher([torch.ones(30, 22)] * len(taus)), taus, torch.float64), sum(taus) / len(taus), taus, 1e-14)
    one = fused(by_grams(grams[:1]), taus[:1], torch.float64)
    assert np.array_equal(one, taus[0])  # with a floor in both sums, to the bit
    assert np.array_equal(fused(by_fisher([torch.rand(30, 22)]), taus[:1], torch.float64), taus[0])
    close(fused(by_grams(grams), [3 * tau for tau in taus], torch.float64), 3 * found, taus, 1e-13)
    close(fused(by_grams([7 * g for g in grams], floor=7 * FLOOR), taus, torch.float64), found, taus, 1e-12)
    backwards = {f"task {n}": {"w": torch.from_numpy(taus[n])} for n in reversed(range(len(taus)))}
    other = fuse(by_grams(grams), {"w": torch.zeros(30, 22, dtype=torch.float64)}, backwards).state["w"]
    close(other.numpy(), found, taus, 1e-13)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no statistics": (lambda: WeightedByGrams(), "needs statistics of models that were run over data"),
    "fisher's": (lambda: WeightedByFisher(), "give the rule that finds them .fisher."),
    "other tasks": (lambda: by_grams(drawn_grams(1, 4, 9)), "no statistics of task 1; it was found for task 0"),
    "other names": (
        lambda: WeightedByFisher.of(1e-6, {"v": {"task 0": torch.ones(3, 4), "task 1": torch.ones(3, 4)}}),
        "weighted_by_fisher has statistics of v, which what is fused calls otherwise",
    ),
    "singular": (
        lambda: WeightedByGrams.of(1.0, 1e-9, by_grams([1e20 * torch.ones(4, 4, dtype=torch.float64)] * 2).layers),
        "w: the sum of the tasks' Gram matrices is singular to rounding with a floor of 1e-09",
    ),
    "floor": (lambda: WeightedByGrams(floor=0.0), r"floor: expected a number in \(0, inf\], got 0.0"),
    "share": (lambda: Regmean(off_diagonal=1.5), r"off_diagonal: expected a number in \[0, 1\], got 1.5"),
    "samples": (lambda: Fisher(num_samples=0), "fisher.num_samples must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        fused(make(), [np.ones((3, 4)), np.zeros((3, 4))], torch.float32)


def test_a_configuration_tells_settings_and_a_hash() -> None:
    rule = by_grams(drawn_grams(2, 4, 9))
    told = to_config(rule)["init_args"]
    assert told == {"off_diagonal": A, "floor": FLOOR, "statistics": rule.statistics}
    assert from_config(to_config(rule)) == replace(rule, layers={})
    assert rule.statistics != by_grams(drawn_grams(2, 4, 9, seed=1)).statistics


# what is run over data, on two layers of which all is known


class Classifier(own_regressor.Regressor):
    """Two layers whose outputs are the logits of two classes."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            first = Conv1D(8, own_regressor.DIM) if transposed else nn.Linear(own_regressor.DIM, 8)
            self.network = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 2)).requires_grad_(False)
        self.backbone = type(self.backbone)("classifier", self.network, {})
        self.samples = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.samples += len(inputs)
        return self.network(inputs)

    def run_inputs(self, task: str, batch: dict[str, Tensor]) -> None:
        self(batch["inputs"])

    def scored_classes(self, task: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self(batch["inputs"]), batch["targets"]


@pytest.fixture
def trained() -> tuple[Classifier, own_regressor.Planes, dict[str, dict[str, Tensor]]]:
    module, data = Classifier(), own_regressor.Planes()
    generator = torch.Generator().manual_seed(2)
    states = {
        task: {
            name: value + 0.5 * torch.randn(value.shape, generator=generator)
            for name, value in module.network.state_dict().items()
        }
        for task in data.tasks
    }
    return module, data, states


def problem_of(module: Any, data: Any, states: dict[str, dict[str, Tensor]]) -> ValidationProblem:
    return ValidationProblem(tuple(states), Finetuned(module, states), module, data, lambda rules: [])


def numbers(states: dict[str, dict[str, Tensor]], name: str) -> list[Array]:
    return [state[name].double().numpy() for state in states.values()]


def inputs_of(data: own_regressor.Planes) -> list[Array]:
    return [data.splits[task]["train"].inputs.double().numpy() for task in data.tasks]


def gram(inputs: Array) -> Array:
    return sum(np.outer(x, x) for x in inputs) / len(inputs)


def model_of(rule: Any, module: Any, states: dict[str, dict[str, Tensor]]) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in fuse_weights(rule, module, states).state.items()}


def test_regmean_of_two_layers(trained: tuple[Classifier, own_regressor.Planes, Any]) -> None:
    module, data, states = trained
    found = Regmean(off_diagonal=A, floor=FLOOR).search(problem_of(module, data, states))
    assert (found.num_samples, found.num_labels, found.passes) == (120, 0, module.samples / 120)
    model = model_of(found.rule, module, states)
    inputs = inputs_of(data)
    weights, biases = numbers(states, "0.weight"), numbers(states, "0.bias")
    hidden = [np.tanh(x @ w.T + b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    close(model["0.weight"], regmean(weights, list(map(gram, inputs))), weights, 1e-5)
    close(model["2.weight"], regmean(numbers(states, "2.weight"), list(map(gram, hidden))), weights, 1e-5)
    for name in ("0.bias", "2.bias"):
        close(model[name], sum(numbers(states, name)) / 3, weights, 1e-6)


def test_regmean_plus_plus_goes_behind_what_is_fused(trained: tuple[Classifier, own_regressor.Planes, Any]) -> None:
    module, data, states = trained
    search = RegmeanPlusPlus(off_diagonal=A, floor=FLOOR)
    found = search.search(problem_of(module, data, states))
    assert (found.num_samples, found.num_labels) == (120, 0)
    assert found.passes == pytest.approx(module.samples / 120)  # two blocks, and one input that tells their order
    model, inputs = model_of(found.rule, module, states), inputs_of(data)
    close(model["0.weight"], regmean(numbers(states, "0.weight"), list(map(gram, inputs))), inputs, 1e-5)
    hidden = [np.tanh(x @ model["0.weight"].T + model["0.bias"]) for x in inputs]
    weights = numbers(states, "2.weight")
    close(model["2.weight"], regmean(weights, list(map(gram, hidden))), weights, 1e-5)
    plain = Regmean(off_diagonal=A, floor=FLOOR)
    other = model_of(plain.search(problem_of(module, data, states)).rule, module, states)
    np.testing.assert_allclose(other["0.weight"], model["0.weight"], atol=1e-6)
    assert np.abs(other["2.weight"] - model["2.weight"]).max() > 1e-3
    last = {task: {name: state[name] for name in ("2.weight", "2.bias")} for task, state in states.items()}
    one, both = (each.search(problem_of(module, data, last)).rule for each in (search, plain))
    assert one == both  # nothing before that block is fused: the same statistics, bit for bit


def test_a_transposed_layer_is_the_same_layer(trained: tuple[Classifier, own_regressor.Planes, Any]) -> None:
    module, data, states = trained
    other = Classifier(transposed=True)
    state = module.network.state_dict()
    other.network.load_state_dict(state | {"0.weight": state["0.weight"].T})
    turned = {task: {**own, "0.weight": own["0.weight"].T.contiguous()} for task, own in states.items()}
    for search in (Regmean(), RegmeanPlusPlus(), Fisher()):
        expected = model_of(search.search(problem_of(module, data, states)).rule, module, states)
        model = model_of(search.search(problem_of(other, data, turned)).rule, other, turned)
        np.testing.assert_allclose(model["0.weight"].T, expected["0.weight"], atol=1e-5)
        np.testing.assert_allclose(model["2.weight"], expected["2.weight"], atol=1e-5)


def test_fisher_of_two_layers(
    trained: tuple[Classifier, own_regressor.Planes, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data, states = trained
    drawn: list[int] = []
    multinomial = torch.multinomial

    def noted(*arguments: Any, **more: Any) -> Tensor:
        result = multinomial(*arguments, **more)
        drawn.append(int(result))
        return result

    monkeypatch.setattr(torch, "multinomial", noted)
    found = Fisher(num_samples=25, floor=FLOOR).search(problem_of(module, data, states))
    assert (found.num_samples, found.num_labels, found.passes) == (75, 0, module.samples / 75)
    assert len(drawn) == 75
    assert len(set(drawn)) == 2
    monkeypatch.undo()
    fishers: dict[str, list[Array]] = {name: [] for name in module.network.state_dict()}
    for number, (task, state) in enumerate(states.items()):
        chosen = of_task(data, task, 25)
        squares = {name: np.zeros(value.shape) for name, value in state.items()}
        for sample, label in zip(chosen, drawn[25 * number : 25 * number + 25], strict=True):
            own = {name: value.double().requires_grad_() for name, value in state.items()}
            hidden = torch.tanh(sample.double() @ own["0.weight"].T + own["0.bias"])
            logits = hidden @ own["2.weight"].T + own["2.bias"]
            F.cross_entropy(logits[None], torch.tensor([label])).backward()
            for name, value in own.items():
                squares[name] += value.grad.numpy() ** 2 / 25
        for name, square in squares.items():
            fishers[name].append(square)
    model = model_of(found.rule, module, states)
    for name, squares in fishers.items():
        taus = numbers(states, name)
        close(model[name], fisher(taus, squares), taus, 1e-5)


def of_task(data: own_regressor.Planes, task: str, limit: int) -> Tensor:
    """The inputs that are chosen, told by what the layers read."""
    read: list[Tensor] = []

    class Noting(Classifier):
        def forward(self, inputs: Tensor) -> Tensor:
            read.append(inputs)
            return super().forward(inputs)

    module = Noting()
    states = {task: {"0.weight": module.network[0].weight + 1.0}}
    Regmean(num_samples=limit).search(problem_of(module, data, states))
    return torch.cat(read)


def test_labels_are_not_looked_at(trained: tuple[Classifier, own_regressor.Planes, Any]) -> None:
    module, data, states = trained
    searches = (Regmean(), RegmeanPlusPlus(), Fisher())
    expected = [search.search(problem_of(module, data, states)).rule.statistics for search in searches]
    for splits in data.splits.values():
        splits["train"].targets = torch.full_like(splits["train"].targets, float("nan"))
    assert [search.search(problem_of(module, data, states)).rule.statistics for search in searches] == expected


def test_of_some_tasks_only_what_these_changed_is_fused(
    trained: tuple[Classifier, own_regressor.Planes, Any],
) -> None:
    module, data, states = trained
    some = list(states)[:2]
    few = {task: {"0.weight": state["0.weight"]} if task in some else state for task, state in states.items()}
    finetuned = Finetuned(module, few)
    for search in (Regmean(), RegmeanPlusPlus(), Fisher()):
        problem = ValidationProblem(tuple(some), finetuned, module, data, lambda rules: [])
        rule = search.search(problem).rule
        model = finetuned.make(finetuned.plan(rule, some))
        expected = search.search(problem_of(module, data, {task: few[task] for task in some})).rule
        assert rule == expected
        assert set(model) == {"0.weight"}


def test_a_trained_layer_that_never_runs_is_refused(trained: tuple[Classifier, own_regressor.Planes, Any]) -> None:
    module, data, states = trained
    module.network.append(nn.Linear(2, 2))
    module.network.append(nn.Identity())
    module.forward = lambda inputs: module.network[:3](inputs)  # type: ignore[method-assign]
    states = {task: {**state, "3.weight": torch.ones(2, 2)} for task, state in states.items()}
    for search in (Regmean(), RegmeanPlusPlus()):
        with pytest.raises(InputError, match=r"3\.weight: trained, but no linear layer of it ran over the training"):
            search.search(problem_of(module, data, states))


@pytest.mark.parametrize("kind", ["own A", "equal A", "one layer less"])
def test_of_adapters_it_makes_an_adapter_that_is_the_dense_result(kind: str) -> None:
    """B as they are, side by side: rank T·rank, to the rounding of float64, stored either way, the mean elsewhere."""
    draws = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    base = {"plain.weight": drawn(7, 9), "turned.weight": drawn(9, 7), "other.weight": drawn(5, 9)}
    shared, adapters = drawn(2, 9), {}
    for task in ("a", "b", "c"):
        lora_a = {name: shared if kind == "equal A" else drawn(2, 9) for name in ("plain", "turned", "other")}
        layers = {name: Factors(of, drawn(5 if name == "other" else 7, 2), 3.0) for name, of in lora_a.items()}
        layers["turned"] = replace(layers["turned"], layout="transposed")
        if (kind, task) == ("one layer less", "b"):
            del layers["plain"]
        adapters[task] = Adapter(layers)
    layers_read = {
        name: LayerInputs({task: (gram,) for task, gram in zip(adapters, drawn_grams(3, 9, 4, n), strict=True)}, n > 0)
        for n, name in enumerate(("plain.weight", "turned.weight"))
    }
    rule = WeightedByGrams.of(A, FLOOR, layers_read)
    vectors = {task: dict(of.task_vector()) for task, of in adapters.items()}
    states = {task: {name: base[name] + vector.get(name, 0) for name in base} for task, vector in vectors.items()}
    dense, made = fuse_weights(rule, base, states), fuse_weights(rule, base, adapters)
    assert isinstance(made.weights, Adapter)
    for name, value in made.weights.task_vector().items():
        torch.testing.assert_close(value, dense.state[name] - base[name], rtol=0, atol=1e-12)
    ranks = {"plain": 4 if kind == "one layer less" else 6, "turned": 6, "other": 6}
    assert made.weights.ranks == ranks
    assert made.norms == pytest.approx(dense.norms)
    assert made.cosines["a"]["b"] == pytest.approx(dense.cosines["a"]["b"])
    one = fuse_weights(rule, base, {"a": adapters["a"]}).weights
    assert all(torch.equal(one.task_vector()[name], value) for name, value in vectors["a"].items())  # type: ignore[union-attr]


def test_adapters_with_what_cannot_be_decomposed_are_refused() -> None:
    factors = Factors(torch.full((1, 4), torch.nan), torch.ones(3, 1), 1.0)
    rule = WeightedByGrams.of(A, FLOOR, {"w.weight": LayerInputs({"a": (torch.eye(4, dtype=torch.float64),)})})
    base = {"w.weight": torch.zeros(3, 4)}
    with pytest.raises(InputError, match=r"w\.weight of 'a' has NaN or Inf"):
        fuse_weights(rule, base, {"a": Adapter({"w": factors})})
    with pytest.raises(InputError, match="no statistics of b"):
        fuse_weights(rule, base, {"b": Adapter({"w": factors})})


class Normed(Classifier):
    """A layer of BatchNorm between the two, whose statistics every task has its own of."""

    def __init__(self) -> None:
        super().__init__()
        first, _, last = self.network
        self.network = nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), last).requires_grad_(False)
        self.backbone = type(self.backbone)("classifier", self.network, {})


@pytest.fixture
def normed() -> tuple[Normed, own_regressor.Planes, dict[str, dict[str, Tensor]]]:
    module, data = Normed(), own_regressor.Planes()
    generator = torch.Generator().manual_seed(3)
    states = {}
    for task in data.tasks:
        state = {name: value.clone() for name, value in module.network.state_dict().items()}
        for name, value in state.items():
            if value.is_floating_point():
                moved = value + 0.3 * torch.randn(value.shape, generator=generator)
                state[name] = moved.abs() + 0.1 if "var" in name else moved
        states[task] = state
    return module, data, states


def test_fisher_is_of_the_task_s_own_model_with_its_statistics(normed: Any) -> None:
    module, data, states = normed
    seen: list[tuple[Tensor, Tensor]] = []
    scored = module.scored_classes

    def noted(task: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = scored(task, batch)
        seen.append((batch["inputs"].clone(), found[0].detach().clone()))
        return found

    module.scored_classes = noted
    problem_of(module, data, states).training.expert_squared_gradients("plane 0", 8, seed=0)
    own = Normed().network.eval()
    own.load_state_dict(states["plane 0"])
    for inputs, logits in seen:
        torch.testing.assert_close(logits, own(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["task", "layer"])
def test_adamerging_weighs_weights_and_averages_statistics(normed: Any, scope: Any) -> None:
    module, data, states = normed
    problem = problem_of(module, data, states)
    last: list[Tensor] = []
    logits = problem.logits

    def noted(task: str, batch: dict[str, Tensor], vector: dict[str, Tensor]) -> Tensor:
        last.append(vector["1.running_mean"].detach().clone())
        return logits(task, batch, vector)

    problem.logits = noted  # type: ignore[method-assign]
    found = Adamerging(scope=scope, num_steps=2, batch_size=4).search(problem)
    model = fuse_weights(found.rule, module, states).state
    mean = torch.stack([state["1.running_mean"] for state in states.values()]).mean(0)
    torch.testing.assert_close(model["1.running_mean"], mean)
    torch.testing.assert_close(module.network.state_dict()["1.running_mean"] + last[-1], mean)


def test_statistics_of_a_task_with_no_coefficient_count(normed: Any) -> None:
    """They are averaged over all, so that it is another model than one without the task."""
    module, _, states = normed
    finetuned = Finetuned(module, states)
    both, three = ("plane 0", "plane 1"), tuple(states)
    rule = TaskArithmetic({"plane 0": 0.3, "plane 1": 0.3})
    zero = TaskArithmetic({"plane 0": 0.3, "plane 1": 0.3, "plane 2": 0.0})
    assert finetuned.plan(rule, both).signature != finetuned.plan(zero, three).signature
    plain = {task: {name: v for name, v in state.items() if "running" not in name} for task, state in states.items()}
    finetuned = Finetuned(module, plain)
    assert finetuned.plan(rule, both).signature == finetuned.plan(zero, three).signature


def test_searches_look_at_samples_in_a_drawn_order(trained: Any) -> None:
    """Data are often sorted by class: the first samples are then of one."""
    module, data, states = trained
    split = data.splits["plane 0"]["validation"]
    split.inputs[:] = torch.arange(len(split))[:, None].float()
    problem = problem_of(module, data, states)
    shown = torch.cat([problem.inputs("plane 0", step, 8)["inputs"][:, 0] for step in range(5)]).long().tolist()
    assert sorted(shown) == list(range(40))
    assert shown != sorted(shown)
    few = problem._first("plane 0", 8)["inputs"][:, 0].long().tolist()
    assert sorted(shown[:8]) == few != list(range(8))

"""WEMoE against its formula, in float64 and one sample at a time: the weights of each sample written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fusionlab.adapters import Adapter, Factors
from fusionlab.adapters.routed import LowRankExperts, RoutedWeights, routed
from fusionlab.adapters.routed_files import load_routed, save_routed
from fusionlab.adapters.samples import SampleTokens
from fusionlab.errors import InputError
from fusionlab.fusion.making import fuse_weights
from fusionlab.layout import ROUTED
from fusionlab.rules import TaskArithmetic
from fusionlab.rules.routed import RoutedMlp, RoutedMlps, Router
from fusionlab.search.mlps import mlps_of

WIDTH, HIDDEN, TASKS = 6, 10, ("a", "b", "c")
KINDS = ["dense", "low rank"]


class Gated(nn.Module):
    """Three matrices, as Llama's and T5 v1.1's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Transposed(nn.Module):
    """Two matrices that are stored ``(in, out)``, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(HIDDEN, WIDTH), Conv1D(WIDTH, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(hidden)))


class Network(nn.Module):
    """Two blocks of a mixing layer, that no router touches, and an MLP behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "mlp": each}) for each in mlps()])

    def forward(self, hidden: Tensor) -> Tensor:
        for mixing, block in zip(self.mixing, self.blocks, strict=True):
            hidden = hidden + mixing(hidden).tanh()
            hidden = hidden + block["mlp"](block["norm"](hidden))
        return hidden


def mlps() -> list[nn.Module]:
    return [Gated(), Transposed()]


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def tasks_of(network: Network, kind: str) -> dict[str, Any]:
    """Fine-tuned weights in float64; adapters of different ranks, of which one leaves a layer out."""
    draws = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=draws, dtype=torch.float64)

    if kind == "dense":
        own = network.state_dict()
        return {task: {name: value + drawn(*value.shape) for name, value in own.items()} for task in TASKS}
    found = {}
    layers = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    for rank, task in enumerate(TASKS, 1):
        factors = {}
        for name, part in layers.items():
            out, width = part.weight.shape if isinstance(part, nn.Linear) else part.weight.shape[::-1]
            layout = "linear" if isinstance(part, nn.Linear) else "transposed"
            if (rank, name) != (2, "blocks.0.mlp.up_proj"):
                factors[name] = Factors(drawn(rank, width), drawn(out, rank), 2.0 * rank, layout=layout)  # type: ignore[arg-type]
        found[task] = Adapter(factors)
    return found


def rule_of(network: Network, num_layers: int, value: float = 0.3, *, constant: bool = False) -> RoutedMlps:
    trained = [name for name, part in network.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    found = {}
    for name, mlp in mlps_of(network, trained).items():
        tensors = Router.constant(value, len(TASKS), mlp.width, num_layers).tensors
        draws = torch.Generator().manual_seed(2)
        moved = {
            part: each.double() + (0 if constant else torch.randn(each.shape, generator=draws, dtype=torch.float64))
            for part, each in tensors.items()
        }
        found[name] = RoutedMlp(mlp.layers, Router.of(moved))
    return RoutedMlps.of(value, found, TASKS)


def model_of(network: Network, rule: RoutedMlps, finetuned: Mapping[str, Any]) -> RoutedWeights:
    weights = fuse_weights(rule, network, finetuned).weights
    assert isinstance(weights, RoutedWeights)
    return weights


def run(network: Network, weights: RoutedWeights, inputs: Tensor, samples: SampleTokens | None = None) -> Tensor:
    """The model, its rest put in by hand."""
    state = network.state_dict()
    rest = weights.rest.task_vector() if isinstance(weights.rest, Adapter) else weights.rest
    moved = {name: state[name] + rest[name] if isinstance(weights.rest, Adapter) else rest[name] for name in rest}
    own = Network().double()
    own.load_state_dict(state | moved)
    with routed(own, weights, samples), torch.no_grad():
        return own(inputs)


def expected(network: Network, rule: RoutedMlps, finetuned: Mapping[str, Any], sample: Tensor) -> Tensor:
    """The formula: for one sample ``(tokens, width)`` every MLP's weights θ₀ + Σ w_t τ_t in full."""
    state = network.state_dict()
    taus = {
        task: of.task_vector() if isinstance(of, Adapter) else {name: of[name] - state[name] for name in state}
        for task, of in finetuned.items()
    }
    own = Network().double()
    inside = {f"{layer}.{part}" for layer in rule.layers for part in ("weight", "bias")}
    rest = {
        name: value + sum(rule.scaling_coefficient * tau[name] for tau in taus.values() if name in tau)
        for name, value in state.items()
        if name not in inside
    }
    own.load_state_dict(state | rest)
    hidden = sample[None]
    with torch.no_grad():
        for number, (mixing, block) in enumerate(zip(own.mixing, own.blocks, strict=True)):
            hidden = hidden + mixing(hidden).tanh()
            read = block["norm"](hidden)
            mlp = rule.mlps[f"blocks.{number}.mlp"]
            of_tokens = []
            for token in read[0]:
                found = token
                for place, (weight, bias) in enumerate(mlp.router.layers):
                    found = weight @ (found.clamp(min=0) if place else found) + bias
                of_tokens.append(found)
            w = sum(of_tokens) / len(of_tokens)
            for layer in mlp.layers:
                for part in ("weight", "bias"):
                    name = f"{layer}.{part}"
                    if name in state:
                        moved = sum(w[t] * tau[name] for t, tau in enumerate(taus.values()) if name in tau)
                        own.get_parameter(name).copy_(state[name] + moved)
            hidden = hidden + block["mlp"](read)
    return hidden[0]


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_formula_sample_by_sample(kind: str, num_layers: int, network: Network) -> None:
    """Two and three matrices, stored either way, with and without biases; a whole batch at once."""
    finetuned, rule = tasks_of(network, kind), rule_of(network, num_layers)
    weights = model_of(network, rule, finetuned)
    inputs = torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = run(network, weights, inputs)
    for sample, of_sample in zip(inputs, found, strict=True):
        torch.testing.assert_close(of_sample, expected(network, rule, finetuned, sample), rtol=0, atol=1e-10)
    assert (found[0] - run(network, weights, inputs[1:2])[0]).abs().max() > 1e-3  # samples do differ


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_batch_are_left_out(kind: str, network: Network) -> None:
    """A sample's own tokens alone decide its weights: padding on either side, and tokens behind the mask, do not."""
    finetuned, rule = tasks_of(network, kind), rule_of(network, 2)
    weights, samples = model_of(network, rule, finetuned), SampleTokens()
    draws = torch.Generator().manual_seed(4)
    alone = torch.randn(1, 3, WIDTH, dtype=torch.float64, generator=draws)
    others = torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=draws)
    rows = torch.cat([torch.cat([9 * others[:1, :2], alone, 5 * others[1:, :2]], dim=1), others])
    mask = torch.zeros(3, 5, dtype=torch.bool)  # two columns fewer than are read
    mask[0, 2:5], mask[1, :4], mask[2, 1:] = True, True, True
    with samples.reading({"blocks.0": mask, "blocks.1": mask}):
        found = run(network, weights, rows, samples)
    torch.testing.assert_close(found[0, 2:5], run(network, weights, alone)[0], rtol=0, atol=1e-12)
    with samples.reading({"": mask}):
        run(network, weights, rows, samples)
        later = run(network, weights, rows[:, :1], samples)  # such as a token of an answer
    with samples.reading({"": mask}):
        assert (later - run(network, weights, rows[:, :1], samples)).abs().max() > 1e-6
    with pytest.raises(InputError, match=r"blocks\.0\.mlp: these weights are chosen by each sample's prompt"):
        run(network, weights, rows, samples)
    with pytest.raises(InputError, match=r"blocks\.0\.mlp reads a tensor of shape \(3, 6\), not"):
        run(network, weights, alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_identities(kind: str, network: Network) -> None:
    """A router that gives λ is task arithmetic at λ; zero task vectors change nothing."""
    finetuned, inputs = tasks_of(network, kind), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for num_layers in (1, 2):
        weights = model_of(network, rule_of(network, num_layers, constant=True), finetuned)
        arithmetic = fuse_weights(TaskArithmetic(0.3), network, finetuned).weights
        own = Network().double()
        vector = arithmetic.task_vector() if isinstance(arithmetic, Adapter) else arithmetic
        state = network.state_dict()
        moved = {
            name: state[name] + vector[name] if isinstance(arithmetic, Adapter) else vector[name] for name in vector
        }  # type: ignore[index]
        own.load_state_dict(state | moved)
        torch.testing.assert_close(run(network, weights, inputs), own(inputs).detach(), rtol=0, atol=1e-6)
    rule = rule_of(network, 2)
    state = network.state_dict()
    nothing: dict[str, Any] = dict.fromkeys(TASKS, state)
    if kind == "low rank":
        zero = {name: torch.zeros_like(each.lora_b) for name, each in finetuned["a"].factors.items()}
        factors = {
            name: each.with_matrices(each.lora_a, zero[name], 1) for name, each in finetuned["a"].factors.items()
        }
        nothing = dict.fromkeys(TASKS, Adapter(factors))
    torch.testing.assert_close(
        run(network, model_of(network, rule, nothing), inputs), network(inputs).detach(), rtol=0, atol=0
    )


def test_adapters_stay_low_rank_and_files_hold_all(network: Network, tmp_path: Path) -> None:
    finetuned, inputs = tasks_of(network, "low rank"), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for kind in KINDS:
        weights = model_of(network, rule_of(network, 2), tasks_of(network, kind))
        (tmp_path / kind).mkdir()
        save_routed(tmp_path / kind, weights)
        loaded = load_routed(tmp_path / kind)
        assert torch.equal(run(network, loaded, inputs), run(network, weights, inputs))
        assert loaded.sizes == weights.sizes
        assert loaded.tasks == TASKS
    low = model_of(network, rule_of(network, 2), finetuned)
    assert isinstance(low.rest, Adapter)
    assert set(low.rest.factors) == {"mixing.0", "mixing.1"}
    experts = low.experts["blocks.0.mlp.up_proj"]
    assert isinstance(experts, LowRankExperts)
    assert experts.ranks == (1, 0, 3)
    (tmp_path / "low rank" / ROUTED).write_bytes((tmp_path / "dense" / ROUTED).read_bytes())
    with pytest.raises(InputError, match="lacks 'lora_a'"):
        load_routed(tmp_path / "low rank")


def test_what_is_refused(network: Network) -> None:
    finetuned, rule = tasks_of(network, "dense"), rule_of(network, 1)
    with pytest.raises(InputError, match="routed_mlps needs statistics of models that were run over data"):
        fuse_weights(RoutedMlps(), network, finetuned)
    with pytest.raises(InputError, match="has no statistics of d"):
        fuse_weights(rule, network, {**finetuned, "d": finetuned["a"]})
    with pytest.raises(InputError, match="routers are for a, b, c in this order"):
        fuse_weights(rule, network, {task: finetuned[task] for task in reversed(TASKS)})
    with pytest.raises(InputError, match=r"dtype torch\.bfloat16: experts and routers stay as they are trained"):
        fuse_weights(rule, network, finetuned, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="no MLP was trained: it routes modules called mlp or DenseReluDense"):
        mlps_of(network, ["mixing.0"])

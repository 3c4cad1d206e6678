"""Rules on matrices over adapters: on the small cores, to the result of the dense task vectors, again an adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionlab import rules
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors, fuse_in_core_space, load_adapter, save_adapter
from fusionlab.engine import fuse
from fusionlab.errors import InputError
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.making import fuse_weights
from fusionlab.linearize import LinearizedState
from fusionlab.rules.config import from_config, known_rules
from fusionlab.rules.matrix_rule import MatrixRule, has_core

ARGUMENTS: dict[str, dict[str, Any]] = {"knots": {"density": 0.5}}
RULES = {
    name: from_config({"class_path": name, "init_args": ARGUMENTS.get(name, {}) | {"scaling_coefficient": 0.7}})
    for name, rule in known_rules().items()
    if issubclass(rule, MatrixRule)
} | {"wudi in closed form": rules.Wudi(0.7, "closed_form")}
OUT, IN = 40, 56


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(task: int, rank: int = 3, **changes: Any) -> Factors:
    factors = Factors(draw(task, rank, IN), draw(100 + task, OUT, rank) * (1 + task) / 10, 2.0 * rank)
    return dataclasses.replace(factors, **changes)


SHARED, APART = draw(1000, 3, IN), [draw(2000 + task, 3, IN) for task in range(4)]
ADAPTERS: dict[str, list[Adapter]] = {
    "independent A": [Adapter({"w": lora(task)}) for task in range(4)],
    "one A": [Adapter({"w": lora(task, lora_a=SHARED)}, "l_lora", "", "same") for task in range(4)],
    "one B": [Adapter({"w": lora(task, lora_b=draw(9, OUT, 3))}) for task in range(3)],
    "A apart by 1e-2": [Adapter({"w": lora(task, lora_a=SHARED + 1e-2 * APART[task])}) for task in range(4)],
    "A apart by 1e-3": [Adapter({"w": lora(task, lora_a=SHARED + 1e-3 * APART[task])}) for task in range(4)],
    "A apart by 1e-8": [Adapter({"w": lora(task, lora_a=SHARED + 1e-8 * APART[task])}) for task in range(4)],
    "other ranks and scalings": [
        Adapter({"w": lora(0, 1)}), Adapter({"w": lora(1, 5, use_rslora=True)}), Adapter({"w": lora(2, 2)}),
    ],
    "one task": [Adapter({"w": lora(1)})],
    "a zero task": [Adapter({"w": lora(task, lora_b=torch.zeros(OUT, 3).double() if task == 1 else draw(task, OUT, 3))})
                    for task in range(3)],
    "a missing module": [Adapter({"w": lora(0)}), Adapter({"v": lora(1)}), Adapter({"w": lora(2), "v": lora(3)})],
    "more ranks than rows": [Adapter({"w": lora(task, 12)}) for task in range(5)],
    "transposed": [Adapter({"w": lora(task, layout="transposed")}) for task in range(3)],
    "an embedding": [Adapter({"w": lora(task, layout="embedding")}) for task in range(3)],
    "a convolution": [Adapter({"w": lora(task, layout="convolution", kernel=(2, 2))}) for task in range(3)],
}  # fmt: skip
# where the closed form of WUDI refuses, as in dense form
TOO_MANY = {"more ranks than rows"}


def dense(rule: Any, made: list[Adapter]) -> dict[str, Tensor]:
    """What the engine makes of the task vectors written out, float64, of linear layers as ``(out, in)``."""
    is_transposed = any(factors.layout == "transposed" for each in made for factors in each.factors.values())

    def turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.T.contiguous() if is_transposed else value for name, value in state.items()}

    vectors = {f"task {number}": turned(dict(each.task_vector())) for number, each in enumerate(made)}
    base = {name: torch.zeros_like(value) for vector in vectors.values() for name, value in vector.items()}
    return turned(fuse(rule, base, vectors).state)


def condition(made: list[Adapter]) -> float:
    """σ_max/σ_min of what is kept of all factors side by side: what rounding is multiplied by."""
    worst = 1.0
    for side in range(2):
        terms = [each.terms("w", torch.float64)[side] for each in made if "w" in each.factors]
        sigma = torch.linalg.svdvals(torch.cat([term if side == 0 else term.T for term in terms], dim=1))
        kept = sigma[sigma > 1e-6 * sigma[0]]
        worst = max(worst, float(kept[0] / kept[-1]))
    return worst


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", RULES)
def test_the_result_of_the_dense_task_vectors(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, made = RULES[name], ADAPTERS[kind]
    adapters = {f"task {number}": each for number, each in enumerate(made)}
    if name == "wudi in closed form" and kind in TOO_MANY:
        with pytest.raises(InputError, match="follows noise"):
            fuse_in_core_space(rule, adapters)
        return
    expected = dense(rule, made)
    with monkeypatch.context() as patched:  # nothing is written out
        patched.delattr(Adapter, "delta_weight")
        fused, outcome = fuse_in_core_space(rule, adapters)
    found = dict(fused.task_vector())
    assert found.keys() == expected.keys()
    limit = 1e-12 * max(1.0, condition(made) ** 2 / 100)
    for key, value in expected.items():
        assert float((found[key] - value).norm()) <= limit * float(value.norm()), (name, kind, condition(made))
    norms = [torch.stack([value.norm() for value in each.task_vector().values()]).norm() for each in made]
    torch.testing.assert_close(
        torch.tensor(list(outcome.norms.values())), torch.stack(norms).float(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("rule", [rules.IsoC(), rules.IsoCts(), rules.IsoCts(0.5)], ids=str)
def test_of_tasks_that_cancel_out_nothing_is_left(rule: Any) -> None:
    """Their sum is rounding in the basis of all, of which some would be room for the tasks."""
    one = lora(1, 20)
    made = {"a": Adapter({"w": one}), "b": Adapter({"w": dataclasses.replace(one, lora_b=-one.lora_b)})}
    assert not dense(rule, list(made.values()))["w.weight"].any()
    assert not dict(fuse_in_core_space(rule, made)[0].task_vector())["w.weight"].any()


@pytest.mark.parametrize("name", RULES)
def test_the_rank_of_the_result(name: str) -> None:
    """T·rank, or the rank of one where all tasks have one A; KnOTS, which looks at columns, has T·rank."""
    for kind, expected in (("independent A", 12), ("one A", 3), ("other ranks and scalings", 8), ("one B", 3)):
        adapters = {str(number): each for number, each in enumerate(ADAPTERS[kind])}
        fused, _ = fuse_in_core_space(RULES[name], adapters)
        columns_kept = RULES[name].sides == "left" and kind == "one A"
        assert fused.factors["w"].rank == (12 if columns_kept else expected)
        assert fused.factors["w"].lora_alpha == fused.factors["w"].rank
        assert fused.method == "lora"


def test_threads_do_not_change_a_bit() -> None:
    made = {
        f"task {task}": Adapter({f"layers.{number}": lora(10 * number + task) for number in range(6)})
        for task in range(3)
    }
    one, two = (fuse_in_core_space(rules.TsvM(), made, threads=threads)[0] for threads in (1, 2))
    assert list(one.factors) == list(two.factors)
    for module, factors in one.factors.items():
        assert torch.equal(factors.lora_a, two.factors[module].lora_a)
        assert torch.equal(factors.lora_b, two.factors[module].lora_b)


@pytest.mark.parametrize("name", RULES)
def test_the_run_and_the_sweep_make_the_same_adapter(name: str) -> None:
    base = {"w.weight": draw(5, OUT, IN).float(), "other": torch.ones(3)}
    made = {
        task: Adapter({"w": dataclasses.replace(each.factors["w"], lora_a=a.float(), lora_b=b.float())})
        for task, each in zip("abc", ADAPTERS["independent A"], strict=False)
        for a, b in [(each.factors["w"].lora_a, each.factors["w"].lora_b)]
    }
    in_run = fuse_weights(RULES[name], base, made)
    finetuned = Finetuned(base, made)
    in_sweep = finetuned.make(finetuned.plan(RULES[name], ["a", "b", "c"]))
    assert isinstance(in_run.weights, Adapter)
    assert isinstance(in_sweep, Adapter)
    for part in ("lora_a", "lora_b"):
        assert torch.equal(getattr(in_run.weights.factors["w"], part), getattr(in_sweep.factors["w"], part))
    written = fuse(
        RULES[name], {"w.weight": base["w.weight"]}, {task: each.task_vector() for task, each in made.items()}
    )
    update = written.state["w.weight"] - base["w.weight"]
    # what is written out is rounded to float32 before it is decomposed
    assert float((in_run.weights.task_vector()["w.weight"] - update).norm()) < 1e-4 * float(update.norm())
    assert in_run.norms == pytest.approx(written.norms, rel=1e-6)
    assert in_run.cosines["a"] == pytest.approx(written.cosines["a"], abs=1e-6)


def test_rules_that_look_at_entries_work_on_written_out_task_vectors() -> None:
    base = {"w.weight": torch.zeros(OUT, IN)}
    made = {f"task {number}": each for number, each in enumerate(ADAPTERS["independent A"])}
    rule: Any
    for rule in (rules.Wudi(solver="adam"), rules.Dare(rules.TsvM()), rules.Ties()):
        assert not has_core(rule)
        assert not isinstance(fuse_weights(rule, base, made).weights, Adapter)


def test_adapters_that_act_linearized_fuse_so() -> None:
    """The output is to first order in the fused task vector, as the dense weights are."""
    from fusionlab.modules.applying import applied

    torch.manual_seed(0)
    backbone = nn.Module()
    backbone.model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 2)).requires_grad_(False)
    inputs = torch.randn(5, IN)
    made = {
        str(task): Adapter(
            {"0": lora(task, lora_a=SHARED.float(), lora_b=0.1 * draw(task, OUT, 3).float())},
            "tangent_lora",
            "",
            "same",
        )
        for task in range(3)
    }
    base = {f"0.{name}": value.detach().clone() for name, value in backbone.model[0].named_parameters()}
    fused = fuse_weights(rules.TsvM(), base, made).weights
    assert isinstance(fused, Adapter)
    assert fused.method == "tangent_lora"
    state = fuse(
        rules.TsvM(), {"0.weight": base["0.weight"]}, {task: each.task_vector() for task, each in made.items()}
    )
    outputs = []
    for weights in (fused, LinearizedState(state.state)):
        with torch.no_grad(), applied(backbone, weights) as application:
            outputs.append(application(lambda: backbone.model(inputs)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert (outputs[0] - backbone.model(inputs)).abs().max() > 1e-2
    with pytest.raises(InputError, match="tangent_lora adapters can be combined only with one another"):
        fuse_in_core_space(rules.TsvM(), made | {"other": Adapter({"0": lora(9)})})


def test_bad_input_is_named() -> None:
    bad = lora(1, lora_b=torch.full((OUT, 3), torch.nan, dtype=torch.float64))
    with pytest.raises(InputError, match=r"w.weight of 'b' has NaN or Inf"):
        fuse_in_core_space(rules.TsvM(), {"a": Adapter({"w": lora(0)}), "b": Adapter({"w": bad})})
    with pytest.raises(InputError, match="at least one adapter"):
        fuse_in_core_space(rules.TsvM(), {})
    with pytest.raises(InputError, match="different bases: x, y"):
        fuse_in_core_space(
            rules.TsvM(), {"a": Adapter({"w": lora(0)}, "lora", "x"), "b": Adapter({"w": lora(1)}, "lora", "y")}
        )


MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and three adapters of its layers, one of which leaves a layer out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(root / "base")
    for task, name in enumerate("abc"):
        factors = {}
        for number, module in enumerate(MODULES[: 2 if name == "b" else 3]):
            rows, columns = (32, 48) if "down" in module else (32, 32)
            lora_b = 0.1 * draw(10 * task + number, rows, 2).float()
            factors[module] = Factors(draw(20 * task + number, 2, columns).float(), lora_b, 4.0)
        save_adapter(root / name, Adapter(factors, base_model=str(root / "base")))
    return root


def run(root: Path, output: Path, **keys: Any) -> dict[str, Any]:
    recipe = {"base": str(root / "base"), "finetuned": {task: str(root / task) for task in "abc"}} | keys
    output.parent.mkdir(exist_ok=True)
    (output.parent / "recipe.yaml").write_text(json.dumps(recipe | {"output": str(output)}))
    assert main(["fuse", "--config", str(output.parent / "recipe.yaml")]) == 0
    return json.loads((output / "fusion.json").read_text())


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "knots", "wudi"])
def test_fuse_writes_an_adapter_that_peft_reads(name: str, folders: Path, tmp_path: Path) -> None:
    """The same bits as from Python, the same function in PEFT as merged into weights, and norms and cosines."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    record = run(folders, tmp_path / "out", rule=name)
    made = {task: load_adapter(folders / task) for task in "abc"}
    expected, outcome = fuse_in_core_space(from_config(name), made)
    found = load_adapter(tmp_path / "out")
    assert found.ranks == expected.ranks
    for module, factors in expected.factors.items():
        assert torch.equal(found.factors[module].lora_a, factors.lora_a)
        assert torch.equal(found.factors[module].lora_b, factors.lora_b)
    assert record["norms"] == outcome.norms
    assert record["cosines"] == outcome.cosines
    assert (max(record["rank"]) if isinstance(record["rank"], list) else record["rank"]) == 6
    if name in ("tsv_m", "iso_c", "iso_cts"):
        assert "the official code" in record["notes"][0]
    weights = run(folders, tmp_path / "weights", rule=name, save="weights")
    assert weights["norms"] == outcome.norms
    tokens = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(folders / "base")(tokens).logits
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "weights")(tokens).logits
        base = LlamaForCausalLM.from_pretrained(folders / "base")
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()(tokens).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-3


def test_fuse_over_cores_needs_little_memory_and_cuts_ranks(folders: Path, tmp_path: Path) -> None:
    """A budget that the dense task vectors exceed; a truncated adapter; DARE before the rule, which needs them."""
    record = run(folders, tmp_path / "small", rule="tsv_m", memory_budget="64KB")
    assert record["rank"] == [4, 6] or record["rank"] == 6
    cut = run(folders, tmp_path / "cut", rule="tsv_m", rank=2)
    assert cut["rank"] == 2
    assert 0 < cut["truncation_error"] < 1
    dared = run(folders, tmp_path / "dared", rule={"class_path": "dare", "init_args": {"rule": "tsv_m"}})
    assert "rank" not in dared
    mixed = tmp_path / "full"
    assert main(["fuse", "--base", str(folders / "base"), "--finetuned.a", str(folders / "a"), "--rule", "average",
                 "--save", "weights", "--output", str(mixed)]) == 0  # fmt: skip
    both = {"a": str(mixed), "b": str(folders / "b")}
    assert "rank" not in run(folders, tmp_path / "mixed", rule="tsv_m", finetuned=both)
    assert main(["fuse", "--base", str(folders / "base"), "--finetuned.a", str(folders / "a"), "--rule", "ties",
                 "--save", "adapter", "--output", str(tmp_path / "no")]) == 2  # fmt: skip

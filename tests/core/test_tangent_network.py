"""Identities of the whole-network linearization, what it leaves untouched, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from oracles import LinearizedModule, jvp_call, primal_call, select_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fusionlab.backbones import load_backbone
from fusionlab.errors import InputError
from fusionlab.linearize import LinearizedState, linearized_call, tangent_outputs
from fusionlab.modules.applying import LinearOutputs, applied

TASKS = ("mnist", "svhn", "gtsrb")


class Attention(nn.Module):
    """A block with all that is awkward: fused attention, a norm, dropout, an activation in place, a tied weight."""

    def __init__(self, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.activation = nn.LayerNorm(8), nn.ReLU(inplace=True)
        self.adapter_dropout, self.dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.output = nn.Linear(8, 8)
        if tied:
            self.output.weight = self.query.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(inputs)
        split = (part(hidden).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        mixed = mixed + self.adapter_dropout(self.query(inputs))
        return (inputs + self.output(self.activation(self.dropout(mixed)))).mean(1)


def build(dtype: torch.dtype = torch.float64, **options: object) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(**options).to(dtype).requires_grad_(False).eval(), torch.randn(5, 6, 8).to(dtype)  # type: ignore[arg-type]


def point_of(model: nn.Module, *patterns: str) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    return {name: own[name].detach().clone() for name in select_parameters(model, patterns or ("*",))}


def task_vector(point: dict[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (scale * torch.randn(value.shape, generator=generator)).to(value) for name, value in point.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patterns", [("*",), ("query.weight", "value.weight"), ("output.bias",)])
def test_at_the_point_it_is_the_base_bit_for_bit(dtype: torch.dtype, patterns: tuple[str, ...]) -> None:
    model, inputs = build(dtype)
    point = point_of(model, *patterns)
    with sdpa_kernel(SDPBackend.MATH):
        expected = model(inputs)
    parameters = {name: value.clone().requires_grad_() for name, value in point.items()}
    output = linearized_call(lambda: model(inputs), model, parameters, point)
    assert torch.equal(output.to(dtype), expected)
    assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(primal_call(lambda: model(inputs), model, point).to(dtype), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_it_is_additive_over_task_vectors(tied: bool) -> None:
    model, inputs = build(tied=tied)
    point = point_of(model)
    task_vectors = {task: task_vector(point, seed) for seed, task in enumerate(TASKS)}
    total = {name: sum(task_vectors[task][name] for task in TASKS) for name in point}

    def call() -> Tensor:
        return model(inputs)

    base, outputs = tangent_outputs(call, model, point, task_vectors)
    fused = linearized_call(call, model, {name: point[name] + total[name] for name in point}, point)
    torch.testing.assert_close(fused - base, sum(outputs.values()), rtol=1e-12, atol=1e-12)
    for task in TASKS:
        alone = linearized_call(call, model, {name: point[name] + task_vectors[task][name] for name in point}, point)
        torch.testing.assert_close(alone - base, outputs[task], rtol=1e-10, atol=1e-12)
        assert outputs[task].abs().max() > 1e-3
    # and it is the first order: far from the network itself where the update is large, near it where it is small
    for scale, tolerance in ((1e-4, 1e-6), (1e-5, 1e-8)):
        moved = {name: point[name] + scale * total[name] for name in point}
        exact = primal_call(call, model, moved)
        assert (linearized_call(call, model, moved, point) - exact).abs().max() < tolerance


class CountProducts(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is F.linear
        return func(*args, **(kwargs or {}))


def products(run: Callable[[], object]) -> int:
    with CountProducts() as counter:
        run()
    return counter.count


def test_several_tangents_share_the_products_of_the_primal() -> None:
    model, inputs = build()
    point = point_of(model, "query.weight")
    task_vectors = {task: task_vector(point, seed) for seed, task in enumerate(TASKS)}
    one = products(lambda: tangent_outputs(lambda: model(inputs), model, point, {"mnist": task_vectors["mnist"]}))
    three = products(lambda: tangent_outputs(lambda: model(inputs), model, point, task_vectors))
    # five layer calls in the primal; a tangent adds two of the query and one of the output. The activation works in
    # place on nothing that is kept, so no primal product is computed twice.
    assert (one, three) == (5 + 3, 5 + 3 * 3)
    _, together = tangent_outputs(lambda: model(inputs), model, point, task_vectors)
    for task in TASKS:
        _, alone = jvp_call(lambda: model(inputs), model, point, task_vectors[task])
        assert torch.equal(together[task], alone)


def test_outputs_overwritten_in_place_are_not_shared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.3, inplace=True), nn.Linear(6, 3)).double()
    inputs, point = torch.randn(5, 4).double(), point_of(model)
    task_vectors = {task: task_vector(point, seed) for seed, task in enumerate(TASKS)}
    _, together = tangent_outputs(lambda: model(inputs), model, point, task_vectors)
    for task in TASKS:
        assert torch.equal(together[task], jvp_call(lambda: model(inputs), model, point, task_vectors[task])[1])


def test_frozen_weights_cost_no_product_with_zeros() -> None:
    model, inputs = build()
    point = point_of(model, "query.bias")
    parameters = {name: (value + 1).requires_grad_() for name, value in point.items()}
    # the bias's tangent is a broadcast; of the five layers only the output's input has a tangent
    assert products(lambda: linearized_call(lambda: model(inputs), model, parameters, point)) == 5 + 1


def test_everything_is_put_back() -> None:
    model, inputs = build(dropout=0.5)
    model.train()
    before, flags = dict(model.named_parameters()), {name: part.training for name, part in model.named_modules()}
    point = point_of(model, "query.weight")

    def fail() -> Tensor:
        model(inputs)
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        raise ArithmeticError("on purpose")

    linearized_call(lambda: model(inputs), model, point, point)
    with pytest.raises(ArithmeticError, match="on purpose"):
        linearized_call(fail, model, point, point)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }
    assert {name: part.training for name, part in model.named_modules()} == flags
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_the_networks_dropout_is_off_and_an_adapters_has_one_mask() -> None:
    model, inputs = build(dropout=0.5)
    point = point_of(model, "output.bias", "query.weight")
    update = task_vector(point, 1)

    def run(kept: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        parameters = {name: (value + update[name]).requires_grad_() for name, value in point.items()}
        output = linearized_call(lambda: model(inputs), model, parameters, point, dropout_modules=kept)
        return output.detach(), torch.autograd.grad(output.sum(), parameters["query.weight"])[0]

    expected = run(())
    model.train()
    for got, wanted in zip(run(()), expected, strict=True):
        assert torch.equal(got, wanted)
    torch.manual_seed(1)
    value, gradient = run(("adapter_dropout",))
    assert not torch.allclose(value, expected[0])
    # with one mask, the directional derivative of the value is the gradient's component
    direction = torch.randn_like(gradient)
    update["query.weight"] = update["query.weight"] + direction
    torch.manual_seed(1)
    moved, _ = run(("adapter_dropout",))
    torch.testing.assert_close((moved - value).sum(), (gradient * direction).sum(), rtol=1e-10, atol=1e-12)


def test_autocast_is_off_within_and_a_dtype_is_declared() -> None:
    model, inputs = build(torch.float32)
    point = point_of(model, "query.weight")
    parameters = {name: (value + 0.1).requires_grad_() for name, value in point.items()}
    expected = linearized_call(lambda: model(inputs), model, parameters, point)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linearized_call(lambda: model(inputs), model, parameters, point), expected)
        low = linearized_call(lambda: model(inputs.bfloat16()), model, parameters, point, dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits
    assert not torch.equal(low, expected)
    low.sum().backward()
    assert parameters["query.weight"].grad.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_inference_mode_keeps_the_tangent() -> None:
    model, inputs = build()
    point = point_of(model, "query.weight")
    parameters = {name: value + 0.1 for name, value in point.items()}
    expected = linearized_call(lambda: model(inputs), model, parameters, point)
    primal_moved = primal_call(lambda: model(inputs), model, parameters)
    with torch.inference_mode():
        fresh, made_within = inputs.clone(), {name: value.clone() for name, value in parameters.items()}
        assert torch.equal(linearized_call(lambda: model(fresh), model, parameters, point), expected)
        assert torch.equal(linearized_call(lambda: model(fresh), model, made_within, made_within), primal_moved)
        assert torch.equal(linearized_call(lambda: model(fresh), model, made_within, point), expected)
        assert tangent_outputs(lambda: model(fresh), model, point, {"a": parameters})[1]["a"].abs().max() > 1e-3


def test_a_linearized_module_trains_its_parameters_about_a_buffer() -> None:
    model, inputs = build(torch.float32)
    network = LinearizedModule(model, ["query.*", "value.weight"])
    start = {name: value.clone() for name, value in network.state_dict().items()}
    names = ["query.weight", "query.bias", "value.weight"]
    assert [name for name, _ in network.named_buffers()] == ["query_weight", "query_bias", "value_weight"]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()
    moved = [name for name, value in network.state_dict().items() if not torch.equal(value, start[name])]
    assert moved == [f"module.{name}" for name in names]
    again = LinearizedModule(Attention(), ["query.*", "value.weight"])
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(inputs), network(inputs))


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):  # type: ignore[no-untyped-def]
        return inputs * 2

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * 2


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), Twice()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs))


class Twice(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return NoRule.apply(inputs)


class Checkpointed(Doubled):
    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.first, inputs, use_reentrant=False)


def run(model: nn.Module, dtype: torch.dtype = torch.float32, **point: Tensor) -> Tensor:
    own = {name: value for name, value in model.named_parameters() if name == "first.weight"}
    replaced = {"first.weight": point.get("weight", own["first.weight"].detach())}
    return linearized_call(lambda: model(torch.ones(1, 2, dtype=dtype)), model, own, replaced)


def test_bad_input_is_named_with_its_fix() -> None:
    with pytest.raises(InputError, match=r"last \(Twice\) has no forward-mode rule.*attn_implementation='eager'"):
        run(Doubled())
    with pytest.raises(InputError, match=r"float16 overflows.*bfloat16"):
        run(Doubled().half(), torch.float16)
    with pytest.raises(InputError, match=r"other shapes: first.weight \(3, 2\) \(expected \(2, 2\)\)"):
        run(Doubled(), weight=torch.ones(3, 2))
    model, inputs = Doubled(), torch.ones(1, 2)
    with pytest.raises(InputError, match=r"has no parameters frist.weight; did you mean 'first.weight'"):
        jvp_call(lambda: model(inputs), model, {"frist.weight": inputs}, {"frist.weight": inputs})
    with pytest.raises(InputError, match=r"does not depend on the parameters to linearize: first.weight"):
        linearized_call(lambda: inputs * 2, model, point_of(model, "first.weight"), point_of(model, "first.weight"))
    with pytest.raises(InputError, match="returns one tensor, got tuple"):
        jvp_call(lambda: (inputs,), model, point_of(model, "first.*"), point_of(model, "first.*"))  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="at least one task vector, got none"):
        tangent_outputs(lambda: model(inputs), model, point_of(model), {})
    with pytest.raises(InputError, match="no parameters to linearize in"):
        jvp_call(lambda: model(inputs), model, {}, {})


def test_gradient_checkpointing_is_refused_by_name() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = CLIPVisionModel(config)
    next(part for name, part in model.named_modules() if name.endswith("layers.1")).gradient_checkpointing = True
    point = point_of(model, "*q_proj.weight")
    with pytest.raises(InputError, match=r"layers.1 uses gradient checkpointing.*turn it off"):
        jvp_call(lambda: model(pixel_values=torch.randn(1, 3, 16, 16)).pooler_output, model, point, point)
    direct = Checkpointed()
    with pytest.raises(InputError, match=r"the module \(Checkpointed\) uses gradient checkpointing"):
        run(direct)


def test_sums_of_tangents_move_parameters_and_not_buffers() -> None:
    torch.manual_seed(0)
    backbone = nn.ModuleDict({"model": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))}).eval()
    inputs = torch.randn(4, 3)
    vectors = {
        task: {
            "model.0.weight": torch.randn(2, 3),
            "model.0.bias": torch.zeros(2),
            "model.1.running_mean": torch.zeros(2),
        }
        for task in ("a", "b")
    }
    outputs = LinearOutputs(backbone, vectors)
    assert list(outputs.point) == ["model.0.weight"]  # what no task vector moves is not differentiated along
    found = outputs.at({"a": 0.5, "b": 2.0})(lambda: backbone["model"](inputs))
    moved = 0.5 * vectors["a"]["model.0.weight"] + 2.0 * vectors["b"]["model.0.weight"]
    with torch.no_grad():
        scale = backbone["model"][1].weight / (backbone["model"][1].running_var + 1e-5).sqrt()
        expected = backbone["model"](inputs) + (inputs @ moved.T) * scale
    torch.testing.assert_close(found, expected)
    vectors["b"]["model.1.running_mean"][0] = 1.0
    with pytest.raises(InputError, match=r"moves parameters only, and the weights change model\.1\.running_mean"):
        LinearOutputs(backbone, vectors)


def test_a_tensor_that_is_the_base_s_still_has_its_gradient() -> None:
    """A search begins at coefficients of zero, and has to find the way from there."""
    backbone = load_backbone("tiny-clip", causal=False)
    name, own = next((n, p) for n, p in backbone.model.named_parameters() if "vision" in n and n.endswith("fc1.weight"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    value = own.detach().clone().requires_grad_()
    with applied(backbone, LinearizedState({name: value})) as application:
        application(lambda: backbone.image_features(images)).square().sum().backward()
    assert value.grad is not None
    assert value.grad.abs().max() > 0

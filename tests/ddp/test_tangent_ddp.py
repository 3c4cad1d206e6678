"""The linearized network inside a distributed wrapper: two gloo processes train as one."""

import ranks
import torch
from oracles import LinearizedModule
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def build() -> tuple[LinearizedModule, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    network = LinearizedModule(layer.double(), ["linear1.weight", "self_attn.*"])
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return network, torch.randn(6, 4, 8).double()


def train(wrapped: nn.Module, inputs: Tensor) -> None:
    optimizer = torch.optim.SGD([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(inputs).square().mean().backward()
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network, inputs = build()
    train(DistributedDataParallel(network), inputs[3 * rank : 3 * rank + 3])
    torch.save(network.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ranks.start(worker, (str(tmp_path),), 2)
    network, inputs = build()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    train(network, inputs)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    moved = [name for name, value in network.state_dict().items() if not torch.equal(value, start[name])]
    assert moved == [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    for name, value in network.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)  # another order of the sum over inputs

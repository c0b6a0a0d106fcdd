"""Ranks whose model runs collectives of its own."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

import fxzero
from fxzero.errors import CaptureError
from fxzero.graph.nodes import model_collective
from fxzero.graph.verify import collectives
from fxzero.testing import engine_of


class Block(nn.Module):
    """Exchanges rows with the other ranks, and divides by a sum over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.exchanges = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.exchanges:
            hidden = functional.all_to_all_single_autograd(hidden, None, None, dist.group.WORLD)
        total = functional.all_reduce(hidden.detach().square().sum(), "sum", dist.group.WORLD)
        return x + self.second(torch.sigmoid(hidden) / total.sqrt())


class Net(nn.Module):
    """Three of them in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Returns a scalar."""
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class GathersWeight(nn.Module):
    """Sends a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a scalar."""
        rows = functional.all_gather_tensor(self.first.weight.detach(), 0, dist.group.WORLD)
        return self.second(x @ rows.t()[:, :8]).square().mean()


def train(rank: int, world_size: int, recompute: Any) -> tuple[str, list[str], int]:
    """Train beside eager ranks whose gradients are averaged; the schedule, its order, and the number of operators."""
    torch.manual_seed(0)
    model = Net()
    reference = copy.deepcopy(model)
    zero = fxzero.compile(model, recompute=recompute)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (zero, reference)]
    for step in range(3):
        x = torch.randn(4 * world_size, 8, generator=torch.Generator().manual_seed(world_size * step + rank))
        loss, expected = zero(x), reference(x)
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        for param in reference.parameters():
            assert param.grad is not None
            dist.all_reduce(param.grad)
            param.grad /= world_size
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, full), param in zip(zero.state_dict().items(), reference.parameters(), strict=True):
        assert torch.equal(full, param), name
    step_graph = engine_of(zero).last.step
    count = sum(bool(model_collective(node)) for node in step_graph.graph.nodes)
    return str(zero.schedule), collectives(step_graph), count


def disagree(rank: int, world_size: int) -> str:
    """One rank's model runs fewer collectives: the error that each rank gets."""
    model = Net()
    model.blocks[2].exchanges = rank == 0  # type: ignore[assignment]
    try:
        fxzero.compile(model)(torch.randn(4, 8))
    except fxzero.RankMismatchError as error:
        return str(error)
    return ""


def send_a_parameter(rank: int, world_size: int) -> str:
    """The schedule of a model that sends a parameter; its loss is that of eager PyTorch."""
    torch.manual_seed(0)
    model = GathersWeight()
    reference, x = copy.deepcopy(model), torch.randn(4, 8)
    zero = fxzero.compile(model, passes=fxzero.passes.default_passes(bucket_bytes=1))
    assert torch.equal(zero(x), reference(x))
    return str(zero.schedule)


class WritesAcrossRanks(nn.Module):
    """Calls functions of torch.distributed that write into their arguments, and those with a backward."""

    other: dist.ProcessGroup | None = None
    """A further group, whose gloo has another name."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.head, self.call = nn.Linear(8, 8), call

    def forward(self, x: Tensor) -> Tensor:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        y = self.head(x)
        pair, parts = y.detach()[:2].clone(), [*y[: 2 * world_size].split(2)]
        fixed = [part.detach().contiguous() for part in parts]
        match self.call:
            case "all_gather":
                of_ranks = [torch.empty_like(y) for _ in range(world_size)]
                dist.all_gather(of_ranks, y)
                of_ranks[rank] = y
                return (y @ torch.cat(of_ranks).T).mean()
            case "all_reduce":
                count = torch.tensor(float(len(x)))
                dist.all_reduce(count)
                largest = y.detach().abs().max()
                dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True).wait()
                return (y / largest).sum() / count
            case "broadcast":
                dist.broadcast(pair, 1)
            case "scatter":
                dist.scatter(pair, fixed if rank == 1 else None, 1)
            case "reduce_scatter":
                dist.reduce_scatter(pair, fixed)
            case "reduce_scatter in another group":
                dist.reduce_scatter(pair, fixed, group=self.other)
            case "all_to_all_single":
                pair = torch.empty_like(pair.repeat(world_size, 1))
                dist.all_to_all_single(pair, torch.cat(fixed))
            case "barrier":
                dist.barrier()
            case _:
                return torch.cat(differentiable.all_gather(y)).logsumexp(0).sum()  # type: ignore[no-untyped-call]
        return y.sum() * pair.sum()


def write_across_ranks(rank: int, world_size: int, calls: list[str]) -> None:
    """Train models beside eager ranks whose gradients are averaged in the order of ranks."""
    WritesAcrossRanks.other = dist.new_group(backend="cpu:gloo")
    for call in calls:
        torch.manual_seed(0)
        model = WritesAcrossRanks(call)
        reference = copy.deepcopy(model)
        zero = fxzero.compile(model)
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (zero, reference)]
        for step in range(2):
            x = torch.randn(2 * world_size, 8, generator=torch.Generator().manual_seed(world_size * step + rank))
            loss, expected = zero(x), reference(x)
            assert torch.equal(loss, expected), call
            loss.backward()
            expected.backward()
            for param in reference.parameters():
                assert param.grad is not None
                of_ranks = [torch.empty_like(param) for _ in range(world_size)]
                dist.all_gather(of_ranks, param.grad)
                param.grad = sum(of_ranks[1:], of_ranks[0]) / world_size
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        state = zero.state_dict()
        assert all(torch.equal(state[name], value) for name, value in reference.state_dict().items()), call


def wait_for_others(rank: int, world_size: int) -> None:
    with pytest.raises(CaptureError, match=r"c10d.barrier.*is no collective that a compiled step can have.*all_reduce"):
        fxzero.compile(WritesAcrossRanks("barrier"))(torch.ones(4, 8))

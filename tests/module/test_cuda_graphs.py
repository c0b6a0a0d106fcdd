"""Forward and backward as CUDA graphs, with a fake `torch.cuda` that captures and replays on the CPU."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero.module.ranks.captures import WARM_CALLS, Captures
from fxzero.runtime.graphs.obstacles import obstacle
from fxzero.testing import engine_of
from tests.helpers.fake_cuda import FakeCuda


class Net(nn.Module):
    """Draws, a buffer that forward writes, and outputs beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.second(F.dropout(F.gelu(self.norm(self.first(x))), 0.3, self.training))
        loss = F.cross_entropy(out, y)
        return {"loss": loss, "shown": loss.detach(), "out": out, "labels": y}


def graphed(model: nn.Module, cuda: FakeCuda, **options: Any) -> Any:
    zero = fxzero.compile(model, **options)
    engine = engine_of(zero)
    engine.captures = Captures(engine.sharded, cuda)
    return zero


def batch(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def pair(cuda: FakeCuda, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Net()
    return model, graphed(copy.deepcopy(model), cuda, **options)


def train(model: nn.Module, steps: range, micro: int = 1) -> list[Tensor]:
    """The losses, which are kept, of steps that begin with the same draws."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses: list[Tensor] = []
    for step in steps:
        for each in range(micro):
            out = model(*batch(10 * step + each))
            out["loss"].backward()
            losses += [out["loss"].detach(), out["out"].detach(), out["shown"]]
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same(model: nn.Module, zero: Any, mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    full = zero.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, full[name].reshape(value.shape)), name


@pytest.mark.parametrize("micro", [1, 3])
def test_replayed_steps_are_bitwise_those_of_eager_and_what_is_kept_stays(micro: int) -> None:
    cuda = FakeCuda()
    model, zero = pair(cuda)
    steps = range(WARM_CALLS + 4)
    assert_same(model, zero, train(zero, steps, micro), train(model, steps, micro))
    assert cuda.log.count("capture") == (2 if micro == 1 else 3)  # a backward that adds is another graph
    assert cuda.log.count("replay") == 2 * (len(steps) * micro - WARM_CALLS)


def test_a_second_forward_before_the_backward_of_the_first_runs_as_it_is() -> None:
    cuda = FakeCuda()
    model, zero = pair(cuda)
    for each in (model, zero):
        train(each.eval(), range(5))
    grads: list[list[Tensor]] = []
    for each in (model, zero):
        one, other = each(*batch(1)), each(*batch(2))
        other["loss"].backward()
        one["loss"].backward()
        grads.append([param.grad.reshape(-1).clone() for param in each.parameters() if param.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_a_forward_without_backward_does_not_keep_later_ones_from_replaying() -> None:
    cuda = FakeCuda()
    _, zero = pair(cuda)
    train(zero, range(5))
    before = cuda.log.count("replay")
    zero(*batch(1))
    gc.collect()
    train(zero, range(1))
    assert cuda.log.count("replay") == before + 3


def test_a_gradient_of_an_input_and_an_output_that_is_an_input() -> None:
    cuda = FakeCuda()
    model, zero = pair(cuda)
    found: list[list[Tensor]] = []
    for each in (model, zero):
        torch.manual_seed(3)
        grads: list[Tensor] = []
        for step in range(6):
            x, y = batch(step)
            out = each(x.requires_grad_(), y)
            (2 * out["loss"]).backward()
            assert x.grad is not None
            assert out["labels"] is y or torch.equal(out["labels"], y)
            grads.append(x.grad)
        found.append(grads)
    assert cuda.log.count("replay") == 6
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_graphs_are_captured_anew_where_memory_has_moved() -> None:
    cuda = FakeCuda()
    model, zero = pair(cuda)
    for each in (model, zero):
        train(each, range(5))
    for each in (model, zero):
        each.norm.running_mean = torch.full_like(each.norm.running_mean, 0.5)
    assert_same(model, zero, train(zero, range(2)), train(model, range(2)))
    assert cuda.log.count("capture") == 4
    engine_of(zero).sharded.arena.reserve(engine_of(zero).sharded.arena.nbytes + 4096)
    assert_same(model, zero, train(zero, range(2)), train(model, range(2)))
    assert cuda.log.count("capture") == 6
    assert cuda.log.count("reset") == 4


def test_no_sync_accumulate_and_evaluation() -> None:
    cuda = FakeCuda()
    model, zero = pair(cuda)
    for step in range(6):
        for each in (model, zero):
            torch.manual_seed(step)
            each.zero_grad()
            for micro in range(2):
                if each is zero and micro == 0:
                    with zero.no_sync():
                        each(*batch(micro))["loss"].backward()
                else:
                    each(*batch(micro))["loss"].backward()
            with torch.no_grad():
                each(*batch(9, 4))
    got = [param.grad.reshape(-1) for param in zero.parameters() if param.grad is not None]
    wanted = [param.grad.reshape(-1) for param in model.parameters() if param.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert cuda.log.count("replay") > 4


class Reads(nn.Module):
    """Its forward does what no graph can, if `what` does."""

    def __init__(self, what: nn.Module) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(6, 6), what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self.linear(x)).sum()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_plan_that_cannot_be_captured_runs_with_one_warning_that_names_the_node() -> None:
    torch.manual_seed(0)
    model: Any = Reads(Branches())
    cuda = FakeCuda()
    zero = graphed(copy.deepcopy(model), cuda, islands=["what"])
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*what.*is an island") as caught:
        for step in range(6):
            zero(batch(step)[0]).backward()
            model(batch(step)[0]).backward()
    assert len([each for each in caught if "CUDA graph" in str(each.message)]) == 1
    assert cuda.log == []
    assert torch.equal(zero.linear.weight.grad.reshape(6, 6), model.linear.weight.grad)


def test_obstacles_of_a_plan_are_named() -> None:
    zero = fxzero.compile(Reads(nn.ReLU()), example=batch(0)[0])
    zero(batch(0)[0]).backward()
    step = engine_of(zero).last.step  # type: ignore[union-attr]
    assert obstacle(step, torch.device("cpu"), is_capturable=True) is None
    assert "input" in str(obstacle(step, torch.device("cuda", 0), is_capturable=True))
    assert "all_gather" in str(obstacle(step, torch.device("cpu"), is_capturable=False))


class Writes(nn.Module):
    """Writes its input, and returns views of it, as asked."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "write":
            x.mul_(2)
            return (self.linear(x).sum(),)
        out = self.linear(x)
        if self.how == "input view":
            return out.sum(), x[0]
        return out.sum(), out, out[0]


@pytest.mark.parametrize("how", ["write", "input view", "two views"])
def test_what_a_step_shares_with_its_caller_stays_shared(how: str) -> None:
    cuda = FakeCuda()
    zero = graphed(Writes(how), cuda)
    with pytest.warns(UserWarning, match="writes into its input|a view of its input|two different views"):
        for step in range(5):
            zero(batch(step)[0])[0].backward()
    assert cuda.log == []


def test_a_capture_that_fails_leaves_the_step_as_it_is() -> None:
    cuda = FakeCuda(fails="operation not permitted when stream is capturing\nmore")
    model, zero = pair(cuda)
    with pytest.warns(UserWarning, match="capture has failed: operation not permitted when stream is capturing"):
        mine = train(zero, range(6))
    assert_same(model, zero, mine, train(model, range(6)))
    assert cuda.log.count("replay") == 0


def test_on_a_cpu_the_option_has_no_effect_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"cuda_graph=True has no effect: the model is on cpu"):
        zero = fxzero.compile(Net(), cuda_graph=True)
    assert engine_of(zero).captures is None
    with pytest.raises(TypeError, match="cuda_graph"):
        fxzero.compile(Net(), cuda_graph=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drop cuda_graph"):
        fxzero.compile(Net(), cuda_graph=True, without="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxzero.compile(Net())


@pytest.mark.gpu
def test_on_a_gpu_replayed_steps_are_those_of_plain_ones() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found: list[list[Tensor]] = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        zero = fxzero.compile(Net().cuda(), cuda_graph=cuda_graph)
        torch.manual_seed(7)
        kept: list[Tensor] = []
        for step in range(WARM_CALLS + 4):
            out = zero(*(each.cuda() for each in batch(step)))
            out["loss"].backward()
            kept += [out["loss"].detach(), *[param.grad.clone() for param in zero.parameters()]]
            zero.zero_grad()
        found.append(kept)
        if cuda_graph:
            last = engine_of(zero).last
            assert last is not None and last.graphs is not None
            assert last.graphs.num_captures == 2
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

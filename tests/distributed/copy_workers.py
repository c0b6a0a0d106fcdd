"""Work of ranks for test_copy_ranks.py."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fxzero
from fxzero.errors import CommunicationError, FxzeroError, RankMismatchError

BATCHES = [torch.randn(6, 4, generator=torch.Generator().manual_seed(each)) for each in range(3)]


class Net(nn.Module):
    """Tied weights, buffers, a container as an attribute and a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.again = nn.Linear(4, 4)
        self.again.weight = self.inner[0].weight
        self.head = nn.Linear(4, 3)
        self.config: dict[str, float] = {"scale": 2.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.inner(x))) * self.config["scale"]

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for batch in BATCHES:
        model(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_alike(own: Any, plain: nn.Module) -> None:
    state, expected = own.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def averages(rank: int, world_size: int) -> None:
    """torch's AveragedModel of a compiled module is that of the plain model, made before or after the first step."""
    ema = get_ema_multi_avg_fn(0.9)
    options: list[dict[str, Any]] = [{}, {"multi_avg_fn": ema}, {"multi_avg_fn": ema, "use_buffers": True}]
    for index, kwargs in enumerate(options):
        plain, zero = Net(), fxzero.compile(Net())
        steps = torch.optim.AdamW(plain.parameters(), lr=0.1), torch.optim.AdamW(zero.parameters(), lr=0.1)
        if index:
            train(plain, steps[0])
            train(zero, steps[1])
        expected, averaged = AveragedModel(plain, **kwargs), AveragedModel(zero, **kwargs)
        for _ in range(2):
            train(plain, steps[0])
            train(zero, steps[1])
            expected.update_parameters(plain)
            averaged.update_parameters(zero)
        assert_alike(averaged, expected)
        update_bn(BATCHES, expected)
        update_bn(BATCHES, averaged)
        with torch.no_grad():
            assert torch.equal(averaged.eval()(BATCHES[0]), expected.eval()(BATCHES[0]))
        again = AveragedModel(zero, **kwargs)
        again.load_state_dict(averaged.state_dict())
        assert_alike(again, expected)
        assert_alike(zero, plain)


def copies(rank: int, world_size: int) -> None:
    """A copy is a module of its own: it trains, changes and ends by itself."""
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    norm = MixedPrecisionPolicy(torch.float32, output_dtype=torch.bfloat16)
    for mp_policy in (None, {"*": narrow, "inner.1": norm}):
        zero: Any = fxzero.compile(Net(), mp_policy=mp_policy)
        optimizer = torch.optim.SGD(zero.parameters(), lr=0.1, momentum=0.9)
        train(zero, optimizer)
        before = zero.state_dict()
        copied, its_optimizer = copy.deepcopy((zero, optimizer))
        copied.config["scale"] = 3.0
        train(copied, its_optimizer)
        for name, value in zero.state_dict().items():
            assert torch.equal(value, before[name]), name
        zero.config["scale"] = 3.0
        train(zero, optimizer)
        assert_alike(zero, copied)
        assert torch.equal(zero.encode(BATCHES[0]), copied.encode(BATCHES[0]))
        del zero
        train(copied, its_optimizer)


def teacher_and_student(rank: int, world_size: int) -> None:
    """A teacher is a frozen copy from before the first call; averages of it are taken by hand."""
    plain, zero = Net(), fxzero.compile(Net())
    plain_teacher, teacher = copy.deepcopy(plain), copy.deepcopy(zero)
    swapped: list[torch.Tensor] = []
    for model, its_teacher in ((plain, plain_teacher), (zero, teacher)):
        its_teacher.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for batch in BATCHES:
            with torch.no_grad():
                target = its_teacher(batch)
            (model(batch) - target - 1).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for its_param, param in zip(its_teacher.parameters(), model.parameters(), strict=True):
                    its_param.lerp_(param, 0.25)
        kept = [param.data.clone() for param in model.parameters()]
        with torch.no_grad():
            for its_param, param in zip(its_teacher.parameters(), model.parameters(), strict=True):
                param.copy_(its_param)
        swapped.append(model(BATCHES[0]))
        for param, value in zip(model.parameters(), kept, strict=True):
            param.data.copy_(value)
    assert torch.equal(*swapped)
    assert_alike(teacher, plain_teacher)
    assert_alike(zero, plain)


def refused(rank: int, world_size: int) -> None:
    """Copies that could not be right are refused; those of whole parts belong to no compiled model."""
    model = Net()
    zero: Any = fxzero.compile(model)
    train(zero, torch.optim.SGD(zero.parameters(), lr=0.1))
    for part in (model, zero.inner, zero.inner[0]):
        with pytest.raises(FxzeroError, match="cop"):
            copy.deepcopy(part)
    with pytest.raises(FxzeroError, match="summon_full_params"), zero.summon_full_params():
        copy.deepcopy(zero)
    with zero.summon_full_params():
        inner = copy.deepcopy(zero.inner)
    with torch.no_grad():
        expected = zero.inner(BATCHES[0])
        zero.inner[0].weight.zero_()
    assert torch.equal(inner(BATCHES[0]), expected)
    inner(BATCHES[0]).sum().backward()
    assert inner.half()[0].weight.grad is not None
    inner.state_dict()
    with torch.device("meta"):
        meta = fxzero.compile(Net(), device="cpu")
    with pytest.raises(FxzeroError, match="meta device"):
        copy.deepcopy(meta)


def one_does_not_copy(rank: int, world_size: int) -> None:
    """One rank goes on without a copy."""
    zero = fxzero.compile(Net())
    zero(BATCHES[0])
    with pytest.raises((RankMismatchError, CommunicationError), match="copying"):
        if rank:
            AveragedModel(zero)
        zero(BATCHES[0])


def inside_another(rank: int, world_size: int) -> None:
    """A parent with a head of its own trains, saves, loads and copies as the plain one, and warns of the head."""

    class Parent(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.inner, self.last = inner, nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.inner(x))

    plain, parent = Parent(Net()), Parent(fxzero.compile(Net()))
    train(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="AdamW steps 2 parameters beside those of a compiled module"):
        train(parent, torch.optim.AdamW(parent.parameters(), lr=0.1))
    assert_alike(parent, plain)
    loaded = Parent(fxzero.compile(Net()))
    loaded.load_state_dict(plain.state_dict())
    assert_alike(copy.deepcopy(loaded), plain)

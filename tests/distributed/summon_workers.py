"""Work of ranks for test_summon_ranks.py."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxzero
from fxzero.errors import CommunicationError, FxzeroError, RankMismatchError
from fxzero.graph.layout import LayoutName

X = torch.arange(6).view(2, 3)


class Tied(nn.Module):
    """Tied weights, a scalar, a frozen parameter and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(7, 5)
        self.mid = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.mid.bias.requires_grad_(False)
        self.table = nn.Parameter(torch.arange(7), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.emb(self.table[ids])) * self.scale)


def change(model: Any) -> None:
    """Surgery as one writes it."""
    with torch.no_grad():
        model.head.weight[3] = -0.0
        model.mid.weight.data = model.mid.weight.data.t() * 2
        model.mid.bias.copy_(torch.arange(5.0))
        model.scale.mul_(3)
        model.table.data = model.table.flip(0)


class Wrapper(nn.Module):
    """Passes on what it lacks, as the models of peft do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def copies(layout: LayoutName) -> None:
    """A copy of the model and of a part, taken inside, is plain, and can be compiled."""
    model = Wrapper()
    zero = fxzero.compile(model, layout=layout)
    with zero.summon_full_params():
        copied, part = copy.deepcopy(model), copy.deepcopy(model.inner)
    assert type(copied) is Wrapper
    assert type(part) is Tied
    assert torch.equal(copied(X), part(X))
    again = fxzero.compile(copied, layout=layout)
    with torch.no_grad():
        assert torch.equal(again(X), part(X))
        assert torch.equal(zero(X), part(X))
    with pytest.raises(FxzeroError, match="cannot be pickled, and the model in it not be copied|rank's shards"):
        copy.deepcopy(model)


def train(model: Any, world_size: int) -> None:
    """A step, which changes nothing on three ranks, where the mean of equal gradients is rounded."""
    model(X).pow(2).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1 if world_size < 3 else 0.0).step()
    model.zero_grad()


def assert_alike(zero: Any, plain: nn.Module) -> None:
    for name, value in zero.state_dict().items():
        expected = plain.state_dict()[name]
        assert torch.equal(value.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


def like_the_plain_model(rank: int, world_size: int, layout: LayoutName) -> None:
    """What a block reads, changes and calls is what it would on the plain model."""
    plain, model = Tied(), Tied()
    zero: Any = fxzero.compile(model, layout=layout)
    shapes = {name: (param.shape, param.numel()) for name, param in plain.named_parameters()}
    for _ in range(2):  # before and after the layout is fixed
        with zero.summon_full_params(writeback=False):
            assert {name: (param.shape, param.numel()) for name, param in zero.named_parameters()} == shapes
            change(zero)
        assert_alike(zero, plain)
        with zero.summon_full_params():
            assert zero.head.weight is zero.emb.weight
            change(zero)
            change(plain)
            with torch.no_grad():
                assert torch.equal(zero(X), plain(X)) and torch.equal(model(X), plain(X))
                assert torch.equal(zero.mid(plain.emb(X)), plain.mid(plain.emb(X)))
            assert model.state_dict().keys() == plain.state_dict().keys()
        plain.mid.weight.data = plain.mid.weight.data.contiguous()  # as shards are: other strides may round otherwise
        assert_alike(zero, plain)
        train(zero, world_size)
        train(plain, world_size)
        assert_alike(zero, plain)
    partly(zero, plain, rank)
    of_rank_0(zero, plain, rank)
    copies(layout)
    refused(zero, plain, rank)
    train(zero, world_size)
    train(plain, world_size)
    assert_alike(zero, plain)


def partly(zero: Any, plain: Any, rank: int) -> None:
    """Some parameters are gathered, others in a block inside."""
    loss, expected = zero(X).mean(), plain(X).mean()
    with zero.summon_full_params(["head.weight", "scale"], writeback=False):
        assert torch.equal(zero.emb.weight, plain.emb.weight)
        assert zero.mid.weight.shape != (5, 5)
        with zero.summon_full_params("mid"):
            assert torch.equal(zero.mid.weight, plain.mid.weight)
            with zero.summon_full_params(writeback=False), torch.no_grad():
                assert torch.equal(zero(X), plain(X))
        with torch.no_grad():  # a part that gathers in the block
            assert torch.equal(zero.mid(zero.emb(X)), plain.mid(plain.emb(X)))
    loss.backward()
    expected.backward()
    zero.zero_grad()
    plain.zero_grad()
    assert_alike(zero, plain)


def of_rank_0(zero: Any, plain: Any, rank: int) -> None:
    """Rank 0 alone has whole parameters; what it leaves in them is for all."""
    for writeback in (False, True):
        with zero.summon_full_params(rank0_only=True, writeback=writeback):
            if rank == 0:
                change(zero)
                with torch.no_grad():
                    zero(X)
            else:
                assert zero.mid.weight.shape != (5, 5)
                zero.mid.weight.data.zero_()
                with pytest.raises(FxzeroError, match="rank0_only"), torch.no_grad():
                    zero.mid(torch.ones(5))
        if writeback:
            change(plain)
        assert_alike(zero, plain)


def refused(zero: Any, plain: nn.Module, rank: int) -> None:
    """What would be wrong inside is refused, on all ranks alike, and nothing has changed then."""
    optimizer = torch.optim.SGD(zero.parameters(), lr=0.1)
    optimizer.step()
    for use in (zero.state_dict, lambda: zero(X), lambda: list(zero.iter_full_params()), optimizer.step):
        with pytest.raises(FxzeroError, match="summon_full_params"), zero.summon_full_params():
            change(zero)
            use()
        assert_alike(zero, plain)
    with pytest.raises(FxzeroError, match="A backward inside of"), zero.summon_full_params():
        zero.mid.weight.sum().backward()
    with pytest.raises(FxzeroError, match="shape"), zero.summon_full_params():
        zero.mid.weight.data = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"Do you mean 'mid.weight'"), zero.summon_full_params(["mid.wieght"]):
        pass
    with zero.summon_full_params():
        (grad,) = torch.autograd.grad(zero.mid.weight.pow(2).sum(), [zero.mid.weight])
        assert torch.equal(grad, 2 * zero.mid.weight)
    assert_alike(zero, plain)


def other_values(rank: int, world_size: int) -> None:
    """Ranks leave other values in a parameter."""
    zero: Any = fxzero.compile(Tied())
    zero(X)
    with pytest.raises(RankMismatchError, match=r"mid\.weight"), zero.summon_full_params(["mid"]):
        zero.mid.weight.data.fill_(rank)


def other_names(rank: int, world_size: int) -> None:
    """Ranks gather other parameters."""
    zero: Any = fxzero.compile(Tied())
    zero(X)
    with (
        pytest.raises((RankMismatchError, CommunicationError), match=r"summon_full_params\(emb.weight\)"),
        zero.summon_full_params(["mid.weight" if rank else "head.weight"]),
    ):
        pass


def one_does_not_enter(rank: int, world_size: int) -> None:
    """One rank goes on with a step."""
    zero: Any = fxzero.compile(Tied())
    zero(X)
    with pytest.raises((RankMismatchError, CommunicationError), match="summon_full_params"):
        if rank:
            zero(X)
        with zero.summon_full_params():
            pass


def one_fails_inside(rank: int, world_size: int) -> None:
    """One rank leaves the block in an error."""
    zero: Any = fxzero.compile(Tied())
    zero(X)
    with pytest.raises((KeyError, CommunicationError), match="my key"), zero.summon_full_params():
        if rank:
            raise KeyError("my key")

"""Work of ranks for test_methods_ranks.py."""

from typing import Any

import pytest
import torch

import fxzero
from fxzero.errors import CommunicationError, RankMismatchError
from fxzero.testing import engine_of
from tests.module.test_methods import USES, Model, X, assert_alike, run

REPLICATED = (
    "a method", "arguments", "a training step", "a whole step", "a part without gradients", "a moving average",
    "a moving average in place", "initialising", "surgery", "a property", "lengths", "items", "norms",
    "several at once", "parts without gradients",
)  # fmt: skip


def equal_batches(rank: int, world_size: int) -> None:
    """With equal batches, ranks get what one plain model gets."""
    for name in REPLICATED:
        _, use = USES[name]
        torch.manual_seed(0)
        plain = Model()
        torch.manual_seed(0)
        zero = fxzero.compile(Model())
        expected = run(plain, use, warm=True)
        assert_alike(zero, plain, run(zero, use, warm=True), expected)


def own_batches(rank: int, world_size: int) -> None:
    """A forward and a method on batches of the rank: gradients are means over the ranks."""
    batches = [torch.randn(4, 4, generator=torch.Generator().manual_seed(each)) for each in range(world_size)]
    torch.manual_seed(0)
    plain = Model().eval()
    torch.manual_seed(0)
    zero: Any = fxzero.compile(Model().eval())
    for _ in range(2):
        loss = zero(batches[rank]).pow(2).sum() + zero.of_super(batches[rank]).pow(2).sum()
        loss.backward()
    losses = [plain(each).pow(2).sum() + plain.of_super(each).pow(2).sum() for each in batches]
    (2 * torch.stack(losses).mean()).backward()
    shards = engine_of(zero).sharded.shards
    assert shards is not None
    for name, param in plain.named_parameters():
        own = dict(zero.named_parameters())[name].grad
        if param.grad is None:
            assert own is None
        elif own is not None:
            torch.testing.assert_close(own, shards.cut(name, param.grad))


def another_method(rank: int, world_size: int) -> None:
    """One rank calls another method than the others."""
    zero: Any = fxzero.compile(Model().eval())
    zero(X).sum().backward()
    zero.of_super(X).sum().backward()
    zero.penalty().backward()
    with pytest.raises((RankMismatchError, CommunicationError), match=r"of_super\(\)|penalty\(\)"):
        for _ in range(3):
            (zero.of_super(X).sum() if rank else zero.penalty()).backward()


def first_method_differs(rank: int, world_size: int) -> None:
    """The first call of the model is another method on one rank."""
    zero: Any = fxzero.compile(Model().eval())
    with pytest.raises((RankMismatchError, CommunicationError)):
        (zero.of_super(X).sum() if rank else zero.penalty()).backward()


def one_rank_generates(rank: int, world_size: int) -> None:
    """One rank gathers for a method, where the others begin a forward."""
    zero: Any = fxzero.compile(Model().eval())
    zero(X).sum().backward()
    with pytest.raises((RankMismatchError, CommunicationError), match=r"repeated\(\)"):
        if rank:
            zero.repeated(X)
        else:
            zero(X).sum().backward()
        zero(X).sum().backward()


def asked_gradients(rank: int, world_size: int) -> None:
    """torch.autograd.grad gives this rank's slices of mean gradients, and leaves `.grad` alone."""
    batches = [torch.randn(4, 4, generator=torch.Generator().manual_seed(each)) for each in range(world_size)]
    torch.manual_seed(0)
    plain = Model().eval()
    torch.manual_seed(0)
    zero: Any = fxzero.compile(Model().eval())
    names = [name for name, param in plain.named_parameters() if param.requires_grad]
    for _ in range(2):
        found = torch.autograd.grad(zero(batches[rank]).sum(), [param for _, param in trained(zero)])
        mean = torch.stack([plain(each).sum() for each in batches]).mean()
        expected = torch.autograd.grad(mean, [param for _, param in trained(plain)])
        for name, got, wanted in zip(names, found, expected, strict=True):
            torch.testing.assert_close(got, cut(zero, name, wanted))
        zero.of_super(batches[rank]).sum().backward()
        before = {name: param.grad.clone() for name, param in trained(zero) if param.grad is not None}
        torch.autograd.grad(zero(batches[rank]).sum(), [zero.head.bias])
        for name, param in trained(zero):
            assert (param.grad is None) == (name not in before)
            assert param.grad is None or torch.equal(param.grad, before[name])


def cut(zero: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    shards = engine_of(zero).sharded.shards
    assert shards is not None
    return shards.cut(name, value)


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]

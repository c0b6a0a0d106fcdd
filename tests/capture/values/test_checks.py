"""Checks of values in forward are part of the step, and raise after it what eager raises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import fxzero
from fxzero.testing import run_ranks
from tests.helpers.pairs import assert_same, sgd


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.check(x, y)
        self.calls += 1
        return y.pow(2).mean()

    def check(self, x: Tensor, y: Tensor) -> None:
        raise NotImplementedError


class TensorAll(Net):
    def check(self, x: Tensor, y: Tensor) -> None:
        torch._check_tensor_all(x > 0, lambda: "inputs must be positive")  # pyright: ignore[reportPrivateUsage]


class WithError(Net):
    def check(self, x: Tensor, y: Tensor) -> None:
        torch._check_tensor_all_with(  # pyright: ignore[reportPrivateUsage]
            ValueError, x.sum() > 0, lambda: f"the sum {x.sum()} must be positive"
        )


class Assertion(Net):
    def check(self, x: Tensor, y: Tensor) -> None:
        torch._assert((x > 0).all(), "inputs must be positive")  # pyright: ignore[reportPrivateUsage]


class Sampled(Net):
    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(-1)
        return -Normal(self.body(x).sum(-1), scale).log_prob(x.sum(-1)).mean()


CHECKS: dict[type[Net], tuple[type[Exception], str]] = {
    TensorAll: (RuntimeError, "inputs must be positive"),
    WithError: (ValueError, "must be positive"),
    Assertion: (AssertionError, "inputs must be positive"),
    Sampled: (ValueError, "scale of distribution Normal"),
}


@pytest.mark.parametrize("kind", CHECKS)
def test_a_check_passes_as_in_eager_and_fails_with_its_error(kind: type[Net]) -> None:
    torch.manual_seed(0)
    plain = kind()
    torch.manual_seed(0)
    zero = fxzero.compile(kind())
    optimizers = sgd(plain), sgd(zero)
    for step in range(3):
        for module, optimizer in zip((plain, zero), optimizers, strict=True):
            module(torch.full((2, 4), 1.0 + step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(zero, plain)
    error, message = CHECKS[kind]
    with pytest.raises(error) as of_eager:
        plain(torch.full((2, 4), -1.0))
    with pytest.raises(error, match=message) as of_step:
        zero(torch.full((2, 4), -1.0))
    assert "test_checks.py:" in str(of_step.value)
    assert str(of_eager.value).split()[0] == str(of_step.value).split()[0]
    assert torch.equal(zero(torch.ones(2, 4)), plain(torch.ones(2, 4)))


def one_rank_fails(rank: int, world_size: int) -> str:
    zero = fxzero.compile(TensorAll())
    zero(torch.ones(2, 4)).backward()
    try:
        zero(torch.full((2, 4), 1.0 - 2 * rank)).backward()
    except (RuntimeError, fxzero.errors.FxzeroError) as error:
        return str(error)
    return ""


def test_ranks_are_told_of_a_check_that_fails_on_one() -> None:
    errors = run_ranks(2, one_rank_fails)
    assert errors[1].startswith("inputs must be positive")
    assert "rank 1 failed" in errors[0] and "inputs must be positive" in errors[0]


def branch(x: Tensor) -> Any:
    return x if torch._is_all_true(x > 0) else -x  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("act", [branch, lambda x: x if (x > 0).all() else -x])
def test_a_branch_is_no_check(act: Callable[[Tensor], Tensor]) -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            return act(self.body(x)).sum()

    with pytest.raises(fxzero.errors.CaptureError):
        fxzero.compile(Branches(), islands=())(torch.ones(2, 4))

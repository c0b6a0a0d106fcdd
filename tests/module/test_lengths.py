"""Calls of other lengths: what is predicted computes what eager computes, and what must be traced is traced."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.testing import engine_of, run_ranks

CALLS = {"num": 0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.long = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.between(torch.dropout(self.first(x).relu(), 0.1, self.training)) - 1).square().mean()

    def between(self, x: Tensor) -> Tensor:
        return self.second(x)


class Branching(Net):
    def between(self, x: Tensor) -> Tensor:
        return self.second(x).sin() if x.shape[1] > 9 else self.second(x)


class ReadsMore(Net):
    def between(self, x: Tensor) -> Tensor:
        return self.second(x) * (self.long if x.shape[1] > 9 else 1.0)


class ReadsGlobal(Net):
    def between(self, x: Tensor) -> Tensor:
        if x.shape[1] > 9:
            CALLS["num"] += 1
        return self.second(x)


class Divides(Net):
    def between(self, x: Tensor) -> Tensor:
        return self.second(x) / x.shape[1]


class ReturnsTable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.tables = [torch.arange(400.0)]

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.tables[0]


def steps(zero: nn.Module, length: int, rows: int = 3) -> list[Tensor]:
    torch.manual_seed(length)
    x = torch.randn(rows, length, 8)
    zero.zero_grad()
    loss = zero(x)
    loss.backward()
    return [loss.detach(), *(param.grad.clone().view(-1) for param in zero.parameters() if param.grad is not None)]


def is_predicted(zero: fxzero.ZeroModule) -> bool:
    last = engine_of(zero).last
    assert last is not None
    return last.plan.is_predicted


def pair(make: Callable[[], nn.Module]) -> tuple[fxzero.ZeroModule, nn.Module]:
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    return fxzero.compile(model), plain


def both(zero: fxzero.ZeroModule, plain: nn.Module, length: int, rows: int = 3) -> bool:
    return all(map(torch.equal, steps(zero, length, rows), steps(plain, length, rows)))


def test_a_fourth_length_needs_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    zero, plain = pair(Net)
    with caplog.at_level(logging.INFO, "fxzero.module.plan_maker"):
        for length in (4, 5, 7, 6, 30, 2, 9):
            assert both(zero, plain, length)
            assert is_predicted(zero) == (length not in (4, 5, 7))
    assert "traced and planned in" in caplog.messages[2]
    assert "predicted from lengths (4, 5, 7) in" in caplog.messages[3]


def test_a_size_of_one_and_two_lengths_at_once_are_traced() -> None:
    zero, plain = pair(Net)
    for length in (4, 5, 7, 1):
        assert both(zero, plain, length)
    assert not is_predicted(zero)
    assert both(zero, plain, 6, rows=2)
    assert not is_predicted(zero)


def test_lengths_on_each_side_of_a_branch_are_predicted_among_themselves() -> None:
    zero, plain = pair(Branching)
    for length, predicted in ((4, 0), (5, 0), (7, 0), (12, 0), (10, 0), (15, 0), (11, 1), (6, 1), (20, 1)):
        assert both(zero, plain, length)
        assert is_predicted(zero) == bool(predicted)


def test_state_that_other_lengths_do_not_read_is_traced_and_guarded() -> None:
    zero, plain = pair(ReadsMore)
    for length in (4, 5, 7, 10):
        assert both(zero, plain, length)
    assert not is_predicted(zero)
    for model in (engine_of(zero).sharded.model, plain):
        model.long = 3.0  # type: ignore[assignment]
    assert both(zero, plain, 10)


def test_state_that_was_changed_since_is_no_part_of_a_family() -> None:
    zero, plain = pair(Net)
    for length in (4, 5, 7):
        both(zero, plain, length)
    for model in (zero, plain):
        model.eval()
    assert both(zero, plain, 6) and not is_predicted(zero)


def test_a_forward_that_writes_at_some_lengths_does_so() -> None:
    zero, _ = pair(ReadsGlobal)
    for length in (4, 5, 7, 10):
        CALLS["num"] = 0
        steps(zero, length)
        assert CALLS["num"] == (length > 9)
    assert not is_predicted(zero)


def test_constants_that_depend_on_the_length_are_right() -> None:
    zero, plain = pair(Divides)
    for length in (4, 5, 7, 6, 13):
        assert both(zero, plain, length)


def test_a_large_tensor_of_the_python_state_is_returned_at_every_length() -> None:
    zero, plain = pair(ReturnsTable)
    for length in (4, 5, 7, 6):
        x = torch.randn(3, length, 8)
        torch.manual_seed(length)
        loss, table = zero(x)
        torch.manual_seed(length)
        assert torch.equal(loss, plain(x)[0]) and torch.equal(table, torch.arange(400.0))


def test_predicted_plans_accumulate_evaluate_and_narrow() -> None:
    zero, plain = pair(Net)
    for length in (4, 5, 7):
        both(zero, plain, length)
    for model in (zero, plain):
        model.zero_grad()
        torch.manual_seed(3)
        for _ in range(2):
            model(torch.randn(3, 6, 8)).backward()
    assert is_predicted(zero)
    torch.manual_seed(4)
    with zero.no_sync():
        zero(torch.randn(3, 6, 8)).backward()
    zero(torch.randn(3, 8, 8)).backward()
    assert is_predicted(zero)
    torch.manual_seed(4)
    for length in (6, 8):
        plain(torch.randn(3, length, 8)).backward()
    for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad.view(-1), other.grad.view(-1), rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]
    with torch.no_grad():
        for model in (zero, plain):
            model.eval()
        for length in (4, 5, 7, 11):
            x = torch.randn(3, length, 8)
            assert torch.equal(zero(x), plain(x))
    assert is_predicted(zero)


def on_ranks(rank: int, world_size: int) -> list[Any]:
    torch.manual_seed(0)
    zero = fxzero.compile(Net().eval())
    found: list[Any] = []
    for length in (4, 5, 7, 6, 9):
        torch.manual_seed(length + rank)
        zero.zero_grad()
        zero(torch.randn(3, length + rank, 8)).backward()
        found.append((is_predicted(zero), [param.grad.clone() for param in zero.parameters()]))  # type: ignore[union-attr]
    return found


def test_ranks_predict_lengths_of_their_own() -> None:
    ranks = run_ranks(2, on_ranks)
    assert [predicted for predicted, _ in ranks[0]] == [predicted for predicted, _ in ranks[1]]
    assert ranks[0][-1][0]

"""Plans that are dropped leave nothing behind, however many shapes and values a training meets."""

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import graph_module

import fxzero
from fxzero import torch_internals
from fxzero.module import plan_cache


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = x + torch.dropout(torch.tanh(layer(x)), 0.1, self.training)
        return x.square().mean() * scale


def num_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def train(zero: fxzero.ZeroModule, number: int) -> None:
    zero(torch.ones(1 + number, 8)).backward()


def accumulate(zero: fxzero.ZeroModule, number: int) -> None:
    with zero.no_sync():
        train(zero, number)
    train(zero, number)


def evaluate(zero: fxzero.ZeroModule, number: int) -> None:
    with torch.no_grad():
        zero(torch.ones(1 + number, 8))


def pass_another_number(zero: fxzero.ZeroModule, number: int) -> None:
    zero(torch.ones(2, 8), scale=1.0 + number).backward()


def train_another_model(zero: fxzero.ZeroModule, number: int) -> None:
    other = Net()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    train(fxzero.compile(other, optimizer=optimizer), number)
    optimizer.step()


@pytest.mark.parametrize(
    ("call", "most_objects"),
    [(train, 2), (accumulate, 2), (evaluate, 2), (pass_another_number, 12), (train_another_model, 2)],
)
def test_new_kinds_of_calls_leave_nothing_behind(
    call: Callable[[fxzero.ZeroModule, int], None], most_objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`most_objects` for each: of a number that ranks pass alike, it is remembered that it was agreed on."""
    monkeypatch.setattr(plan_cache, "MAX_PLANS", 1)
    monkeypatch.setattr(torch_internals, "MAX_FAKE_RESULTS", 0)
    zero = fxzero.compile(Net())
    numbers = iter(range(7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            call(zero, next(numbers))
        before = num_objects(), len(FakeTensorMode.cache), len(graph_module._loader.eval_cache)
        for _ in range(4):
            call(zero, next(numbers))
        after = num_objects(), len(FakeTensorMode.cache), len(graph_module._loader.eval_cache)
    assert after[0] - before[0] <= 4 * most_objects
    assert after[1:] == before[1:]


class Flagged(nn.Module):
    """Keeps its flag in a place of its own."""

    @property
    def training(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.__dict__.get("is_training", True))

    @training.setter
    def training(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.__dict__["is_training"] = value

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def test_a_flag_that_is_a_property_chooses_the_plan_too() -> None:
    zero = fxzero.compile(nn.Sequential(nn.Linear(4, 4), part := Flagged()))
    trained = zero(torch.ones(2, 4))
    part.eval()
    assert torch.equal(2 * zero(torch.ones(2, 4)), trained)
    part.train()
    assert torch.equal(zero(torch.ones(2, 4)), trained)

"""Globals, variables of closures and attributes of classes that a forward sets: each step does, as the plain model."""

import contextvars
import gc
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import CaptureError
from tests.helpers.pairs import pair, points

steps_taken = 0
last_output: Tensor | None = None
calls_of_hook = 0


class Totals:
    """State that all models share."""

    calls = 0
    weight = torch.ones(4)


class Net(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)


class Global(Net):
    def forward(self, x: Tensor) -> Tensor:
        global steps_taken
        steps_taken += 1
        return (self.body(x) / steps_taken).sum()


class Wrapping(Net):
    def forward(self, x: Tensor) -> Tensor:
        global steps_taken
        for _ in range(2):
            steps_taken = steps_taken * 2 + 1
        if steps_taken > 20:
            steps_taken = 0
        return (self.body(x) * steps_taken).sum()


class GlobalTensor(Net):
    def forward(self, x: Tensor) -> Tensor:
        global last_output
        last_output = self.body(x)
        return last_output.pow(2).sum()


class OfItsClass(Net):
    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return (self.body(x) * self.calls).sum()


class OnlyCounted(Net):
    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.body(x).sum()


class OfAnotherClass(Net):
    def forward(self, x: Tensor) -> Tensor:
        Totals.calls += 1
        return (self.body(x) * Totals.calls * Totals.weight).sum()


def counter() -> tuple[Callable[[], int], Callable[[], int]]:
    number = 0

    def tick() -> int:
        nonlocal number
        number += 1
        return number

    return tick, lambda: number


class Closure(Net):
    def __init__(self) -> None:
        super().__init__()
        self.tick, self.get = counter()

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) * self.tick()).sum()


class VariableOfForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        factor = 0

        def add() -> None:
            nonlocal factor
            factor += 2

        add()
        add()
        return (self.body(x) * factor).sum()


def count(module: nn.Module, args: Any, output: Any) -> None:
    global calls_of_hook
    calls_of_hook += 1


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(count)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).sum()


MODELS: list[type[Net]] = [
    Global, Wrapping, GlobalTensor, OfItsClass, OnlyCounted, OfAnotherClass, Closure, VariableOfForward, Hooked,
]  # fmt: skip


def state(kind: type[Net], model: Any) -> list[Any]:
    last = None if last_output is None else last_output.tolist()
    of_closure = model.get() if kind is Closure else 0
    return [steps_taken, last, calls_of_hook, Totals.calls, kind.calls, of_closure]


def losses(kind: type[Net], monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> list[Any]:
    """Losses, gradients and state of six steps, in one of which a tensor of a class is replaced."""
    for name, value in (("steps_taken", 0), ("last_output", None), ("calls_of_hook", 0)):
        monkeypatch.setitem(globals(), name, value)
    for owner, name, value in ((Totals, "calls", 0), (kind, "calls", 0), (Totals, "weight", torch.ones(4))):
        monkeypatch.setattr(owner, name, value)
    torch.manual_seed(0)
    model = kind()
    called = fxzero.compile(model) if compiled else model
    seen: list[Any] = []
    for step in range(6):
        if step == 4:
            monkeypatch.setattr(Totals, "weight", torch.full((4,), 2.0))
        loss = called(torch.full((2, 4), 1.0 + step))
        loss.backward()
        grads = [param.grad.flatten().tolist() for param in model.parameters() if param.grad is not None]
        seen.append([loss.item(), grads, *state(kind, model)])
        called.zero_grad()
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_state_outside_of_objects_is_read_and_left_behind(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = losses(kind, monkeypatch, compiled=False)
    assert losses(kind, monkeypatch, compiled=True) == plain


def test_a_number_in_a_closure_becomes_an_input() -> None:
    zero = fxzero.compile(Closure())
    for _ in range(6):
        zero(torch.ones(2, 4))
    assert "number (of the closure of counter.<locals>.tick) is an input" in str(zero.schedule.guards)


def test_a_global_that_is_deleted_is_refused_by_name() -> None:
    space: dict[str, Any] = {"__name__": "user", "THERE": 1}
    source = "def forward(self, x):\n    global THERE\n    THERE = 2\n    del THERE\n    return self.body(x).sum()"
    exec(compile(source, "/user.py", "exec"), space)
    model = Net()
    model.forward = types.MethodType(space["forward"], model)
    with pytest.raises(CaptureError, match=r"deletes user\.THERE"):
        fxzero.compile(model)(torch.ones(2, 4))
    assert space["THERE"] == 1


num_collections = 0


def note_collection(phase: str, info: object) -> None:
    global num_collections
    num_collections += 1


def test_callbacks_of_the_garbage_collector_are_no_part_of_a_forward() -> None:
    gc.callbacks.append(note_collection)
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        zero, plain = pair(nn.Linear(6, 3))
        assert torch.equal(zero(points()), plain(points()))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note_collection)
    assert num_collections > 0
    assert "num_collections" not in str(zero.schedule.guards)


factor: contextvars.ContextVar[float] = contextvars.ContextVar("factor", default=1.0)
of_thread = threading.local()


class ReadsContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum() * factor.get() + of_thread.shift


def test_context_variables_and_state_of_a_thread_are_read_at_each_call() -> None:
    model = ReadsContext()
    of_thread.shift = 0.0
    zero, x = fxzero.compile(model), torch.ones(3, 4)
    found: list[float] = []
    for step in range(6):
        token = factor.set(1.0 + step)
        of_thread.shift = float(step // 2)
        found.append(zero(x).item())
        factor.reset(token)
    weight = zero.state_dict()
    plain = torch.nn.functional.linear(x, weight["linear.weight"], weight["linear.bias"]).sum()
    assert found == [(plain * (1.0 + step) + float(step // 2)).item() for step in range(6)]

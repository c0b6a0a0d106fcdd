"""Python state that a forward reads or writes: a compiled model does what the plain one does, step for step."""

import copy
import enum
import logging
import math
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero.errors import CaptureError, StaleBackwardError
from fxzero.testing import engine_of
from tests.helpers.pairs import assert_same, sgd

SCALE = 1.0
TABLE = {"scale": 1.0}


class Mode(enum.Enum):
    ONCE = 1
    TWICE = 2


@dataclass
class Config:
    """What a user's configuration looks like."""

    temperature: float = 1.0
    mode: Mode = Mode.ONCE
    skipped: tuple[int, ...] = ()
    nested: dict[str, Any] = field(default_factory=lambda: {"deep": {"factor": 1.0}})


class Gain:
    """A plain object with state, which a method changes."""

    def __init__(self) -> None:
        self.value, self.calls = 1.0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.value


class Net(nn.Module):
    """Holds every kind of state that the forwards below read."""

    threshold = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.act: nn.Module = nn.ReLU()
        self.drop = nn.Dropout(0.0)
        self.beta, self.calls, self.last, self.skip = 1.0, 0, None, []
        self.weights = torch.ones(3)
        self.config, self.options, self.gain = Config(), SimpleNamespace(scale=1.0), Gain()
        self.stats: dict[str, Any] = {"n": 0}
        self.losses: list[Tensor] = []

    def features(self, x: Tensor) -> Tensor:
        return self.drop(self.act(self.body(x)))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def variant(forward: Callable[[Any, Tensor], Tensor]) -> type[Net]:
    return type("Variant", (Net,), {"forward": forward})


def same_state(zero: Any, plain: Any) -> None:
    """What the forward left behind is the same, and no traced tensor is among it."""
    for name in ("beta", "calls"):
        assert getattr(zero, name) == getattr(plain, name), name
        assert type(getattr(zero, name)) is type(getattr(plain, name)), name
    for one, other in ((zero.last, plain.last), *zip(zero.losses, plain.losses, strict=True)):
        assert (one is None) == (other is None)
        if other is not None:
            assert type(one) is Tensor
            assert torch.equal(one, other)
    assert zero.stats == plain.stats
    assert zero.gain.calls == plain.gain.calls


def check(model: nn.Module, change: Callable[[Any, int], object], steps: int = 6) -> fxzero.ZeroModule:
    """Train beside the plain model, with the change made to both before each step."""
    plain = model
    zero = fxzero.compile(copy.deepcopy(model))
    optimizers = [sgd(zero), sgd(plain)]
    for step in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        outputs: list[Tensor] = []
        for module, optimizer in zip((zero, plain), optimizers, strict=True):
            change(module, step)
            torch.manual_seed(step)
            outputs.append(module(x))
            if outputs[-1].requires_grad:
                outputs[-1].square().mean().backward()
            optimizer.step()
        assert torch.equal(*outputs), f"step {step}"
        assert_same(zero, plain)
        same_state(zero, plain)
        for optimizer in optimizers:
            optimizer.zero_grad()
    return zero


def nothing(model: Any, step: int) -> None:
    """The forward itself changes its state."""


def set_global(model: Any, step: int) -> None:
    globals()["SCALE"] = 1.0 + step // 2


READ = {
    "an attribute": (lambda self, x: self.head(self.features(x)) * self.beta, lambda m, s: setattr(m, "beta", 1.0 + s)),
    "an attribute in arithmetic": (
        lambda self, x: self.head(self.features(x)) * (1 - self.beta) + self.beta,
        lambda m, s: setattr(m, "beta", 0.1 * s),
    ),
    "an attribute in a branch": (
        lambda self, x: self.head(self.features(x)) * (2 if self.beta > 3 else 1),
        lambda m, s: setattr(m, "beta", 1.0 + s),
    ),
    "an attribute in math": (
        lambda self, x: self.head(self.features(x)) * math.exp(self.beta),
        lambda m, s: setattr(m, "beta", 0.1 * (s // 3)),
    ),
    "an integer": (lambda self, x: self.head(self.features(x)) * self.beta, lambda m, s: setattr(m, "beta", 1 + s)),
    "its type": (
        lambda self, x: self.head(self.features(x)) * (2 if self.beta is True else 1),
        lambda m, s: setattr(m, "beta", [1, True, 1.0][s % 3]),
    ),
    "whether it is a float": (
        lambda self, x: self.head(self.features(x)) * (self.beta if isinstance(self.beta, float) else 100.0),
        lambda m, s: setattr(m, "beta", 0.1 * (s // 2)),
    ),
    "the sign of zero": (
        lambda self, x: self.head(self.features(x)) * math.copysign(1.0, self.beta),
        lambda m, s: setattr(m, "beta", [0.0, -0.0][s % 2]),
    ),
    "a class attribute": (
        lambda self, x: self.head(self.features(x)) * self.threshold,
        lambda m, s: setattr(m, "threshold", 0.5 + s // 3) if s >= 3 else None,
    ),
    "an absent attribute": (
        lambda self, x: self.head(self.features(x)) * getattr(self, "extra", 1.0),
        lambda m, s: setattr(m, "extra", 3.0) if s == 3 else None,
    ),
    "dropout": (lambda self, x: self.head(self.features(x)), lambda m, s: setattr(m.drop, "p", 0.1 * (s // 2))),
    "a submodule": (
        lambda self, x: self.head(self.features(x)),
        lambda m, s: setattr(m, "act", nn.Tanh()) if s == 3 else None,
    ),
    "a method of an instance": (
        lambda self, x: self.head(self.features(x)),
        lambda m, s: setattr(m.act, "forward", torch.sigmoid) if s == 3 else None,
    ),
    "a config": (
        lambda self, x: self.head(self.features(x)) / self.config.temperature,
        lambda m, s: setattr(m.config, "temperature", 1.0 + s),
    ),
    "an enum of a config": (
        lambda self, x: self.head(self.features(x)) * self.config.mode.value,
        lambda m, s: setattr(m.config, "mode", Mode(1 + s % 2)),
    ),
    "a tuple of a config": (
        lambda self, x: self.head(self.features(x)) * (1 + len(self.config.skipped)),
        lambda m, s: setattr(m.config, "skipped", tuple(range(s % 3))),
    ),
    "a dict in a dict": (
        lambda self, x: self.head(self.features(x)) * self.config.nested["deep"]["factor"],
        lambda m, s: m.config.nested["deep"].update(factor=1.0 + s),
    ),
    "another config": (
        lambda self, x: self.head(self.features(x)) / self.config.temperature,
        lambda m, s: setattr(m, "config", Config(temperature=1.0 + s % 2)),
    ),
    "a namespace": (
        lambda self, x: self.head(self.features(x)) * self.options.scale,
        lambda m, s: setattr(m.options, "scale", 1.0 + s // 2),
    ),
    "an object that is called": (
        lambda self, x: self.gain(self.head(self.features(x))),
        lambda m, s: setattr(m.gain, "value", 1.0 + s),
    ),
    "a list": (
        lambda self, x: self.head(self.features(x)) * (2 if 0 in self.skip else 1),
        lambda m, s: m.skip.append(0) if s == 3 else None,
    ),
    "a tensor that is replaced": (
        lambda self, x: self.head(self.features(x)) * self.weights,
        lambda m, s: setattr(m, "weights", torch.full((3,), 1.0 + s)),
    ),
    "a tensor that is written": (
        lambda self, x: self.head(self.features(x)) * self.weights,
        lambda m, s: m.weights.add_(1.0),
    ),
    "a tensor of another shape": (
        lambda self, x: self.head(self.features(x)) * self.weights,
        lambda m, s: setattr(m, "weights", torch.full((3,) if s % 2 else (1,), 1.0 + s)),
    ),
    "a global": (lambda self, x: self.head(self.features(x)) * SCALE, set_global),
    "an entry of a global": (
        lambda self, x: self.head(self.features(x)) * TABLE["scale"],
        lambda m, s: TABLE.update(scale=1.0 + s),
    ),
    "nothing that changes": (lambda self, x: self.head(self.features(x)), nothing),
}


@pytest.mark.parametrize("what", READ)
def test_what_a_forward_reads_counts(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setitem(TABLE, "scale", 1.0)
    forward, change = READ[what]
    torch.manual_seed(0)
    zero = check(variant(forward)(), change)
    assert len(engine_of(zero).plans) <= 6
    if what == "nothing that changes":
        assert len(engine_of(zero).plans) == 1


# -- what a forward writes ---------------------------------------------------------------------------------------


def count(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.head(self.features(x))


def divide(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.head(self.features(x)) / self.calls


def each_third(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    y = self.head(self.features(x))
    return y * 2 if self.calls % 3 == 0 else y


def warm_up(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    y = self.head(self.features(x))
    return y if self.calls <= 3 else y * 10


def decay(self: Any, x: Tensor) -> Tensor:
    self.beta = self.beta * 0.9
    return self.head(self.features(x)) * self.beta


def keep(self: Any, x: Tensor) -> Tensor:
    self.last = self.features(x)
    return self.head(self.last)


def keep_output(self: Any, x: Tensor) -> Tensor:
    self.last = self.head(self.features(x))
    return self.last


def use_last(self: Any, x: Tensor) -> Tensor:
    y = self.head(self.features(x))
    result = y if self.last is None else y + self.last
    self.last = y.detach()
    return result


def collect(self: Any, x: Tensor) -> Tensor:
    y = self.features(x)
    self.losses.append(y.square().mean().detach())
    return self.head(y)


def statistics(self: Any, x: Tensor) -> Tensor:
    self.stats["n"] += 1
    return self.head(self.features(x))


def flag(self: Any, x: Tensor) -> Tensor:
    self.beta = 2.0
    return self.head(self.features(x)) * self.beta


WRITE = {
    "a counter that nothing reads": (count, nothing),
    "a counter": (divide, nothing),
    "a counter in a branch": (each_third, nothing),
    "a counter against a bound": (warm_up, nothing),
    "a number that decays": (decay, nothing),
    "a tensor": (keep, nothing),
    "the output": (keep_output, nothing),
    "a tensor of the call before": (use_last, nothing),
    "an entry of a dict": (statistics, nothing),
    "items of a list": (collect, lambda m, s: m.losses.clear()),
    "what was set in between": (flag, lambda m, s: setattr(m, "beta", 5.0)),
    "a counter that is set back": (divide, lambda m, s: setattr(m, "calls", 0) if s == 4 else None),
}


@pytest.mark.parametrize("what", WRITE)
def test_what_a_forward_writes_is_left_behind(what: str) -> None:
    forward, change = WRITE[what]
    torch.manual_seed(0)
    zero = check(variant(forward)(), change, steps=8)
    assert len(engine_of(zero).plans) <= 6


def test_a_loss_that_a_layer_leaves_behind_is_differentiated_through_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.features(x)
        self.last = y.square().mean()
        return self.head(y)

    torch.manual_seed(0)
    plain = variant(forward)()
    zero = fxzero.compile(copy.deepcopy(plain))
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for module in (zero, plain):
            y = module(x)
            (y.mean() + 0.1 * cast(Tensor, module.last)).backward()
        assert_same(zero, plain)


# -- hooks -------------------------------------------------------------------------------------------------------


def hooked(act: Callable[[nn.Module, list[Any]], Any], remove_at: int = 4) -> None:
    """Hooks that are registered at step 1 on `act`, and removed later: outputs, and what hooks collected."""
    found: list[list[Any]] = []
    outputs: list[list[Tensor]] = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = variant(lambda self, x: self.head(self.features(x)))()
        part = model.act
        module = fxzero.compile(model) if compiled else model
        collected: list[Any] = []
        handle: Any = None
        outputs.append([])
        for step in range(6):
            if step == 1:
                handle = act(part, collected)
            if step == remove_at:
                handle.remove()
            y = module(torch.randn(4, 6, generator=torch.Generator().manual_seed(step)))
            y.square().mean().backward()
            outputs[-1].append(y.detach())
        outputs[-1].append(dict(module.named_parameters())["body.weight"].grad.flatten())
        found.append(collected)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


HOOKS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "collects": lambda m, found: m.register_forward_hook(lambda _, args, y: found.append(y.detach())),
    "collects inputs": lambda m, found: m.register_forward_pre_hook(lambda _, args: found.append(args[0].detach())),
    "counts": lambda m, found: m.register_forward_hook(lambda *_: found.append(1)),
    "changes": lambda m, found: m.register_forward_hook(lambda _, args, y: torch.mul(cast(Tensor, y), 2)),
    "changes inputs": lambda m, found: m.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "reads values": lambda m, found: m.register_forward_hook(lambda _, args, y: found.append(y.mean().item())),
    "changes gradients": lambda m, found: m.register_full_backward_hook(lambda _, gi, go: (gi[0] * 2,)),
}


@pytest.mark.parametrize("what", HOOKS)
def test_hooks_of_parts_of_the_model(what: str) -> None:
    hooked(HOOKS[what])


# -- bounds ------------------------------------------------------------------------------------------------------


def test_a_number_that_must_be_a_constant_is_traced_anew_with_one_warning() -> None:
    torch.manual_seed(0)
    model = variant(lambda self, x: self.head(F.dropout(self.features(x), self.beta, training=True)))()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zero = check(model, lambda m, s: setattr(m, "beta", 0.05 * s), steps=14)
    text = [str(each.message) for each in caught if "changes from call to call" in str(each.message)]
    assert len(text) == 1
    assert text[0].startswith("beta ")
    assert len(engine_of(zero).plans) <= 8


def arguments(forward: Callable[..., Tensor], steps: int = 8) -> fxzero.ZeroModule:
    """Train beside the plain model with a number among the arguments that changes in each call."""
    torch.manual_seed(0)
    plain = variant(forward)()
    zero = fxzero.compile(copy.deepcopy(plain))
    for step in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        outputs: list[Tensor] = []
        for module in (zero, plain):
            torch.manual_seed(step)
            outputs.append(module(x, 0.1 + 0.07 * step))
            outputs[-1].square().mean().backward()
        assert torch.equal(*outputs), f"step {step}"
        assert_same(zero, plain)
    return zero


def test_a_number_among_the_arguments_becomes_an_input() -> None:
    zero = arguments(lambda self, x, beta: self.head(self.features(x)) * beta + (1 - beta))
    assert len(engine_of(zero).plans) <= 4


def test_a_number_among_the_arguments_that_must_be_a_constant_is_named_once() -> None:
    with pytest.warns(UserWarning, match="changes from call to call") as caught:
        arguments(lambda self, x, p: F.dropout(self.head(self.features(x)), p, training=True))
    assert len([each for each in caught if "changes from call to call" in str(each.message)]) == 1


def test_the_schedule_lists_what_is_guarded() -> None:
    torch.manual_seed(0)
    model = variant(lambda self, x: self.head(self.features(x)) * self.beta / self.config.temperature)()
    zero = fxzero.compile(model, example=torch.ones(4, 6))
    lines = str(zero.schedule.guards).splitlines()
    assert "beta = 1.0" in lines
    assert "config.temperature = 1.0" in lines
    assert "drop.p = 0.0" in lines


def test_a_list_that_grows_is_named_once() -> None:
    zero = fxzero.compile(variant(collect)())
    with pytest.warns(UserWarning, match="losses has changed 8 times") as caught:
        for _ in range(12):
            zero(torch.ones(2, 6))
    assert len([each for each in caught if "has changed" in str(each.message)]) == 1


class Copies(nn.Linear):
    """Reads a copy of its config that it changes, as encoder-decoder models of transformers do."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.config = SimpleNamespace(scale=2.0, other=1.0)

    def forward(self, input: Tensor) -> Tensor:
        config = copy.deepcopy(self.config)
        scale = config.other * config.scale
        config.other = 3.0
        del config.scale
        return super().forward(input) * scale


def test_a_copy_of_a_config_that_forward_changes_is_no_state(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain = Copies()
    zero = fxzero.compile(copy.deepcopy(plain))
    with caplog.at_level(logging.INFO, "fxzero"):
        for scale in (2.0, 2.0, 5.0):
            plain.config.scale = zero.config.scale = scale
            assert torch.equal(zero(torch.ones(2, 4)), plain(torch.ones(2, 4)))
    assert len([each for each in caplog.messages if "traced anew" in each]) == 1


class Recurrent(nn.Module):
    """Keeps its hidden state for the next call, which cuts off its history: truncated back-propagation."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.cell, self.head, self.form = nn.Linear(6, 3), nn.Linear(3, 1), form
        self.state: Any = {} if form == "entries" else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(self.state, torch.Tensor) and not self.state:
            h, c = x.new_zeros(len(x), 3), x.new_zeros(len(x), 3)
        elif self.form in ("tensor", "whole"):
            h, c = self.state if self.form == "whole" else self.state.detach(), self.state.detach()
        else:
            items = self.state.values() if isinstance(self.state, dict) else self.state
            h, c = (each.detach() for each in items)
        h = torch.tanh(self.cell(torch.cat([x, h], 1)) + c)
        if self.form == "entries":
            self.state["h"], self.state["c"] = h, h * c
        else:
            self.state = {"tuple": (h, h * c), "list": [h, h * c], "dict": {"h": h, "c": h * c}}.get(self.form, h)
        return self.head(h).square().mean(), self.head(h * x).sum()


@pytest.mark.parametrize(
    "form", ["tensor", "tuple", "entries", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in ("list", "dict"))]
)
def test_the_hidden_state_of_the_last_call_whose_history_is_cut_off(form: str) -> None:
    torch.manual_seed(0)
    model = Recurrent(form)
    plain, zero = copy.deepcopy(model), fxzero.compile(model)
    for step in range(6):
        x = torch.randn(2, 3)
        for module in (plain, zero):
            module(x)[step > 3].backward()
        assert_same(zero, plain)
        with torch.no_grad():
            for param in (*plain.parameters(), *zero.parameters()):
                assert param.grad is not None
                param -= 0.1 * param.grad
                param.grad = None
    assert len(engine_of(zero).plans) <= 5


def test_a_hidden_state_with_its_history_is_refused() -> None:
    zero = fxzero.compile(Recurrent("whole"))
    zero(torch.ones(2, 3))[0].backward()
    with pytest.raises(CaptureError, match=r"tensor of an earlier call, \[2, 3\].*Cut the history off"):
        zero(torch.ones(2, 3))


class Reversed(torch.autograd.Function):
    """Reverses gradients, by the strength that its module has then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.module.config["strength"] * grads[0], None


class Scaled(torch.autograd.Function):
    """Scales by what its module says, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return x * cast(Any, module).scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.module.scale * grads[0], None


class ReadsLate(nn.Module):
    """Reads state in its backward: in a Function, which may read it in forward too, or in a hook."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.where, self.config, self.scale = nn.Linear(4, 4), where, {"strength": 1.0}, 1.0
        self.unused = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.where == "function":
            return Reversed.apply(y, self)
        if self.where == "function, and forward":
            return Scaled.apply(y, self)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * self.scale)
        return y


@pytest.mark.parametrize("where", ["function", "function, and forward", "hook"])
def test_what_a_backward_reads_must_not_change_behind_its_forward(where: str) -> None:
    x, model = torch.ones(2, 4), ReadsLate(where)
    zero, plain = fxzero.compile(copy.deepcopy(model)), model

    def change(module: Any, value: float) -> None:
        module.config["strength"] = module.scale = value

    for value in (1.0, 2.0, 3.0, 4.0):  # constants of plans, and then an input
        for module in (zero, plain):
            change(module, value)
            loss = module(x).sum()
            module.unused += 1
            loss.backward()
        assert_same(zero, plain)
        late = zero(x).sum()
        change(zero, value + 0.5)
        with pytest.raises(StaleBackwardError, match="has changed between this forward and its backward, which reads"):
            late.backward()


class Moves(nn.Module):
    """Moves tensors and numbers of earlier calls from one place to another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.how, self.calls = nn.Linear(4, 4), how, [0, 0]
        self.a, self.b = torch.ones(4), torch.full((4,), 2.0)
        if how == "one tensor":
            self.b = self.a
        self.items: Any = [torch.ones(4), torch.zeros(4)]
        self.last: Any = deque([torch.ones(4), torch.zeros(4)], maxlen=2)
        self.named = {"now": torch.ones(4), "old": torch.zeros(4)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        mean = y.mean(0).detach()
        if self.how in ("attributes", "one tensor"):
            y = y + self.a * 2 + self.b
            self.a, self.b = mean, self.a
        elif self.how == "exchange":
            y = y + self.a * 2 + self.b
            self.a, self.b = self.b, self.a
        elif self.how == "dict":
            y = y + self.named["now"] - self.named["old"]
            self.named["old"], self.named["now"] = self.named["now"], mean
        elif self.how == "new list":
            y = y + self.items[0] - self.items[1]
            self.items = [mean, self.items[0]]
        elif self.how == "items":
            y = y + self.items[0] - self.items[1]
            self.items[1] = self.items[0]
            self.items[0] = mean
        elif self.how == "log":
            self.named["now"] = self.items[1] = mean
        elif self.how == "queue":
            y = y + self.last[0] - self.last[1]
            self.last.append(mean)
            self.items.pop(0)
            self.items.append(mean)
        else:
            self.calls[0] += 1
            y = y * self.calls[0]
        return y.sum()

    def state(self) -> list[Any]:
        return [self.a, self.b, *self.items, *self.last, *self.named.values(), *map(torch.tensor, self.calls)]


@pytest.mark.parametrize(
    "how", ["attributes", "one tensor", "exchange", "dict", "new list", "items", "log", "queue", "counter"]
)
def test_values_of_earlier_calls_are_moved(how: str) -> None:
    plain = Moves(how)
    model = copy.deepcopy(plain)
    zero = fxzero.compile(model)
    for step in range(6):
        x = torch.arange(8.0).view(2, 4) * (step + 1)
        losses = [zero(x), plain(x)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        for own, other in zip(model.state(), plain.state(), strict=True):
            assert torch.equal(own, other)
        assert_same(zero, plain)
    assert len(engine_of(zero).plans) <= 3  # constants, and then inputs


def test_a_tensor_with_a_gradient_is_not_moved() -> None:
    class Model(nn.Linear):
        kept = last = torch.zeros(2, 4)

        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input) + self.kept.detach()
            self.kept, self.last = self.last, y
            return y

    zero = fxzero.compile(Model(4, 4))
    zero(torch.ones(2, 4))
    with pytest.raises(CaptureError, match="moves a tensor with a gradient, of an earlier call.*detach"):
        zero(torch.ones(2, 4))

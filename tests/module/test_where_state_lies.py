"""State in less usual places: slots, functions, partials, modules, deep containers; each step sees it as it is."""

import array
import collections
import copy
import functools
import itertools
import multiprocessing
import os
import types
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import CaptureError, FxzeroError
from tests.helpers import settings
from tests.helpers.pairs import assert_same


class Slotted:
    __slots__ = ("last", "number")

    def __init__(self) -> None:
        self.number, self.last = 1.0, None


class AttrDict(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Config:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scaled(_this, x: Tensor) -> Tensor:
        return x * _this.factor


class Own:
    """A descriptor that keeps its value itself."""

    value = 1.0

    def __get__(self, owner: object, kind: type | None = None) -> float:
        return self.value


class Scale:
    of_class = of_subclass = 1.0

    def scale(self) -> float:
        return 2.0


class Net(nn.Module, Scale):
    described = Own()

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.slots, self.options = Slotted(), SimpleNamespace(first=1.0)
        self.table, self.list = AttrDict(factor=1.0), collections.UserDict({"factor": 1.0})
        self.deep = {"a": [(1, {"b": {"c": [{"d": 1.0}]}})]}
        self.config = Config(1.0)
        self.settings = settings
        self.chain = collections.ChainMap({}, {"factor": 1.0})
        self.view = types.MappingProxyType(self.table)
        self.shared, self.array = multiprocessing.Value("d", 1.0), array.array("d", [1.0])
        self.partial = functools.partial(lambda table, x: x * table["factor"], {"factor": 1.0})
        self.bound = self.config.scaled
        self.weak, self.proxy = weakref.ref(self.config), weakref.proxy(self.config)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.body(x)).sum()

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def with_default(self: Any, x: Tensor, factor: float = 1.0, table: dict[str, float] = {"n": 0}) -> Tensor:  # noqa: B006
    table["n"] += 1
    return x * factor / table["n"]


def counted(self: Any, x: Tensor) -> Tensor:
    counted.calls += 1  # type: ignore[attr-defined]
    return x / counted.calls  # type: ignore[attr-defined]


def imports(self: Any, x: Tensor) -> Tensor:
    from tests.helpers import settings as found
    from tests.helpers.settings import SCALE

    return x * SCALE + found.SCALE


def write_slots(self: Any, x: Tensor) -> Tensor:
    self.slots.number += 1
    self.slots.last = x.detach()
    return x / self.slots.number


def of_dict(self: Any, x: Tensor) -> Tensor:
    return x * vars(self.config)["factor"] * vars(self).get("absent", 1.0)


def registers_once(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "late"):
        self.register_buffer("late", x.detach().mean(0))
    return x * self.late


def of_class(self: Any, x: Tensor) -> Tensor:
    return x * type(self).of_class * self.of_subclass * super(Net, self).scale()  # type: ignore[misc]


def set_of_class(model: Any, step: int) -> None:
    Scale.of_class = 1.0 + step
    if step == 3:
        type(model).of_subclass = 5.0


def set_in_memory(model: Any, step: int) -> None:
    model.shared.value = 1.0 + step
    model.array[0] = 1.0 + step


def set_in_mappings(model: Any, step: int) -> None:
    model.chain["factor"] = 1.0 + step
    model.table["factor"] = 1.0 + step


def set_scale(model: Any, step: int) -> None:
    settings.SCALE = 1.0 + step


def set_factor(model: Any, step: int) -> None:
    model.config.factor = 1.0 + step


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, int], object]]] = {
    "slots": (lambda self, x: x * self.slots.number, lambda m, s: setattr(m.slots, "number", 1.0 + s)),
    "slots that forward sets": (write_slots, lambda m, s: setattr(m.slots, "number", 1.0) if s == 3 else None),
    "an attribute added to a namespace": (
        lambda self, x: x * getattr(self.options, "second", 1.0),
        lambda m, s: setattr(m.options, "second", 3.0) if s == 2 else None,
    ),
    "a dict of a class of its own": (
        lambda self, x: x * self.table.factor,
        lambda m, s: m.table.update(factor=1.0 + s),
    ),
    "a UserDict": (lambda self, x: x * self.list["factor"], lambda m, s: m.list.update(factor=1.0 + s)),
    "a deep container": (
        lambda self, x: x * self.deep["a"][0][1]["b"]["c"][0]["d"],
        lambda m, s: m.deep["a"][0][1]["b"]["c"][0].update(d=1.0 + s),
    ),
    "an argument of a partial": (
        lambda self, x: self.partial(x),
        lambda m, s: m.partial.args[0].update(factor=1.0 + s),
    ),
    "the object of a bound method": (lambda self, x: self.bound(x), set_factor),
    "a weak reference": (lambda self, x: x * self.weak().factor, set_factor),
    "a weak proxy": (lambda self, x: x * self.proxy.factor, set_factor),
    "a descriptor": (
        lambda self, x: x * self.described,
        lambda m, s: setattr(Net.__dict__["described"], "value", 1.0 + s),
    ),
    "a __dict__": (of_dict, lambda m, s: (set_factor(m, s), setattr(m, "absent", 1.0 + s))),
    "default arguments": (with_default, lambda m, s: setattr(with_default, "__defaults__", (1.0 + s, {"n": s}))),
    "a default argument that forward changes": (with_default, lambda m, s: None),
    "the code of a function": (
        lambda self, x: changing(x),
        lambda m, s: setattr(changing, "__code__", (doubled if s > 2 else tripled).__code__),
    ),
    "an attribute of a function": (counted, lambda m, s: None),
    "imports in forward": (imports, set_scale),
    "a module in an attribute": (lambda self, x: x * self.settings.SCALE, set_scale),
    "attributes of a class": (of_class, set_of_class),
    "memory of C": (lambda self, x: x * self.shared.value * self.array[0], set_in_memory),
    "views of mappings": (lambda self, x: x * self.chain["factor"] * self.view["factor"], set_in_mappings),
    "an environment variable": (
        lambda self, x: x * float(os.environ.get("FACTOR", "1")),
        lambda m, s: os.environ.update(FACTOR=str(1.0 + s)),
    ),
    "a buffer that is registered once": (registers_once, lambda m, s: None),
    "a module as a value": (lambda self, x: x * getattr(settings, "SCALE"), set_scale),  # noqa: B009
}  # fmt: skip


def doubled(x: Tensor) -> Tensor:
    return x * 2


def tripled(x: Tensor) -> Tensor:
    return x * 3


def changing(x: Tensor) -> Tensor:
    return x


def run(what: str, *, compiled: bool) -> list[Any]:
    change_of_forward, change = CASES[what]
    settings.SCALE, Net.__dict__["described"].value, Scale.of_class = 1.0, 1.0, 1.0
    os.environ["FACTOR"] = "1"
    with_default.__defaults__, counted.calls = (1.0, {"n": 0}), 0  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model: Any = type("Variant", (Net,), {"change": change_of_forward})()
    called = fxzero.compile(model) if compiled else model
    seen: list[Any] = []
    for step in range(5):
        change(model, step)
        loss = called(torch.full((2, 4), 1.0 + step))
        loss.backward()
        last = model.slots.last
        of_functions = counted.calls, copy.deepcopy(with_default.__defaults__)  # type: ignore[attr-defined]
        grads = [param.grad.flatten().tolist() for param in model.parameters()]
        seen.append((loss.item(), grads, model.slots.number, None if last is None else last.tolist(), of_functions))
        called.zero_grad()
    return seen


@pytest.mark.parametrize("what", CASES)
def test_each_step_sees_what_state_holds_now(what: str) -> None:
    assert run(what, compiled=True) == run(what, compiled=False)


class Counting:
    """A hook with state of its own."""

    def __init__(self) -> None:
        self.calls, self.factor, self.kept = 0, 1.0, []

    def __call__(_this, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        _this.calls += 1
        _this.kept.append(output.detach().mean())
        return output * _this.factor / _this.calls


def test_a_hook_that_is_an_object_keeps_its_state() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    zero = fxzero.compile(copy.deepcopy(plain))
    hooks = [Counting(), Counting()]
    for model, hook in zip((plain, zero), hooks, strict=True):
        model.get_submodule("0").register_forward_hook(hook)
    for step in range(4):
        for model, hook in zip((plain, zero), hooks, strict=True):
            hook.factor = 1.0 + step
            model(torch.full((2, 4), 1.0 + step)).sum().backward()
        assert_same(zero, plain)
    assert hooks[0].calls == hooks[1].calls
    assert torch.equal(torch.stack(hooks[0].kept), torch.stack(hooks[1].kept))


@pytest.mark.parametrize("items", [itertools.count(1), iter([1.0, 2.0]), (i for i in (1.0, 2.0))])
def test_an_iterator_is_refused_by_name(items: Any) -> None:
    model: Any = type("Variant", (Net,), {"change": lambda self, x: x * next(self.items)})()
    model.items = items
    with pytest.raises(CaptureError, match="reads items, a .* whose next items"):
        fxzero.compile(model)(torch.ones(2, 4))


def test_an_in_place_change_of_a_tensor_in_a_dict_is_refused() -> None:
    model: Any = type("Variant", (Net,), {"change": lambda self, x: x + self.stats["mean"].add_(x.detach().mean(0))})()
    model.stats = {"mean": torch.zeros(4)}
    with pytest.raises(CaptureError, match="neither a buffer nor an attribute"):
        fxzero.compile(model, islands=())(torch.ones(2, 4))


class Doubling(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * 2  # type: ignore[no-any-return]


def test_a_class_with_a_call_of_its_own_is_called() -> None:
    torch.manual_seed(0)
    plain = Doubling(4, 4)
    zero = fxzero.compile(copy.deepcopy(plain))
    assert torch.equal(zero(torch.ones(2, 4)), plain(torch.ones(2, 4)))


@pytest.mark.parametrize("of_class", [False, True])
def test_a_forward_that_is_replaced_after_compile_is_refused(of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = type("Variant", (Net,), {"change": lambda self, x: x})()
    zero = fxzero.compile(model)
    zero(torch.ones(2, 4))
    if of_class:
        monkeypatch.setattr(type(model), "forward", lambda self, x: x.sum())
    else:
        model.forward = types.MethodType(lambda self, x: x.sum(), model)
    with pytest.raises(FxzeroError, match="forward of Variant was replaced after"):
        zero(torch.ones(2, 4))

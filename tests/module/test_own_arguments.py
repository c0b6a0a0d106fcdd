"""Arguments of own classes: their tensors are inputs, their plain values choose the plan."""

import weakref
from collections import UserDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import CaptureError, InputMismatchError
from fxzero.testing import engine_of
from tests.helpers.pairs import assert_same


class Bag:
    """Attributes of any kind."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def doubled(self) -> Tensor:
        return self.x * 2


@dataclass(frozen=True)
class Fields:
    x: Tensor
    scale: float = 2.0
    more: list[Tensor] = field(default_factory=list[Tensor])


class Named(NamedTuple):
    x: Tensor
    scale: int


class Store(MutableMapping[str, Any]):
    """The values of a graph, as torch_geometric has them: in an object that refers back to the graph."""

    def __init__(self, owner: "Graph", values: dict[str, Any]) -> None:
        self._mapping, self._parent = values, weakref.ref(owner)

    def __getitem__(self, key: str) -> Any:
        return self._mapping[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._mapping[key] = value

    def __delitem__(self, key: str) -> None:
        del self._mapping[key]

    def __iter__(self) -> Any:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def owner(self) -> Any:
        return self._parent()


class Graph:
    def __init__(self, **values: Any) -> None:
        self.__dict__["_store"] = Store(self, values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._store[name]


class Model(nn.Module):
    """Computes what it is told with its arguments."""

    def __init__(self, use: Callable[[Any, nn.Module], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.use = nn.Linear(4, 4), use

    def forward(self, batch: Any) -> Any:
        return self.use(batch, self.a)


def x(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


USES: dict[str, tuple[Callable[[int], Any], Callable[[Any, nn.Module], Any]]] = {
    "attributes": (lambda seed: Bag(x=x(seed), k=2, name="a"), lambda batch, a: a(batch.doubled()) * batch.k),
    "objects in objects": (lambda seed: Bag(y=Bag(x=x(seed)), z=[x(1)]), lambda batch, a: a(batch.y.x) + batch.z[0]),
    "in a dict": (lambda seed: {"b": Bag(x=x(seed)), "n": 3}, lambda batch, a: a(batch["b"].x) * batch["n"]),
    "dataclass": (lambda seed: Fields(x(seed), 3.0, [x(2)]), lambda batch, a: a(batch.x) * batch.scale + batch.more[0]),
    "named tuple": (lambda seed: Named(x(seed), 3), lambda batch, a: a(batch.x) * batch.scale),
    "UserDict": (lambda seed: UserDict({"x": x(seed), "n": 2}), lambda batch, a: a(batch["x"]) * batch["n"]),
    "distribution": (
        lambda seed: torch.distributions.Normal(x(seed), torch.ones(3, 4)),
        lambda batch, a: batch.log_prob(a(batch.mean)),
    ),
    "graph": (
        lambda seed: Graph(x=x(seed), n=3),
        lambda batch, a: a(batch.x) * batch._store.owner().n * len(batch._store),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_an_argument_of_an_own_class_is_as_in_plain_pytorch(name: str) -> None:
    make, use = USES[name]
    zero, plain = fxzero.compile(Model(use)), Model(use)
    for seed in range(3):
        own, other = zero(make(seed)), plain(make(seed))
        assert torch.equal(own, other)
        own.pow(2).sum().backward()
        other.pow(2).sum().backward()
        assert_same(zero, plain)
    assert len(engine_of(zero).plans) == 1


def test_plain_values_of_an_argument_choose_the_plan() -> None:
    def use(batch: Any, a: nn.Module) -> Tensor:
        return a(batch.x) if batch.mode == "a" else a(-batch.x)

    zero, plain = fxzero.compile(Model(use)), Model(use)
    for mode in ("a", "b", "a"):
        assert torch.equal(zero(Bag(x=x(0), mode=mode)), plain(Bag(x=x(0), mode=mode)))


def set_attribute(batch: Any, a: nn.Module) -> Tensor:
    batch.h = a(batch.x)
    return batch.h


def append(batch: Any, a: nn.Module) -> Tensor:
    batch.kept.append(a(batch.x))
    return batch.kept[-1]


@pytest.mark.parametrize("use", [set_attribute, append])
def test_a_forward_that_changes_an_argument_is_refused(use: Callable[[Any, nn.Module], Any]) -> None:
    with pytest.raises(CaptureError, match="changes attributes of a Bag that is an argument"):
        fxzero.compile(Model(use))(Bag(x=x(0), kept=[]))


def test_an_attribute_that_is_neither_tensor_nor_plain_is_refused_by_name() -> None:
    with pytest.raises(InputMismatchError, match=r"args\[0\]\.f is a function"):
        fxzero.compile(Model(lambda batch, a: a(batch.x)))(Bag(x=x(0), f=set_attribute))

"""Methods of the model on the compiled module: traced, run as they are, or run on gathered parameters."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero.errors import CaptureError, FxzeroError
from fxzero.testing import engine_of

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Model(Plain):
    """A model with a method of each sort."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.head, self.key = nn.Linear(4, 3), nn.Linear(4, 4).requires_grad_(False)
        self.count, self.history = 0, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.bn(super().forward(x))))

    def of_super(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def encode(self, x: Tensor, scale: int = 1, mode: str = "a", *, flip: bool = False) -> dict[str, Any]:
        self.count += 1
        h = self.drop(self.bn(self.a(x))) * scale
        return {"h": h.flip(0) if flip else h, "mode": mode}

    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)

    def loss_by_forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.forward(x), y)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        self.count += 1
        loss = self.loss_of(*batch)
        self.history.append(loss.item())
        return {"loss": loss}

    def fit(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = self.loss_of(x, y)
        loss.backward()
        optimizer.step()
        return loss.item()

    def backward_inside(self, x: Tensor) -> None:
        self.head(self.a(x)).sum().backward()

    def step_and_head(self, x: Tensor) -> Tensor:
        self(x).sum().backward()
        return self.head(x)

    def towards_key(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.key(x)
            self.count += 1
        return F.mse_loss(self.a(x), target)

    @torch.no_grad()
    def average(self) -> None:
        for query, key in zip(self.a.parameters(), self.key.parameters(), strict=True):
            key.data = key.data * 0.9 + query.data * 0.1

    @torch.no_grad()
    def average_in_place(self) -> None:
        for query, key in zip(self.a.parameters(), self.key.parameters(), strict=True):
            key.mul_(0.9).add_(query, alpha=0.1)

    def initialise(self) -> None:
        nn.init.xavier_uniform_(self.a.weight)
        self.head.reset_parameters()

    def normalise(self) -> None:
        weight = F.normalize(self.head.weight.data.clone(), dim=1)
        with torch.no_grad():
            self.head.weight.copy_(weight)

    def penalty(self) -> Tensor:
        return torch.stack([param.pow(2).sum() for param in self.parameters() if param.requires_grad]).sum()

    def copy_of_weight(self) -> Tensor:
        return self.head.weight.detach().clone()

    def norms(self) -> list[float]:
        return [float(param.detach().norm()) for param in self.parameters()]

    @property
    def sum_of_weights(self) -> Tensor:
        return self.head.weight.sum()

    def noisy(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.a(x) * torch.rand(1)

    def branching(self, x: Tensor) -> list[int]:
        return self.head(x).argmax(-1).tolist()

    @torch.no_grad()
    def repeated(self, x: Tensor) -> Tensor:
        while len(x) < 9:
            x = torch.cat([x, self.a(x)[-1:]])
        return x

    @torch.no_grad()
    def items(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(3):
            x = self.a(x)
            yield x

    def cached(self, x: Tensor) -> Tensor:
        if getattr(self, "kept", None) is None:
            self.kept = self.a(x).detach()
        return self.kept

    def size(self) -> int:
        return self.head.out_features

    def turn_on(self) -> "Model":
        self.is_on = True
        return self

    @staticmethod
    def of_nobody(x: Tensor) -> Tensor:
        return x + 1


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def without_grad(use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return torch.no_grad()(use)


USES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a method": ("TRACED", lambda m: m.encode(X)["h"]),
    "arguments": ("TRACED", lambda m: [m.encode(X, 2), m.encode(X, mode="b", flip=True), m.encode(X), m.count]),
    "in evaluation": ("TRACED", lambda m: [m.eval().encode(X)["h"], m.count]),
    "an input that gets a gradient": ("TRACED", lambda m: m.encode(X.clone().requires_grad_())["h"]),
    "super().forward": ("TRACED", lambda m: m.of_super(X)),
    "self(x)": ("PLAIN", lambda m: m.loss_of(X, Y)),
    "self.forward(x)": ("PLAIN", lambda m: m.loss_by_forward(X, Y)),
    "a training step": ("PLAIN", lambda m: [m.training_step((X, Y)) for _ in range(3)] + [m.count, m.history]),
    "a whole step": ("PLAIN", lambda m: [m.fit(optimizer, X, Y) for optimizer in [sgd(m)] for _ in range(3)]),
    "a part without gradients": ("TRACED", lambda m: [m.towards_key(X), m.towards_key(X), m.count]),
    "a moving average": ("PLAIN", lambda m: [m.average(), m.average()]),
    "a moving average in place": ("PLAIN", lambda m: [m.average_in_place(), m.average_in_place()]),
    "initialising": ("GATHERED", lambda m: m.initialise()),
    "surgery": ("GATHERED", lambda m: m.normalise()),
    "a penalty": ("TRACED", lambda m: m.penalty()),
    "a weight": ("GATHERED", lambda m: m.copy_of_weight()),
    "norms": ("GATHERED", lambda m: m.norms()),
    "a property": ("TRACED", lambda m: m.sum_of_weights),
    "draws": ("TRACED", lambda m: [m.noisy(x) for x in [X.clone()]] + [torch.rand(1)]),
    "values": ("GATHERED", without_grad(lambda m: m.branching(X))),
    "lengths": ("GATHERED", lambda m: m.repeated(X)),
    "items": ("", lambda m: list(m.items(X))),
    "a cache": ("TRACED", lambda m: [m.cached(X), m.cached(X + 1)]),
    "a getter": ("PLAIN", lambda m: m.size()),
    "a setter": ("PLAIN", lambda m: [isinstance(m.turn_on(), Model), m.is_on]),
    "static": ("", lambda m: m.of_nobody(X)),
    "several at once": ("TRACED", lambda m: m(X).sum() + m.encode(X)["h"].sum() + m.penalty()),
    "without gradients": ("GATHERED", without_grad(lambda m: [m.encode(X), m.loss_of(X, Y), m.count])),
    "parts without gradients": ("", without_grad(lambda m: [m.a(X), m.bn(X)])),
}


def run(model: Any, use: Callable[[Any], Any], *, warm: bool) -> list[Any]:
    """What a use gives, after backward of what it gives that has a graph."""
    torch.manual_seed(3)
    if warm:
        model(X).sum().backward()
        model.zero_grad()
    leaves = list(flat(use(model)))
    losses = [leaf.pow(2).sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    return leaves


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from flat(each)
    else:
        yield value.detach() if isinstance(value, Tensor) and not value.requires_grad else value


def assert_alike(zero: Any, plain: nn.Module, got: list[Any], expected: list[Any]) -> None:
    """Bit for bit: results, weights, and gradients."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    state = zero.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    shards, params = engine_of(zero).sharded.shards, dict(zero.named_parameters())
    for name, param in plain.named_parameters():
        if param.grad is None or shards is None:
            assert shards is None or params[name].grad is None, name
        else:
            assert torch.equal(params[name].grad, shards.cut(name, param.grad)), name


FIRST = ("a method", "self(x)", "a whole step", "lengths", "items", "surgery", "parts without gradients")
"""Uses that are tried as the first call of a model too."""


@pytest.mark.parametrize(("name", "warm"), [*((name, True) for name in USES), *((name, False) for name in FIRST)])
def test_a_method_is_that_of_the_plain_model(name: str, warm: bool) -> None:
    way, use = USES[name]
    torch.manual_seed(0)
    plain = Model()
    torch.manual_seed(0)
    zero = fxzero.compile(Model())
    expected = run(plain, use, warm=warm)
    got = run(zero, use, warm=warm)
    assert_alike(zero, plain, got, expected)
    assert {each.name for each in zero.__dict__["_fxzero_methods"].ways} == ({way} if way else set())


REFUSED: dict[str, tuple[type[FxzeroError], str, Callable[[Any], Any]]] = {
    "a part": (FxzeroError, r"a is a part.*zero\.encode\(x\).*torch\.no_grad", lambda zero: zero.a(X)),
    "a backward": (CaptureError, "calls backward.*Return the loss", lambda zero: zero.backward_inside(X)),
    "values": (CaptureError, r"branching\(\) computes with.*call it under torch\.no_grad", lambda z: z.branching(X)),
    "a step behind a step": (FxzeroError, r"step_and_head\(\).*Split it in two", lambda zero: zero.step_and_head(X)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_method_cannot_do_is_refused_with_the_cure(name: str) -> None:
    error, text, use = REFUSED[name]
    zero = fxzero.compile(Model())
    with pytest.raises(error, match=text):
        use(zero)


def test_an_error_of_a_method_is_its_own() -> None:
    zero = fxzero.compile(Model())
    with pytest.raises(IndexError):
        zero.encode(X, 1, "a", flip=[0][1])
    with pytest.raises(TypeError, match="encode"):
        zero.encode()

"""`compile(ignored_params=)` on one rank: what is refused, and how steps read ignored parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import CaptureError


class Scaled(nn.Module):
    """A linear layer whose scale is ignored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(4, 4)
        self.also_scale = self.scale

    def forward(self, scale: Tensor) -> Tensor:
        return (self.linear(scale) * self.also_scale).sum()


def test_a_tied_parameter_and_an_argument_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_CHECK", "1")
    plain, model, x = Scaled(), Scaled(), torch.randn(3, 4)
    zero = fxzero.compile(model, ignored_params=[model.scale])
    for _ in range(2):
        for each in (plain, zero):
            each(scale=x).backward()
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()
    assert torch.equal(plain.scale, model.scale)
    assert all(torch.equal(value, zero.state_dict()[name]) for name, value in plain.state_dict().items())


class Writes(Scaled):
    """Moves its scale in forward."""

    def forward(self, scale: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5)
        return super().forward(scale)


def test_forward_that_writes_an_ignored_parameter() -> None:
    plain, model, x = Writes(), Writes(), torch.randn(3, 4)
    plain.scale.requires_grad_(False)
    model.scale.requires_grad_(False)
    zero = fxzero.compile(model, ignored_params={model.scale})
    for _ in range(2):
        assert torch.equal(plain(x), zero(x))
    assert torch.equal(plain.scale, model.scale)


class SetsData(Scaled):
    """Gives its scale other data."""

    def forward(self, scale: Tensor) -> Tensor:
        self.scale.data = self.scale.data * 0.5
        return super().forward(scale)


class Opaque(Scaled):
    """Looks at values in a way that no trace follows."""

    def forward(self, scale: Tensor) -> Tensor:
        return super().forward(scale) * float(scale.detach().numpy().sum())


@pytest.mark.parametrize("kind", [SetsData, Opaque])
def test_forwards_that_are_refused(kind: type[Scaled]) -> None:
    model = kind()
    zero = fxzero.compile(model, ignored_params={model.scale})
    with pytest.raises(CaptureError, match="scale"):
        zero(torch.randn(3, 4))


def _on_meta(model: Scaled) -> dict[str, Any]:
    model.linear.to("meta")
    return {"ignored_params": {model.scale}}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (lambda model: {"ignored_params": ["scale"]}, TypeError, "has a str"),
        (lambda model: {"ignored_params": {nn.Parameter(torch.ones(2))}}, ValueError, "not of this model"),
        (lambda model: {"ignored_params": set(model.parameters())}, ValueError, "nothing is left"),
        (_on_meta, ValueError, "on the meta device"),
        (lambda model: {"ignored_params": {model.scale}, "loss_chunks": 2}, ValueError, "loss_chunks="),
        (lambda model: {"ignored_params": {model.scale}, "without": "all"}, ValueError, "without="),
    ],
)  # fmt: skip
def test_options_that_are_refused(
    options: Callable[[Scaled], dict[str, Any]], error: type[Exception], text: str
) -> None:
    model = Scaled()
    with pytest.raises(error, match=text):
        fxzero.compile(model, **options(model))
    if next(model.linear.parameters()).device.type == "cpu":
        fxzero.compile(model)  # it was not taken over

"""Fused compute beside plain PyTorch: equal within rounding, and in everything that is no number."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero.errors import PassChangedNumbersError
from fxzero.graph.regions import is_region
from fxzero.planning import compile_regions
from fxzero.testing import engine_of
from tests.helpers.regions import uncompiled

TOLERANCE = 1e-5


class Net(nn.Module):
    """Two heads over a body with dropout, layer norm and a frozen part; a small loop of equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.first, self.second = nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.inner(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + F.dropout(F.gelu(layer(norm(h))), 0.3, self.training)
        h = h * torch.sigmoid(self.frozen(h))
        return F.log_softmax(self.first(h), -1), F.silu(self.second(h)) * 2


def batch(seed: int = 0, rows: int = 4) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def pair(**options: Any) -> tuple[fxzero.ZeroModule, nn.Module]:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    return fxzero.compile(model, compute="fused", **options), plain


def assert_close(zero: nn.Module, plain: nn.Module) -> None:
    for (name, own), (_, other) in zip(zero.named_parameters(), plain.named_parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), name
        for mine, theirs in ((own, other), (own.grad, other.grad)):
            if mine is not None and theirs is not None:
                torch.testing.assert_close(
                    mine.detach().flatten(), theirs.detach().flatten(), rtol=TOLERANCE, atol=1e-6
                )


def train(module: nn.Module, steps: int = 3, rows: int = 4) -> tuple[list[float], Tensor]:
    """Losses of a few steps with dropout, two micro-batches each, and a draw behind them."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    torch.manual_seed(1)
    losses: list[float] = []
    for index in range(2 * steps):
        is_first = index % 2 == 0
        with module.no_sync() if is_first and isinstance(module, fxzero.ZeroModule) else torch.enable_grad():
            first, second = module(batch(index, rows))
            loss = first.square().mean() + second.mean()
            loss.backward()
        losses.append(loss.item())
        if not is_first:
            optimizer.step()
            optimizer.zero_grad()
    return losses, torch.rand(1)


@pytest.mark.parametrize("options", [{}, {"recompute": "full"}, {"memory_budget": 1 << 20}, {"recompute": 200}])
def test_trains_as_the_model_does(options: dict[str, Any]) -> None:
    zero, plain = pair(**options)
    with uncompiled():
        (own, drawn), (other, expected) = train(zero), train(plain)
    torch.testing.assert_close(own, other, rtol=TOLERANCE, atol=0)
    assert torch.equal(drawn, expected)
    assert_close(zero, plain)
    assert engine_of(zero).sharded.recipe.compute == "fused"


def test_compiled_regions_train_as_the_model_does() -> None:
    zero, plain = pair()
    torch.testing.assert_close(train(zero)[0], train(plain)[0], rtol=TOLERANCE, atol=0)
    assert_close(zero, plain)
    assert any(map(is_region, zero.schedule.step.graph.nodes))
    for module in (zero, plain):
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(zero(batch(9)), plain(batch(9)), rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"recompute": "full"}])
def test_exact_compute_trains_bit_for_bit(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = Net()
    zero = fxzero.compile(copy.deepcopy(plain), compute="exact", **options)
    (own, drawn), (other, expected) = train(zero), train(plain)
    assert own == other and torch.equal(drawn, expected)
    for (name, mine), theirs in zip(zero.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.detach(), theirs.detach().flatten()[: mine.numel()].view(mine.shape)), name
    assert any(map(is_region, zero.schedule.step.graph.nodes))


def test_gradients_that_arrive_for_some_outputs_or_with_other_strides() -> None:
    zero, plain = pair()
    with uncompiled():
        for index in (None, 0, 1):  # both, then each by itself
            for module in (zero, plain):
                torch.manual_seed(5)
                outputs = module(batch())
                chosen = outputs if index is None else outputs[index : index + 1]
                module.zero_grad()
                torch.autograd.backward([each.sum() for each in chosen])  # expanded gradients
            assert_close(zero, plain)


def test_another_length_is_traced_and_compiles_regions_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    zero, plain = pair()
    caplog.set_level(logging.INFO)
    with uncompiled():
        for rows in (2, 3, 4, 5, 2):
            torch.manual_seed(5)
            own = zero(batch(rows=rows))
            torch.manual_seed(5)
            torch.testing.assert_close(own, plain(batch(rows=rows)), rtol=TOLERANCE, atol=1e-6)
    lines = [record.getMessage() for record in caplog.records if "regions compiled" in record.getMessage()]
    assert len(lines) == 4
    assert "predicted" not in caplog.text


def test_a_region_that_is_compiled_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_CHECK", "1")
    zero, _ = pair()
    with uncompiled(), monkeypatch.context() as patched:
        patched.setattr(
            compile_regions, "_compile", lambda region: lambda inputs: [each * 1.01 for each in region(inputs)]
        )
        with pytest.raises(PassChangedNumbersError, match="fuse_compute, made a region that is compiled wrong"):
            zero(batch())


def test_refused_options() -> None:
    with pytest.raises(ValueError, match="compute is \"?'?inductor"):
        fxzero.compile(Net(), compute="inductor")  # pyright: ignore
    with pytest.raises(ValueError, match="give default_passes\\(\\) compute="):
        fxzero.compile(Net(), compute="fused", passes=fxzero.passes.default_passes())

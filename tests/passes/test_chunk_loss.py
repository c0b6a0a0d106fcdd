"""Heads and their cross entropy in chunks of rows, beside plain PyTorch."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzero
from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role
from fxzero.graph.step import StepGraph
from fxzero.passes import ChunkLoss, default_passes
from tests.helpers.regions import uncompiled
from tests.helpers.toy_step import toy_step

WORDS, WIDTH, TOKENS = 40, 8, 14


class Model(nn.Module):
    """A language model that returns its loss, and its logits if asked to."""

    def __init__(self, *, bias: bool = True, returns_logits: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if not bias:
            self.head.weight = self.embedding.weight
        self.returns_logits, self.options = returns_logits, options

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(torch.tanh(self.embedding(ids)))
        loss = F.cross_entropy(logits.float().view(-1, WORDS), labels.view(-1), **self.options)
        return {"loss": loss, "logits": logits} if self.returns_logits else loss


def batch(ignored: int = -100) -> tuple[Tensor, Tensor]:
    ids = torch.randint(WORDS, (2, TOKENS // 2), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(1, 1)
    labels[:, 2] = ignored
    return ids, labels


def planned(model: nn.Module, **options: Any) -> StepGraph:
    return fxzero.planner.plan(model, batch(), world_size=2, passes=default_passes(**options)).step


def whole(step: StepGraph) -> list[str]:
    """Operators that make a tensor of all logits' size."""
    values = {node: node.meta.get("val") for node in step.nodes(Role.COMPUTE)}
    sizes = {node: value.numel() for node, value in values.items() if isinstance(value, torch.Tensor)}
    return [str(node.target) for node, size in sizes.items() if size == WORDS * TOKENS]


@pytest.mark.parametrize(
    "model, ignored, num_chunks",
    [
        (Model(), -100, 4),
        (Model(bias=False, ignore_index=0), 0, 3),
        (Model(reduction="sum", returns_logits=True), -100, 100),
        (Model().bfloat16(), -100, 2),
    ],
)
def test_trains_as_the_whole_loss_does(model: nn.Module, ignored: int, num_chunks: int) -> None:
    zero = fxzero.compile(copy.deepcopy(model), loss_chunks=num_chunks)
    losses: list[Tensor] = []
    for each in (zero, model):
        result = each(*batch(ignored))
        losses.append(result if isinstance(result, Tensor) else result["loss"])
        (2 * losses[-1]).backward()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    bound = 1e-6 if losses[0].dtype is model.get_parameter("head.weight").dtype else 0.02
    for own, other in zip(zero.parameters(), model.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        top = other.grad.abs().max().item()
        torch.testing.assert_close(own.grad.flatten(), other.grad.flatten(), rtol=bound, atol=bound * top)


def test_no_tensor_of_all_logits_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("log_softmax" in name for name in whole(planned(Model())))
    with monkeypatch.context() as patched:
        patched.setenv("FXZERO_CHECK", "1")
        assert not whole(planned(Model(), loss_chunks=4))
    with uncompiled():
        assert not whole(planned(Model(bias=False), loss_chunks=4, compute="fused"))
    kept = whole(planned(Model(returns_logits=True), loss_chunks=4))
    assert kept and not any("softmax" in name or "nll" in name for name in kept)


def test_what_is_no_plain_cross_entropy_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert whole(planned(Model(label_smoothing=0.1), loss_chunks=4))
    assert "loss_chunks=4 has no effect" in caplog.text


class Odd(Model):
    """Logits with a bias of each row, or with a bias that is counted up behind them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("shift", torch.zeros(WORDS))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        rows = torch.tanh(self.embedding(ids)).view(-1, WIDTH)
        bias = self.get_buffer("shift") if self.kind == "written" else rows.sum(1, keepdim=True).expand(-1, WORDS)
        loss = F.cross_entropy(torch.addmm(bias, rows, self.head.weight.t()), labels.view(-1))
        self.get_buffer("shift").add_(1)
        return loss


@pytest.mark.parametrize("kind", ["bias of rows", "written"])
def test_logits_that_cannot_be_made_in_parts_or_later_stay_whole(kind: str) -> None:
    assert any("softmax" in name for name in whole(planned(Odd(kind), loss_chunks=4)))


def test_no_rows_at_all() -> None:
    zero = fxzero.compile(Model(reduction="sum"), loss_chunks=4)
    loss = zero(*(each[:0] for each in batch()))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in zero.parameters())


def test_refused() -> None:
    step = toy_step()
    for each in default_passes():
        each(step)
    with pytest.raises(PassOrderError, match="before InsertAllGathers"):
        ChunkLoss(2)(step)
    with pytest.raises(ValueError, match="loss_chunks is 0"):
        fxzero.compile(Model(), loss_chunks=0)
    with pytest.raises(ValueError, match="give default_passes\\(\\) loss_chunks="):
        fxzero.compile(Model(), loss_chunks=2, passes=default_passes())

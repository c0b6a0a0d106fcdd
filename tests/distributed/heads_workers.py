"""What ranks do in test_heads_ranks.py: different parameters or outputs in one step."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxzero
from fxzero.passes import default_passes
from fxzero.testing import engine_of
from tests.distributed.error_workers import error_of


class TwoHeads(nn.Module):
    """A trunk, an image part that some batches need, two heads, and a part that nothing needs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.image = nn.Linear(6, 16), nn.Linear(4, 16)
        self.a, self.b = nn.Linear(16, 5), nn.Sequential(nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 30))
        self.never, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor, image: Tensor | None = None, with_b: bool = True) -> Any:
        hidden = torch.tanh(self.trunk(x)) * self.scale
        if image is not None:
            hidden = hidden + self.image(image).mean(0)
        return {"a": self.a(hidden), "b": self.b(hidden) if with_b else None}


def _x(rank: int, step: int, width: int = 6) -> Tensor:
    """A batch of one rank; batches of ranks and steps have different sizes."""
    return torch.randn(3 + rank + step % 2, width, generator=torch.Generator().manual_seed(10 * step + rank))


def _image_sometimes(module: nn.Module, rank: int, step: int) -> Tensor:
    image = None if (rank + step) % 2 else _x(rank, step, 4)
    return module(_x(rank, step), image)["a"].square().mean()


def _branch(module: nn.Module, rank: int, step: int) -> Tensor:
    output = module(_x(rank, step), with_b=(rank + step) % 2 == 0)
    return output["a"].square().mean() + (0.0 if output["b"] is None else output["b"].sum())


LOSSES: dict[str, Callable[[nn.Module, int, int], Tensor]] = {
    "one head of two": lambda m, r, s: m(_x(r, s))["a"].square().mean(),
    "a head for each rank": lambda m, r, s: m(_x(r, s))["ab"[r > 0]].square().mean(),
    "heads in turn, others on each rank": lambda m, r, s: m(_x(r, s))["ab"[(r + s) % 2]].square().mean(),
    "heads in turn, the same on all ranks": lambda m, r, s: m(_x(r, s))["ab"[s % 2]].square().mean(),
    "an image on some ranks": _image_sometimes,
    "a branch on some ranks": _branch,
}


class Replicas:
    """A compiled model, and a plain one whose gradients are the means over what each rank would have."""

    def __init__(self, rank: int, world_size: int, bucket_bytes: int) -> None:
        self.rank, self.world_size = rank, world_size
        torch.manual_seed(0)
        model = TwoHeads()
        self.plain = copy.deepcopy(model)
        self.zero = fxzero.compile(model, passes=default_passes(bucket_bytes=bucket_bytes))
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, foreach=False) for m in (self.plain, self.zero)]

    def backward(self, loss: Callable[[nn.Module, int, int], Tensor], step: int) -> None:
        params = list(self.plain.parameters())
        of_ranks = [
            torch.autograd.grad(loss(self.plain, rank, step), params, allow_unused=True)
            for rank in range(self.world_size)
        ]
        for param, grads in zip(params, zip(*of_ranks, strict=True), strict=True):
            if any(grad is not None for grad in grads):
                total = sum(torch.zeros_like(param) if grad is None else grad for grad in grads)
                param.grad = total / self.world_size + (0 if param.grad is None else param.grad)
        loss(self.zero, self.rank, step).backward()

    def step(self) -> None:
        self.check()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.check()

    def check(self) -> None:
        """Shards and gradients are slices of the plain model's; one that no rank has reached is None."""
        shards = engine_of(self.zero).sharded.shards
        if shards is None:
            return
        for name, full in self.plain.named_parameters():
            param = self.zero.get_parameter(name)
            assert torch.equal(param, shards.cut(name, full.detach())), f"{name} differs"
            if param.numel() == 0:
                continue
            assert (param.grad is None) == (full.grad is None), f"gradient of {name}: {param.grad is None}"
            if full.grad is not None:
                torch.testing.assert_close(param.grad, shards.cut(name, full.grad), rtol=1e-6, atol=1e-9)


def train(rank: int, world_size: int, how: str, bucket_bytes: int) -> None:
    """Ordinary steps, then steps of two micro-batches whose gradients are added up, sharded."""
    both = Replicas(rank, world_size, bucket_bytes)
    for step in range(3):
        both.backward(LOSSES[how], step)
        both.step()
    both.backward(LOSSES[how], 3)
    both.backward(LOSSES[how], 4)
    both.step()


def train_under_no_sync(rank: int, world_size: int) -> None:
    """Each micro-batch reaches another head on each rank."""
    both = Replicas(rank, world_size, 2**20)
    loss = LOSSES["heads in turn, others on each rank"]
    for step in range(0, 4, 2):
        with both.zero.no_sync():
            both.backward(lambda m, r, s: loss(m, r, s) / 2, step)
        both.backward(LOSSES["one head of two"], step + 1)
        both.check()
        both.zero.zero_grad()
        both.plain.zero_grad()


def differ_later(rank: int, world_size: int, what: str) -> str:
    """All ranks need the same in two steps; then rank 1 alone needs more."""
    torch.manual_seed(0)
    zero = fxzero.compile(TwoHeads(), passes=default_passes(bucket_bytes=1))

    def step(more: bool) -> None:
        image = _x(rank, 0, 4) if more and what == "an image" else None
        output = zero(_x(rank, 0), image)
        (output["a"].sum() + (output["b"].sum() if more and what == "a head" else 0)).backward()

    step(False)
    step(False)
    return error_of(lambda: step(rank == 1))

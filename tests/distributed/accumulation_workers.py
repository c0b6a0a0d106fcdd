"""Gradient accumulation on ranks, and the same in replicated training that sums in the same order."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.testing import engine_of
from tests.distributed.error_workers import PATIENCE, error_of

ALONE = (-1,)


class Net(nn.Module):
    """Odd sizes, so that slices begin in the middle of rows; `extra` only if asked for, or alone (None)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra, self.head = nn.Linear(7, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, use_extra: bool | None = False) -> Tensor:
        if use_extra is None:
            return self.extra(x.sum() * self.extra.weight).square().mean()
        hidden = torch.tanh(self.body(x))
        return self.head(torch.tanh(self.extra(hidden)) if use_extra else hidden).square().mean()


def data(rank: int, number: int) -> Tensor:
    """A batch of one rank; batches of ranks have different sizes."""
    return torch.randn(3 + rank, 7, generator=torch.Generator().manual_seed(10 * number + rank))


class Pair:
    """A net compiled with `accumulate=`, and plain training of all ranks that sums gradients in the same order.

    Args:
        sums_first: each rank first sums over micro-batches, then sums of ranks are added; else the other way round.
        divisor: sums over ranks are divided by it.
        ranks_per_node: of nodes over which sums are added after those of their ranks.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        sums_first: bool = True,
        divisor: float | None = None,
        ranks_per_node: int | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        model = Net()
        self.rank, self.world_size, self.sums_first = rank, world_size, sums_first and world_size > 1
        self.divisor, self.ranks_per_node = divisor or world_size, ranks_per_node or world_size
        self.plain = copy.deepcopy(model)
        self.zero = fxzero.compile(model, timeout=PATIENCE, **options)
        self.optimizers = [
            torch.optim.AdamW(net.parameters(), lr=0.1, foreach=False) for net in (self.zero, self.plain)
        ]
        self.sums: list[list[Tensor | None]] = [[None] * 6 for _ in range(world_size)]
        """Of each rank, the gradients of micro-batches that were not added over ranks yet."""
        self.number = 0

    def backward(self, extra_on: tuple[int, ...] = (), *, no_sync: bool = False) -> None:
        """One micro-batch of both.

        Args:
            extra_on: the ranks that use `extra`; ALONE: all use nothing else.
        """
        self.number += 1
        with self.zero.no_sync() if no_sync else nullcontext():
            loss = self.zero(data(self.rank, self.number), _use(self.rank, extra_on))
            loss.backward()
        self.plain_backward(self.number, extra_on, no_sync=no_sync)

    def plain_backward(self, number: int, extra_on: tuple[int, ...] = (), *, no_sync: bool = False) -> None:
        """The micro-batch of all ranks in plain training."""
        for rank, sums in enumerate(self.sums):
            loss = self.plain(data(rank, number), _use(rank, extra_on))
            grads = torch.autograd.grad(loss, list(self.plain.parameters()), allow_unused=True)
            sums[:] = [_add(before, grad) for before, grad in zip(sums, grads, strict=True)]
        if not self.sums_first and not no_sync:
            self.reduce()

    def reduce(self) -> None:
        """Add what ranks have summed up to `.grad` of the plain net."""
        for index, param in enumerate(self.plain.parameters()):
            total: Tensor | None = None
            for first in range(0, self.world_size, self.ranks_per_node):
                node: Tensor | None = None
                for sums in self.sums[first:][: self.ranks_per_node]:
                    node = _add(node, sums[index])
                total = _add(total, node)
            if total is not None:
                param.grad = _add(param.grad, total / self.divisor)
        self.sums = [[None] * 6 for _ in self.sums]

    def check(self, what: str = "gradient") -> None:
        """Gradients and parameters of the compiled net are slices of the plain one's, bit for bit."""
        self.reduce()
        shards = engine_of(self.zero).sharded.shards
        assert shards is not None
        full = dict(self.plain.named_parameters())
        for fqn, param in self.zero.named_parameters():
            grad = full[fqn].grad
            if param.numel():
                assert (param.grad is None) == (grad is None), f"{what} of {fqn}"
            if grad is not None and param.grad is not None:
                assert torch.equal(param.grad, shards.cut(fqn, grad)), f"{what} of {fqn} differs"
            assert torch.equal(param, shards.cut(fqn, full[fqn].detach())), f"{fqn} differs"

    def step(self) -> None:
        """A step of both optimizers, a comparison before and after; ranks reduce what they hold by themselves."""
        self.reduce()
        for optimizer in self.optimizers:
            optimizer.step()
        self.check()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.sums = [[None] * 6 for _ in self.sums]

    def header(self) -> str:
        """The first line of the schedule that ran last."""
        return self.zero.schedule.text().splitlines()[0]


def _use(rank: int, extra_on: tuple[int, ...]) -> bool | None:
    return None if extra_on == ALONE else rank in extra_on


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def train(rank: int, world_size: int, options: dict[str, Any], **of_pair: Any) -> list[str]:
    """All that users do in and between cycles of 3 micro-batches; the headers of the first cycle.

    Args:
        options: of `fxzero.compile`, and of Pair.
    """
    if nodes := options.pop("nodes", None):
        options |= {
            "mesh": init_device_mesh("cpu", (nodes, world_size // nodes)),
            "ranks_per_node": world_size // nodes,
        }
    both = Pair(rank, world_size, accumulate=3, **options)
    headers: list[str] = []
    for extra_on in ((0,), (), (world_size - 1,)):
        both.backward(extra_on)
        headers.append(both.header())
    both.check()  # the last one has reduced
    both.step()
    _a_part_of_a_cycle(both)
    _evaluate_and_drop(both)
    _clip(both)
    _several_forwards(both)
    _different_parameters(both)
    return headers


def _a_part_of_a_cycle(both: Pair) -> None:
    """Steps after 2 and after 1 micro-batches, and gradients that are reduced to be looked at; then a whole cycle."""
    both.backward()
    both.backward((0,))
    both.step()
    both.backward()
    both.zero.reduce_gradients()
    both.check()
    both.zero.reduce_gradients()
    both.step()
    for _ in range(3):
        both.backward()
    both.step()


def _evaluate_and_drop(both: Pair) -> None:
    """Evaluations between micro-batches, forwards without backward, gradients dropped in the middle; no_sync()."""
    both.backward()
    both.zero_grad()
    both.backward()
    both.zero.eval()
    with torch.no_grad():
        both.zero(data(both.rank, 99))
    both.zero.train()
    both.zero(data(both.rank, 98))
    both.backward()
    both.step()
    both.backward((0,))
    both.zero.zero_grad()
    both.zero_grad()
    for no_sync in (False, True, True, True, False):
        both.backward(no_sync=no_sync)
    both.step()
    both.backward(no_sync=True)
    both.step()


def _clip(both: Pair) -> None:
    """Norms and clipping in the middle of a cycle, ours and torch's, and a step afterwards."""
    for clip in (both.zero.clip_grad_norm_, lambda norm: nn.utils.clip_grad_norm_(both.zero.parameters(), norm)):
        both.backward()
        both.backward()
        norms = both.zero.grad_norms() if clip == both.zero.clip_grad_norm_ else None
        mine = clip(0.05)
        both.reduce()
        if norms is not None:
            whole = {fqn: p.grad.norm() for fqn, p in both.plain.named_parameters() if p.grad is not None}
            torch.testing.assert_close(norms, whole, rtol=1e-5, atol=1e-9)
        theirs = nn.utils.clip_grad_norm_(both.plain.parameters(), 0.05)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
        shards = engine_of(both.zero).sharded.shards
        assert shards is not None
        for param, own in zip(both.plain.parameters(), both.zero.parameters(), strict=True):
            if param.grad is not None and own.grad is not None:
                fqn = engine_of(both.zero).sharded.fqn_of(own)
                torch.testing.assert_close(own.grad, shards.cut(fqn, param.grad), rtol=1e-5, atol=1e-9)
                own.grad.copy_(shards.cut(fqn, param.grad))  # both go on from the plain net's
        both.backward()
        both.step()


def _several_forwards(both: Pair) -> None:
    """Three forwards before their backwards, and one loss of two calls."""
    numbers = [both.number + 1, both.number + 2, both.number + 3]
    losses = [both.zero(data(both.rank, number)) for number in numbers]
    for loss, number in zip(losses, numbers, strict=True):
        loss.backward()
        both.plain_backward(number)
    both.step()
    both.number += 5
    for _ in range(2):
        pair = both.number + 1, both.number + 2
        (both.zero(data(both.rank, pair[0])) + both.zero(data(both.rank, pair[1]))).backward()
        for number in reversed(pair):  # autograd begins with the last call
            both.plain_backward(number)
        both.number += 2
    both.step()


def _different_parameters(both: Pair) -> None:
    """Micro-batches that use other parameters than the last one, and gradients that are asked for at the beginning."""
    both.plain_backward(50)
    both.reduce()
    expected = [param.grad for param in both.plain.parameters()]
    both.zero_grad()
    own = torch.autograd.grad(both.zero(data(both.rank, 50)), list(both.zero.parameters()), allow_unused=True)
    shards = engine_of(both.zero).sharded.shards
    assert shards is not None
    for (fqn, param), grad, whole in zip(both.zero.named_parameters(), own, expected, strict=True):
        assert param.grad is None
        assert (grad is None) == (whole is None), fqn
        if whole is not None:
            assert torch.equal(grad, shards.cut(fqn, whole)), fqn
    both.backward(ALONE)
    both.backward()
    both.backward()
    both.check()
    both.step()
    both.backward()
    both.backward(ALONE)
    both.step()


def refuse(rank: int, world_size: int) -> dict[str, str]:
    """What is refused in the middle of a cycle, on all ranks alike."""
    both = Pair(rank, world_size, accumulate=3)
    errors: dict[str, str] = {}

    def change() -> None:
        both.backward()
        for param in both.zero.parameters():
            if param.grad is not None:
                param.grad.mul_(0.5)
        both.backward()

    def norm() -> Any:
        both.backward()
        return nn.utils.get_total_norm([param.grad for param in both.zero.parameters() if param.grad is not None])

    def ask() -> Any:
        both.backward()
        return torch.autograd.grad(both.zero(data(rank, 0)), list(both.zero.parameters()), allow_unused=True)

    for what, do in (("norm", norm), ("change", change), ("ask", ask)):
        errors[what] = error_of(do)
        both.zero.zero_grad()
    return errors


def part(rank: int, world_size: int, how: str) -> str:
    """The last rank steps after another number of micro-batches, or skips one; the error that each rank meets."""
    both = Pair(rank, world_size, accumulate=3)
    both.backward()
    is_odd = rank == world_size - 1

    def go_on() -> None:
        if how == "step" and is_odd:
            both.optimizers[0].step()
        elif how == "zero_grad" and is_odd:
            both.zero.zero_grad()
        both.backward()
        if how == "zero_grad":
            both.backward()
        both.optimizers[0].step()

    return error_of(go_on)


def scale(rank: int, world_size: int) -> None:
    """A gradient scaler in the middle of a cycle: all ranks skip a step in which one has found an infinity."""
    both = Pair(rank, world_size, accumulate=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = both.optimizers[0]
    for is_good in (True, False):
        for number in (1, 2):
            loss = scaler.scale(both.zero(data(rank, number)))
            (loss if is_good or rank or number == 1 else loss * torch.inf).backward()
        before = [param.detach().clone() for param in both.zero.parameters()]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(old, new) for old, new in zip(before, both.zero.parameters(), strict=True)]
        assert all(same) != is_good or not any(len(old) for old in before)
        optimizer.zero_grad()

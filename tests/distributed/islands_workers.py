"""What ranks do in test_islands_ranks.py: train a model with islands, and replicas of it, on other batches each."""

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import fxzero
from fxzero.testing import engine_of
from tests.helpers.island_models import CASES, points, seed_all


def _mean(grads: list[Tensor | None]) -> Tensor | None:
    """The mean over ranks of those that any rank has."""
    there = [grad for grad in grads if grad is not None]
    if not there:
        return None
    total = there[0].clone()
    for grad in there[1:]:
        total += grad
    return total / len(grads)


def train(
    rank: int,
    world_size: int,
    name: str,
    options: dict[str, Any],
    micro_batches: int = 1,
    no_sync: bool = False,
    clip: float | None = None,
    frozen: str = "",
    autocast: bool = False,
    steps: int = 3,
) -> None:
    """Compare losses, gradients, which there are, parameters and buffers after each step, bit for bit."""
    warnings.simplefilter("ignore", UserWarning)
    seed_all(0)
    plain = CASES[name].build()
    for fqn, param in plain.named_parameters():
        param.requires_grad_(not (frozen and fqn.startswith(frozen)))
    zero = fxzero.compile(copy.deepcopy(plain), **options)
    replicas = [copy.deepcopy(plain) for _ in range(world_size)]
    is_exact = clip is None and micro_batches == 1
    same = torch.equal if is_exact else lambda a, b: torch.allclose(a, b, rtol=1e-4)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.1) for each in (*replicas, zero)]
    for step in range(steps):
        for micro in range(micro_batches):
            seeds = [1000 + 100 * step + 10 * r + micro for r in range(world_size)]
            of_ranks = [_backward(replica, seed, autocast) for replica, seed in zip(replicas, seeds, strict=True)]
            held = no_sync and micro < micro_batches - 1
            with zero.no_sync() if held else contextlib.nullcontext():
                loss = _backward(zero, seeds[rank], autocast)
            assert same(loss, of_ranks[rank]), f"step {step}: loss {loss} instead of {of_ranks[rank]}"
        for params in zip(*(replica.parameters() for replica in replicas), strict=True):
            grad = _mean([param.grad for param in params])
            for param in params:
                param.grad = None if grad is None else grad.clone()
        if clip is not None:
            zero.clip_grad_norm_(clip)
            for replica in replicas:
                nn.utils.clip_grad_norm_(replica.parameters(), clip)
        _compare(zero, replicas[rank], exact=is_exact)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = zero.state_dict()
    for fqn, expected in replicas[rank].named_buffers():
        assert torch.equal(dict(zero.named_buffers())[fqn], expected), f"buffer {fqn}"
    for fqn, expected in replicas[rank].named_parameters():
        assert torch.allclose(state[fqn], expected, rtol=1e-5, atol=1e-7), fqn
    assert tuple(sorted(engine_of(zero).maker.islands.paths)) == CASES[name].islands


def _backward(module: nn.Module, seed: int, autocast: bool) -> Tensor:
    seed_all(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = module(points(seed))
    loss.backward()
    return loss.detach()


def _compare(zero: fxzero.ZeroModule, plain: nn.Module, *, exact: bool) -> None:
    """Compare gradients, and which there are."""
    shards = engine_of(zero).sharded.shards
    assert shards is not None
    expected = dict(plain.named_parameters())
    for fqn, param in zero.named_parameters():
        if not param.numel():
            continue
        grad = expected[fqn].grad
        assert (param.grad is None) == (grad is None), f"gradient of {fqn}: {param.grad is None} {grad is None}"
        if grad is not None and param.grad is not None:
            mine = shards.cut(fqn, grad)
            same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-8)
            assert same(param.grad, mine), f"gradient of {fqn} by {(param.grad - mine).abs().max()}"


def idle_on_one_rank(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """Each rank reaches another expert, none the others: parameters with a gradient, and all of which it has a part."""
    seed_all(0)
    plain = CASES["experts"].build()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for fqn in ("part.gate.weight", "head.weight", "head.bias"):
            weights[fqn].zero_()
        weights["part.gate.weight"][:2] = torch.tensor([[1.0], [-1.0]])
        weights["head.weight"][:, 0] = 1.0
    zero = fxzero.compile(plain)
    x = torch.zeros(3, 8)
    x[:, 0] = 1.0 if rank == 0 else -1.0
    zero(x).backward()
    params = {fqn: param for fqn, param in zero.named_parameters() if "experts" in fqn and param.numel()}
    return [fqn for fqn, param in params.items() if param.grad is not None], [*params]

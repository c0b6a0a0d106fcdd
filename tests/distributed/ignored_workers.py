"""A model with ignored parameters on each rank, beside FSDP2's `fully_shard(ignored_params=)` of the same model."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fxzero
from fxzero.errors import CheckpointError, RankMismatchError, StepLeftOutError


class Block(nn.Module):
    """A part whose first parameter is ignored, with one that is not in the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(12))
        self.inner = nn.Linear(12, 12)
        self.router = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x * self.gain).to(self.inner.weight.dtype)
        return x + self.router(torch.tanh(self.inner(scaled)).to(self.router.weight.dtype)).to(x.dtype)


class Model(nn.Module):
    """Two blocks and a head; the routers are ignored, and the gain of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().mean()

    def ignored(self) -> set[nn.Parameter]:
        """The parameters to ignore."""
        first, second = self.blocks
        return {first.gain, first.router.weight, second.router.weight}  # type: ignore[union-attr, return-value]


def _model(rank: int) -> Model:
    torch.manual_seed(3)
    model = Model()
    with torch.no_grad():
        for param in model.ignored():
            param.add_(0.01 * rank)  # nobody sends them
    return model


def _whole(named: Any) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named}


def train(rank: int, world_size: int, bf16: bool) -> None:
    """Some steps of both, one of them accumulated, with equal numbers after each."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else None
    peer, model = _model(rank), _model(rank)
    fully_shard(peer, ignored_params=peer.ignored(), **({"mp_policy": policy} if policy else {}))
    ignored = model.ignored()
    zero = fxzero.compile(model, ignored_params=ignored, mp_policy=policy, sync_init=False)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.05) for each in (peer, zero)]
    torch.manual_seed(10 + rank)
    x = torch.empty(0)
    for step in range(4):
        batches = [torch.randn(4, 12, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(1 + (step == 2))]
        for x in batches:
            peer.set_requires_gradient_sync(x is batches[-1])
            losses = [peer(x)]
            losses[0].backward()
            if x is batches[-1]:
                losses.append(zero(x))
                losses[1].backward()
            else:
                with zero.no_sync():
                    losses.append(zero(x))
                    losses[1].backward()
            assert torch.allclose(*losses, rtol=0.0, atol=0.0 if world_size < 3 else 1e-5), (step, losses)
        for param, own in zip(peer.ignored(), ignored, strict=True):
            assert param.grad is not None and own.grad is not None and own.grad.shape == own.shape
        for name in ("blocks.0.gain", "blocks.1.router.weight"):
            own, other = (dict(each.named_parameters())[name].grad for each in (zero, peer))
            assert torch.allclose(own, other, rtol=0.0, atol=0.0 if world_size < 3 else 1e-6), (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        own = zero.state_dict()
        for name, value in _whole(peer.named_parameters()).items():
            limit = 0.0 if world_size < 3 else 1e-6  # FSDP2's gloo adds three gradients in another order
            assert torch.allclose(own[name], value, rtol=0.0, atol=limit), (step, name)
    assert zero.num_parameters() == sum(p.numel() for p in _model(0).parameters())
    restored = _model(rank + 1)
    again = fxzero.compile(restored, ignored_params=restored.ignored(), mp_policy=policy, sync_init=False)
    set_model_state_dict(again, get_model_state_dict(zero))
    assert torch.equal(again(x), zero(x))
    copied = copy.deepcopy(zero)
    assert torch.equal(copied(x), zero(x))


def norms(rank: int, world_size: int) -> None:
    """Clipping counts gradients of ignored parameters once, and all ranks clip by one norm."""
    for is_synchronised in (True, False):
        for by_torch in (True, False):
            model = _model(0)
            zero = fxzero.compile(model, ignored_params=(ignored := model.ignored()))
            torch.manual_seed(rank)
            zero(torch.randn(4, 12)).backward()
            named = [param for param in model.parameters() if param in ignored]  # in one order on all ranks
            for param in named if is_synchronised else ():
                assert param.grad is not None
                dist.all_reduce(param.grad)
                param.grad /= world_size
            grads = [param.grad for param in ignored if param.grad is not None]
            own = sum(float(grad.double().square().sum()) for grad in grads)
            beside = torch.tensor(own, dtype=torch.float64)
            dist.all_reduce(beside)
            expected = sum(float(norm) ** 2 for norm in zero.grad_norms().values()) + float(beside) / world_size
            was = [grad.clone() for grad in grads]
            clip = torch.nn.utils.clip_grad_norm_
            total = clip(zero.parameters(), 0.01) if by_torch else zero.clip_grad_norm_(0.01)
            assert math.isclose(float(total), expected**0.5, rel_tol=1e-5), (total, expected**0.5)
            totals = [torch.empty(()) for _ in range(world_size)]
            dist.all_gather(totals, total.float())
            assert len(set(map(float, totals))) == 1
            for before, grad in zip(was, grads, strict=True):
                assert torch.allclose(grad, before * (0.01 / (total + 1e-6)))


def other_uses(rank: int, world_size: int, folder: str) -> None:
    """Checkpoints, parts, whole parameters, gradients that are asked for, and what is refused."""
    model = _model(rank)
    zero = fxzero.compile(model, ignored_params=(ignored := model.ignored()))
    optimizer = torch.optim.AdamW(zero.parameters(), lr=0.05)
    torch.manual_seed(rank)
    x = torch.randn(4, 12)
    for _ in range(2):
        zero(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": get_model_state_dict(zero), "optimizer": get_optimizer_state_dict(zero, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    then = {name: value.clone() for name, value in zero.state_dict().items()}
    assert torch.equal(then["blocks.0.gain"], dict(zero.named_parameters())["blocks.0.gain"])

    other = _model(rank + 5)
    again = fxzero.compile(other, ignored_params=other.ignored())
    own_optimizer = torch.optim.AdamW(again.parameters(), lr=0.05)
    state = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, own_optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, own_optimizer, state["optimizer"])
    now = again.state_dict()
    of_rank0 = [then["blocks.0.gain"].clone()]
    dist.broadcast(of_rank0[0], 0)
    assert torch.equal(now["head.weight"], then["head.weight"])
    assert torch.equal(now["blocks.0.gain"], of_rank0[0])
    assert own_optimizer.state[other.blocks[0].gain]["exp_avg"].shape == (12,)  # type: ignore[union-attr, index]

    with torch.no_grad():
        part = zero.blocks[0](x)
        with zero.summon_full_params():
            assert torch.equal(part, model.blocks[0](x))
    gain = dict(zero.named_parameters())["blocks.0.gain"]
    asked = torch.autograd.grad(zero(x), [gain, dict(zero.named_parameters())["head.bias"]])
    zero(x).backward()
    assert gain.grad is not None and torch.equal(asked[0], gain.grad)
    zero.zero_grad()
    assert gain.grad is None
    loss = zero(x)
    with torch.no_grad():
        model.blocks[0].router.weight.add_(1.0)  # type: ignore[union-attr, operator]
    with pytest.raises(fxzero.errors.StaleBackwardError, match="changed in place"):
        loss.backward()
    gain.requires_grad_(False)
    zero(x).backward()
    assert gain.grad is None
    assert zero.blocks[1].router.weight.grad.shape == (12, 12)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.gain is one of ignored_params"):
        fxzero.save(folder, zero, optimizer)
    if world_size > 1:
        third = _model(0)
        some = {third.blocks[rank].router.weight}  # type: ignore[union-attr]
        differing = fxzero.compile(third, ignored_params=some)
        with pytest.raises(RankMismatchError, match="ignored_params"):
            differing(x)
    assert ignored


def steps_of_their_own(rank: int, world_size: int) -> None:
    """An optimizer of ignored parameters alone skips what others skip, with a scaler and in step_together()."""
    model = _model(0)
    zero = fxzero.compile(model, ignored_params=(ignored := model.ignored()))
    shards = [param for param in zero.parameters() if all(param is not each for each in ignored)]
    optimizers = [torch.optim.AdamW(each, lr=0.05) for each in (list(ignored), shards)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(2):
        scaler.scale(zero(torch.randn(4, 12))).backward()
        gradient = next(iter(ignored)).grad
        assert gradient is not None
        if step == 1 and rank == 1:
            gradient.view(-1)[0] = float("inf")
        before = [param.detach().clone() for param in ignored]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert all(torch.equal(*pair) == (step == 1) for pair in zip(before, ignored, strict=True))
    assert scaler.get_scale() == 2.0

    before = [param.detach().clone() for param in zero.parameters()]
    with pytest.raises((StepLeftOutError, KeyError)), zero.step_together():
        zero(torch.randn(4, 12)).backward()
        if rank == 1:
            raise KeyError
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, zero.parameters(), strict=True))
    assert all(param.grad is None for param in zero.parameters())
    with zero.step_together():
        zero(torch.randn(4, 12)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, zero.parameters(), strict=True) if pair[0].numel())

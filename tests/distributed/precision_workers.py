"""Run on every rank: a precision policy against replicated training that casts in the same places, bit for bit."""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import fxzero
from fxzero.graph.nodes import Role
from fxzero.graph.sharding import Placement
from tests.distributed import replicated

BF16, FP32 = torch.bfloat16, torch.float32
Policy = MixedPrecisionPolicy
Dtypes = Callable[[str, torch.dtype], tuple[torch.dtype, torch.dtype]]
"""The dtypes in which a parameter is read, and its gradients are summed, given its name and its own dtype."""


class Net(nn.Module):
    """Layers of odd sizes, a tied one, a norm, a scale that is a buffer, and a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.again = nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(7, 13)
        self.again.weight = self.first.weight
        self.last, self.unused = nn.Linear(13, 5), nn.Linear(3, 1)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(1.3))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.norm(torch.relu(self.first(x) + self.again(x * self.scale)))
        return nn.functional.cross_entropy(nn.functional.dropout(self.last(h), 0.1), target)


class Packed(nn.Module):
    """A frozen layer of four-bit weights, two in a byte, with a scale for each row, and a trained adapter."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        packed = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.order = nn.Parameter(torch.randperm(out).int(), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(out, 1) / 8, requires_grad=False)
        self.down, self.up = nn.Linear(width, 3, bias=False), nn.Linear(3, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1)
        weight = (halves.to(x.dtype) - 7.5) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight)[:, self.order.long()] + self.up(self.down(x))


class Adapted(nn.Module):
    """Two layers of packed integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Packed(16, 14), Packed(14, 5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(torch.relu(self.first(x))), target)


class LowRank(nn.Module):
    """A frozen layer in bfloat16 under fp32 adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 5).bfloat16().requires_grad_(False)
        self.down, self.up = nn.Linear(16, 3, bias=False), nn.Linear(3, 5, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        base = self.base(x.to(self.base.weight.dtype)).to(x.dtype)
        return nn.functional.cross_entropy(base + self.up(self.down(x)), target)


CASES = replicated.CASES | {
    "packed": replicated.Case(Adapted, lambda seed, _: replicated._points(seed, 16, 5)),
    "odd": replicated.Case(Net, lambda seed, _: replicated._points(seed, 7, 5)),
    "low rank": replicated.Case(LowRank, lambda seed, _: replicated._points(seed, 16, 5)),
}


def of_policy(policy: Policy) -> Dtypes:
    """One policy for all parameters."""

    def dtypes(fqn: str, own: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        compute = policy.param_dtype or own
        return (compute, policy.reduce_dtype or compute) if own.is_floating_point else (own, own)

    return dtypes


@dataclass
class Mixed:
    """Replicated training whose ranks read parameters in one dtype, and whose gradients are summed in another."""

    model: nn.Module
    """Holds the parameters and `.grad` in the dtype of the model."""
    world_size: int
    dtypes: Dtypes
    ranks_per_node: int | None = None
    divisor: float | None = None
    """By which sums over ranks are divided; None: their number."""
    unsent: list[dict[str, Tensor]] = field(default_factory=list["dict[str, Tensor]"])
    """Of each rank, the gradients of no_sync()."""

    def __post_init__(self) -> None:
        self.unsent = [{} for _ in range(self.world_size)]

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one rank, and the leaves that it is differentiated by."""
        read = {
            fqn: param.detach().to(self.dtypes(fqn, param.dtype)[0]).requires_grad_(param.requires_grad)
            for fqn, param in self.model.named_parameters()
        }
        torch.manual_seed(seed)
        cast_to = next(each.dtype for each in read.values() if each.requires_grad)
        inputs = {name: each.to(cast_to) if each.is_floating_point() else each for name, each in batch.items()}
        output = torch.func.functional_call(self.model, read, (), inputs)
        return replicated._loss(output), {fqn: each for fqn, each in read.items() if each.requires_grad}

    def step(self, batches: Any, seeds: Any, *, synchronize: bool = True, scale: float = 1.0) -> list[Tensor]:
        """One micro-batch of every rank: their losses; averaged gradients are added to `.grad` of the model.

        Args:
            scale: by which losses are multiplied in fp32, if it is not 1.
        """
        losses: list[Tensor] = []
        for unsent, batch, seed in zip(self.unsent, batches, seeds, strict=True):
            loss, read = self.forward(batch, seed)
            losses.append(loss.detach())
            scaled = loss if scale == 1 else loss.float() * scale
            grads = torch.autograd.grad(scaled, list(read.values()), allow_unused=True)
            for fqn, grad in zip(read, cast("tuple[Tensor | None, ...]", grads), strict=True):
                if grad is not None:
                    own = self.model.get_parameter(fqn).dtype
                    wide = self.dtypes(fqn, own)[1]
                    if self.world_size == 1 and own.itemsize > wide.itemsize >= grad.dtype.itemsize:
                        wide = own
                    unsent[fqn] = unsent[fqn] + grad.to(wide) if fqn in unsent else grad.to(wide)
        if synchronize:
            self._reduce()
        return losses

    def _reduce(self) -> None:
        params = dict(self.model.named_parameters())
        for fqn in list(self.unsent[0]):
            terms = [each.pop(fqn) for each in self.unsent]
            size = self.ranks_per_node or self.world_size
            nodes = [functools.reduce(torch.add, terms[first:][:size]) for first in range(0, self.world_size, size)]
            total = (functools.reduce(torch.add, nodes) / (self.divisor or self.world_size)).to(params[fqn].dtype)
            before = params[fqn].grad
            params[fqn].grad = total if before is None else before + total


def train(
    rank: int,
    world_size: int,
    name: str,
    policy: Any,
    dtypes: Dtypes | None = None,
    *,
    micro_batches: int = 1,
    no_sync: bool = False,
    mesh_shape: tuple[int, int] | None = None,
    across: Placement = "replicate",
    own: torch.dtype = FP32,
    steps: int = 3,
    accumulate: int = 1,
    divisor: float | None = None,
    **options: Any,
) -> str:
    """Train both ways; losses, gradients and parameters are the same bit for bit. The last schedule.

    Args:
        own: the dtype of the model.
        accumulate: the number of micro-batches whose gradients the module holds by itself.
        divisor: by which sums over ranks are divided.
        options: of `fxzero.compile`.
    """
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().to(own) if own is not FP32 else case.build()
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape)
    reference = Mixed(copy.deepcopy(model), world_size, dtypes or of_policy(policy), mesh_shape and mesh_shape[1])
    reference.divisor = divisor
    options |= {"accumulate": accumulate, "gradient_divide_factor": divisor}
    zero = fxzero.compile(model, mp_policy=policy, mesh=mesh, across=across, **options)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False) for module in (zero, reference.model)]
    batches: list[replicated.Batch] = []
    for step in range(steps):
        for micro in range(micro_batches):
            synchronize = not (no_sync or accumulate > 1) or micro == micro_batches - 1
            seeds = [replicated.seed_of(step, r, micro) for r in range(world_size)]
            batches = [_in(own, case.batch(seed, 16)) for seed in seeds]
            torch.manual_seed(seeds[rank])
            if synchronize or accumulate > 1:
                loss = replicated._loss(zero(**batches[rank]))
                loss.backward()
            else:
                with zero.no_sync():
                    loss = replicated._loss(zero(**batches[rank]))
                    loss.backward()
                assert all(p.grad is None or p.grad.dtype is p.dtype for p in zero.parameters())
            losses = reference.step(batches, seeds, synchronize=synchronize)
            assert torch.equal(loss, losses[rank]), f"step {step}: loss {loss} instead of {losses[rank]}"
        assert all(p.grad is None or p.grad.dtype is p.dtype is own for p in zero.parameters())
        assert all(p.grad is None for p in zero.parameters() if not p.requires_grad)
        replicated.assert_same(zero, reference.model, f"step {step}: gradient", lambda p: p.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        replicated.assert_same(zero, reference.model, f"step {step}: parameter", lambda p: p.data)
    with torch.no_grad():
        torch.manual_seed(1)
        loss = replicated._loss(zero(**batches[rank]))
    expected, _ = reference.forward(batches[rank], 1)
    assert torch.equal(loss, expected.detach())
    state = zero.state_dict()
    for fqn, param in reference.model.named_parameters():
        assert torch.equal(state[fqn], param) and state[fqn].dtype is param.dtype
    zero.load_state_dict(state)
    return str(zero.schedule)


def _in(dtype: torch.dtype, batch: replicated.Batch) -> replicated.Batch:
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in batch.items()}


def train_as_fsdp2(rank: int, world_size: int, steps: int = 12) -> None:
    """Losses are near those of FSDP2 with the same policy."""
    case, policy = replicated.CASES["gpt"], Policy(BF16, FP32)
    torch.manual_seed(0)
    ours, theirs = case.build(), case.build()
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        module.eval()
    fully_shard(theirs, mp_policy=policy)
    modules = [fxzero.compile(ours, mp_policy=policy), theirs]
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-3) for module in modules]
    for step in range(steps):
        batch = case.batch(replicated.seed_of(step, rank), 16)
        losses: list[Tensor] = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            loss = replicated._loss(module(**batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().float())
        torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)


def bytes_of_a_step(rank: int, world_size: int) -> float:
    """How many times the bytes of a step with a policy travel without one."""
    sent: list[int] = []
    for policy in (None, Policy(BF16, FP32)):
        zero = fxzero.compile(nn.Linear(1024, 32, bias=False), mp_policy=policy)
        zero(torch.ones(2, 1024)).float().sum().backward()
        step = zero.schedule.step
        sent.append(sum(step.travels(start).nbytes for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER)))
    return sent[0] / sent[1]


def other_policies(rank: int, world_size: int) -> None:
    """Ranks that compile with other policies."""
    zero = fxzero.compile(nn.Linear(4, 4), mp_policy=Policy(BF16, FP32 if rank else BF16))
    zero(torch.ones(2, 4))


def scale_losses(rank: int, world_size: int, kind: str, fused: bool) -> list[float]:
    """Train in float16 with a gradient scaler whose scale is too large at first; the scales by step.

    Bit for bit replicated training with a scaler; rank 1 alone has an infinite gradient in one step.
    """
    case, policy = CASES["odd"], Policy(torch.float16, FP32, FP32)
    torch.manual_seed(0)
    model = case.build()
    reference = Mixed(copy.deepcopy(model), world_size, of_policy(policy))
    zero = fxzero.compile(model, mp_policy=policy)
    modules = (zero, reference.model)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False, fused=fused) for module in modules]
    scaler = ShardedGradScaler("cpu", init_scale=2.0**20) if kind == "sharded" else GradScaler("cpu", 2.0**20)
    scalers = [scaler, GradScaler("cpu", init_scale=2.0**20)]
    scales: list[float] = []
    for step in range(7):
        seeds = [replicated.seed_of(step, r) for r in range(world_size)]
        batches = [case.batch(seed, 16) for seed in seeds]
        if step == 5:
            batches[1]["x"][0, 0] = 70000.0  # infinite in float16
        torch.manual_seed(seeds[rank])
        loss = replicated._loss(zero(**batches[rank]))
        scalers[0].scale(loss).backward()
        reference.step(batches, seeds, scale=scalers[1].scale(torch.ones(())).item())
        for scaler, optimizer in zip(scalers, optimizers, strict=True):
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        replicated.assert_same(zero, reference.model, f"step {step}: parameter", lambda p: p.data)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.append(scalers[0].get_scale())
    return scales

"""Run on every rank: what travels narrower, against replicated training that rounds at the same places, bit for bit."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.comm.gloo import GlooBackend
from fxzero.graph.layout import Layout, LayoutName
from fxzero.graph.sharding import Placement
from fxzero.passes import default_passes
from fxzero.testing import engine_of
from tests.distributed import replicated
from tests.distributed.interleaved_workers import MIXED

BF16 = torch.bfloat16
SIZES: dict[str, Any] = {"bucket_bytes": 2048, "prefetch_bytes": 8192, "reduce_bytes": 4096}


def rounded(value: Tensor) -> Tensor:
    """Through bfloat16, if that is narrower."""
    return value.to(BF16).to(value.dtype) if value.dtype.itemsize > 2 else value


def dequantized(layout: Layout, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters through int8 by the definition, block by block of every shard."""
    found: dict[str, Tensor] = {}
    for bucket in layout.buckets:
        full = torch.zeros(bucket.numel, dtype=bucket.dtypes.shard)
        for param in bucket.params:
            full[bucket.offsets[param.fqn] :][: param.numel] = values[param.fqn].flatten()
        for shard in full.split(bucket.shard_numel) if bucket.numel else []:
            for block in shard.split(256):
                scale = (block.float().abs().max() / 127).clamp(min=torch.finfo(torch.float32).tiny)
                quantized = (block.float() / scale).round()
                assert quantized.abs().max() <= 127
                block.copy_(quantized * scale)
        found |= {p.fqn: full[bucket.offsets[p.fqn] :][: p.numel].view(p.shape) for p in bucket.params}
    return found


@dataclass
class Rounding:
    """Replicated training whose replicas compute with rounded parameters, and whose ranks send rounded gradients."""

    model: nn.Module
    """Holds the exact parameters."""
    world_size: int
    gather_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    ranks_per_node: int | None = None
    """Gradients are summed over the ranks of a node, then over nodes. Default: all are one node."""
    replicas: list[nn.Module] = field(default_factory=list[nn.Module])
    unsent: list[dict[str, Tensor]] = field(default_factory=list["dict[str, Tensor]"])
    """Of each rank, the gradients of no_sync()."""

    def __post_init__(self) -> None:
        self.replicas = [copy.deepcopy(self.model) for _ in range(self.world_size)]
        self.unsent = [{} for _ in range(self.world_size)]

    def step(self, layout: Layout, batches: Any, seeds: Any, *, synchronize: bool = True) -> list[Tensor]:
        """One micro-batch of every rank: their losses; averaged gradients are added to `.grad` of the model."""
        exact = {fqn: param.detach() for fqn, param in self.model.named_parameters()}
        seen = {fqn: rounded(value) for fqn, value in exact.items()} if self.gather_dtype is BF16 else exact
        if self.gather_dtype is torch.int8:
            seen = dequantized(layout, exact)
        losses: list[Tensor] = []
        for replica, unsent, batch, seed in zip(self.replicas, self.unsent, batches, seeds, strict=True):
            params = dict(replica.named_parameters())
            for fqn, param in params.items():
                param.data = seen[fqn].clone()
            torch.manual_seed(seed)
            loss = replicated._loss(replica(**batch))
            losses.append(loss.detach())
            trained = [fqn for fqn, param in params.items() if param.requires_grad]
            grads = torch.autograd.grad(loss, [params[fqn] for fqn in trained], allow_unused=True)
            for fqn, grad in zip(trained, cast("tuple[Tensor | None, ...]", grads), strict=True):
                if grad is not None:
                    unsent[fqn] = grad + unsent[fqn] if fqn in unsent else grad
        if synchronize:
            self._reduce()
        return losses

    def _reduce(self) -> None:
        params = dict(self.model.named_parameters())
        for fqn in list(self.unsent[0]):
            terms = [each.pop(fqn) for each in self.unsent]
            terms = [rounded(term) for term in terms] if self.reduce_dtype is BF16 else terms
            size = self.ranks_per_node or self.world_size
            nodes = [functools.reduce(torch.add, terms[first:][:size]) for first in range(0, self.world_size, size)]
            total = functools.reduce(torch.add, nodes) / self.world_size
            before = params[fqn].grad
            params[fqn].grad = total if before is None else before + total


def train(
    rank: int,
    world_size: int,
    name: str,
    gather_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    *,
    micro_batches: int = 1,
    no_sync: bool = False,
    layout: LayoutName = "contiguous",
    sizes: dict[str, Any] | None = None,
    mesh_shape: tuple[int, int] | None = None,
    across: Placement = "replicate",
) -> str:
    """Train both ways; losses, gradients, parameters are the same bit for bit, in train and eval. The last schedule."""
    case = MIXED if name == "mixed" else replicated.CASES[name]
    torch.manual_seed(0)
    model = case.build()
    ranks_per_node = None if mesh_shape is None else mesh_shape[1]
    reference = Rounding(copy.deepcopy(model), world_size, gather_dtype, reduce_dtype, ranks_per_node)
    passes = default_passes(**(SIZES | (sizes or {})), gather_dtype=gather_dtype, reduce_dtype=reduce_dtype)
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape)
    zero = fxzero.compile(model, passes=passes, layout=layout, mesh=mesh, across=across)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False) for module in (zero, reference.model)]
    engine, batches = engine_of(zero), list[replicated.Batch]()
    for step in range(3):
        for micro in range(micro_batches):
            synchronize = not no_sync or micro == micro_batches - 1
            batches = [case.batch(replicated.seed_of(step, r, micro), 16) for r in range(world_size)]
            seeds = [replicated.seed_of(step, r, micro) for r in range(world_size)]
            torch.manual_seed(seeds[rank])
            engine.synchronize = synchronize
            loss = replicated._loss(zero(**batches[rank]))
            loss.backward()
            engine.synchronize = True
            assert engine.sharded.shards is not None
            losses = reference.step(engine.sharded.shards.layout, batches, seeds, synchronize=synchronize)
            assert torch.equal(loss, losses[rank]), f"step {step}: loss {loss} instead of {losses[rank]}"
        replicated.assert_same(zero, reference.model, f"step {step}: gradient", lambda p: p.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        replicated.assert_same(zero, reference.model, f"step {step}: parameter", lambda p: p.data)
    schedule = str(zero.schedule)
    with torch.no_grad():
        torch.manual_seed(1)
        loss = replicated._loss(zero(**batches[rank]))
    (expected, *_) = reference.step(layout_of(zero), [batches[rank]] * world_size, [1] * world_size)
    assert torch.equal(loss, expected)
    exact = dict(reference.model.named_parameters())
    for fqn, value in zero.iter_full_params():
        assert value is not None and torch.equal(value, exact[fqn]), f"{fqn}: what is saved is rounded"
    return schedule


def layout_of(zero: fxzero.ZeroModule) -> Layout:
    shards = engine_of(zero).sharded.shards
    assert shards is not None
    return shards.layout


def clipped(rank: int, world_size: int) -> None:
    """The norm is that of the averaged gradients as they arrived."""
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    reference = Rounding(copy.deepcopy(model), world_size, torch.int8, BF16)
    zero = fxzero.compile(model, gather_dtype=torch.int8, reduce_dtype=BF16)
    batches = [case.batch(replicated.seed_of(0, r), 16) for r in range(world_size)]
    torch.manual_seed(rank)
    replicated._loss(zero(**batches[rank])).backward()
    reference.step(layout_of(zero), batches, range(world_size))
    norm = zero.clip_grad_norm_(0.1)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.model.parameters(), 0.1), rtol=1e-6, atol=0)


def two_forwards_then_backwards(rank: int, world_size: int, gather_dtype: torch.dtype) -> None:
    """Kept buckets are gathered again where another phase ran in between, and are then the same."""
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    passes = default_passes(bucket_bytes=8192, max_kept_bytes=None, prefetch_bytes=8192, gather_dtype=gather_dtype)
    zero = fxzero.compile(model, passes=passes).eval()
    batches = [case.batch(seed, 16) for seed in (1, 2)]
    gradients: list[list[Tensor]] = []
    for together in (False, True):
        losses: list[Tensor] = []
        for batch in batches:
            losses.append(replicated._loss(zero(**batch)))
            if not together:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        gradients.append([param.grad.clone() for param in zero.parameters()])
        zero.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def sums_in_bfloat16(rank: int, world_size: int, micro_batches: int) -> None:
    """Where the backend sums, as NCCL does, it does so in the type that travels: here gloo with that code."""
    case = replicated.CASES["mlp"]
    torch.manual_seed(0)
    model = case.build()
    reference = replicated.Replicated(copy.deepcopy(model), world_size)
    expected = [torch.zeros_like(param) for param in model.parameters()]
    sums_locally = GlooBackend.sums_locally
    GlooBackend.sums_locally = lambda self, sharding: False  # type: ignore[method-assign]
    try:
        zero = fxzero.compile(model, reduce_dtype=BF16)
        for micro in range(micro_batches):
            batches = [case.batch(replicated.seed_of(micro, r), 0) for r in range(world_size)]
            replicated._loss(zero(**batches[rank])).backward()
            terms: list[list[Tensor]] = []
            for replica, batch in zip(reference.replicas, batches, strict=True):
                loss = replicated._loss(replica(**batch))
                terms.append([g.to(BF16) for g in torch.autograd.grad(loss, list(replica.parameters()))])
            for into, first, *others in zip(expected, *terms, strict=True):
                total = first.clone()
                for term in others:
                    total += term
                into += total / world_size
        for (fqn, param), full in zip(zero.named_parameters(), expected, strict=True):
            assert torch.equal(param.grad, replicated.own_slice(zero, fqn, full)), fqn
    finally:
        GlooBackend.sums_locally = sums_locally  # type: ignore[method-assign]


class CountingGroup:
    """A process group that counts the bytes of the messages it sends and receives."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.sent = self.received = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, message: list[Tensor], peer: int, tag: int) -> Any:
        self.sent += message[0].nbytes
        return self._group.send(message, peer, tag)

    def recv(self, into: list[Tensor], peer: int, tag: int) -> Any:
        self.received += into[0].nbytes
        return self._group.recv(into, peer, tag)


def count_bytes(
    rank: int, world_size: int, gather_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None
) -> tuple[int, int, int]:
    """Bytes that a step's schedule says it gathers and reduces, and bytes of its messages."""
    case = replicated.CASES["net"]
    zero = fxzero.compile(case.build(), gather_dtype=gather_dtype, reduce_dtype=reduce_dtype)
    engine = engine_of(zero)
    group = engine.sharded.comm.group = CountingGroup(engine.sharded.comm.group)  # type: ignore[attr-defined]
    zero(**case.batch(0, 16)).backward()
    zero.zero_grad()
    group.sent = group.received = 0
    zero(**case.batch(0, 16)).backward()
    assert group.sent == group.received
    return zero.schedule.totals.gathered_bytes, zero.schedule.totals.reduced_bytes, group.received


def losses(rank: int, world_size: int, options: list[dict[str, Any]]) -> list[list[float]]:
    """The mean losses of ranks over 30 steps on a few batches, for each of some options of compile."""
    case = replicated.CASES["gpt"]
    found: list[list[float]] = []
    for each in options:
        torch.manual_seed(0)
        zero = fxzero.compile(case.build(), **each)
        optimizer = torch.optim.AdamW(zero.parameters(), lr=3e-3)
        found.append([])
        for step in range(30):
            torch.manual_seed(step)
            loss = zero(**case.batch(10 * (step % 3) + rank, 16)).loss
            loss.backward()
            zero.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            engine_of(zero).sharded.comm.all_reduce(mean)
            found[-1].append(mean.item() / world_size)
    return found


def disagree(rank: int, world_size: int) -> None:
    """Ranks that were given other types stop before they exchange anything."""
    case = replicated.CASES["mlp"]
    zero = fxzero.compile(case.build(), gather_dtype=BF16 if rank else torch.int8)
    zero(**case.batch(0, 0))


__all__ = ["clipped", "count_bytes", "disagree", "losses", "sums_in_bfloat16", "train", "two_forwards_then_backwards"]

"""What ranks do in test_interleaved.py: the interleaved layout against the contiguous one and replicated training."""

import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxzero
from fxzero.graph.layout import LayoutName
from fxzero.passes import default_passes
from fxzero.runtime.interleave import gathered_members
from fxzero.testing import engine_of
from tests.distributed import replicated
from tests.distributed.api_workers import Pair, data
from tests.optimizers.test_optimizer_state import Allocations

LAYOUTS: tuple[LayoutName, ...] = ("contiguous", "interleaved")


class Mixed(nn.Module):
    """Parameters of three dtypes and odd sizes, some frozen, one empty, one tied, one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(7, 13)
        self.short = nn.Linear(13, 11, dtype=torch.bfloat16)
        self.frozen = nn.Linear(11, 13)
        self.frozen.requires_grad_(False)
        self.last_scale = nn.Parameter(torch.rand(5, dtype=torch.float64))
        self.empty = nn.Parameter(torch.empty(0))
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(7, 13)
        self.head.weight = self.body.weight

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        hidden = torch.tanh(self.frozen(self.short(hidden.bfloat16()).float()))
        logits = nn.functional.linear(hidden, self.head.weight.t())[:, :5] * self.last_scale + self.head.bias[:5]
        return nn.functional.cross_entropy(logits, target)


MIXED = replicated.Case(Mixed, lambda seed, _: replicated._points(seed, 7, 5))


def train(rank: int, world_size: int, name: str, optimizer: str = "adamw", **options: Any) -> str:
    """`replicated.train` in the interleaved layout."""
    case = MIXED if name == "mixed" else name
    return replicated.train(rank, world_size, case, optimizer, layout="interleaved", **options)


def full_gradients(zero: fxzero.ZeroModule) -> dict[str, Tensor | None]:
    """The gradients of all ranks, put together."""
    engine = engine_of(zero)
    assert engine.sharded.shards is not None
    gradients: dict[str, Tensor | None] = dict.fromkeys(dict(zero.named_parameters()))
    for bucket in engine.sharded.shards.layout.buckets:
        if any(zero.get_parameter(fqn).grad is not None for fqn in bucket.fqns):
            full = torch.full((bucket.numel,), torch.nan, dtype=bucket.dtypes.shard)
            engine.sharded.comm.gather_to_all(engine.sharded.shards.grad_shard(bucket), full)
            gradients |= {fqn: value.clone() for fqn, value in gathered_members(bucket, full)}
            for each, param in itertools.product(range(bucket.shard_ranks), bucket.params):
                part = bucket.slice_of(param, each)
                full[each * bucket.shard_numel + part.offset :][: part.numel] = 0
            assert not full.any(), "the padding of a gradient shard would enter the norm"
    return gradients


def assert_equal(one: dict[str, Tensor | None], two: dict[str, Tensor | None], what: str) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        assert (value is None) == (other is None), f"{what}: {name}"
        assert value is None or (other is not None and torch.equal(value, other)), f"{what}: {name} differs"


def both_layouts(
    rank: int,
    world_size: int,
    name: str,
    no_sync: bool = False,
    norm_type: float | None = None,
    sizes: dict[str, int | None] | None = None,
) -> list[float]:
    """Train the same model in both layouts and compare gradients and parameters, gathered; the norms of the steps."""
    case = MIXED if name == "mixed" else replicated.CASES[name]
    sizes = sizes or {"bucket_bytes": 2048, "prefetch_bytes": 8192, "reduce_bytes": 4096}
    zeros: list[fxzero.ZeroModule] = []
    optimizers: list[torch.optim.Optimizer] = []
    for layout in LAYOUTS:
        torch.manual_seed(0)
        zeros.append(fxzero.compile(case.build(), passes=default_passes(**sizes), layout=layout))  # type: ignore[arg-type]
        optimizers.append(torch.optim.AdamW(zeros[-1].parameters(), lr=1e-2))
    norms: list[float] = []
    for step in range(3):
        for zero in zeros:
            for micro in range(3):
                batch, last = case.batch(replicated.seed_of(step, rank, micro), 16), micro == 2
                torch.manual_seed(micro)
                with zero.no_sync() if no_sync and not last else nullcontext():
                    replicated._loss(zero(**batch)).backward()
        assert_equal(full_gradients(zeros[0]), full_gradients(zeros[1]), f"step {step}: gradient")
        if norm_type is not None:
            found = [zero.clip_grad_norm_(0.01, norm_type).item() for zero in zeros]
            norms += found
            if found[0] != found[1]:
                return norms
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        one, two = [{**zero.state_dict()} for zero in zeros]
        assert_equal(one, two, f"step {step}: parameter")
    return norms


def move_weights(rank: int, world_size: int) -> None:
    """State dicts go from one layout to the other and back, on every rank or through rank 0."""
    weights: list[dict[str, Any]] = []
    for seed, (layout, other) in enumerate([LAYOUTS, LAYOUTS[::-1]]):
        torch.manual_seed(10 * seed + rank)
        model = Mixed()
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        zero = fxzero.compile(model, layout=layout)
        zero(**MIXED.batch(0, 0)).backward()
        full = zero.state_dict()
        assert rank != 0 or all(torch.equal(full[name], value) for name, value in expected.items())
        alone = zero.state_dict(rank0_only=True)
        assert list(alone) == (list(full) if rank == 0 else [])
        assert all(torch.equal(alone[name], full[name]) for name in alone)
        with torch.device("meta"):
            on_meta = Mixed()
        loaded = fxzero.compile(on_meta, layout=other)
        loaded.load_state_dict(full)
        again = loaded.state_dict()
        assert all(torch.equal(again[name], value) for name, value in full.items())
        gathered = {name: value.clone() for name, value in loaded.iter_full_params() if value is not None}
        assert all(torch.equal(full[name], value) for name, value in gathered.items())
        weights.append(full)
    assert not torch.equal(weights[0]["body.weight"], weights[1]["body.weight"])


def train_pair(rank: int, world_size: int, bucket_bytes: int) -> None:
    """Micro-batches that reach different parameters, so that buckets are reduced for some members only."""
    both = Pair(rank, world_size, layout="interleaved", passes=default_passes(bucket_bytes=bucket_bytes))
    for step in range(2):
        for micro, use_extra in enumerate((False, True, False)):
            seed = 3 * step + micro
            both.backward(lambda m, r, seed=seed, use=use_extra: m(data(r, seed), use).loss, seed)
        both.step()


class Copies(TorchDispatchMode):
    """The bytes that foreach copies write."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.nbytes += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def count_copies(rank: int, world_size: int) -> tuple[int, int]:
    """Bytes that a step says it copies between buckets and what travels, and those that it was seen to copy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 255))
    nbytes = sum(param.nbytes for param in model.parameters())
    zero = fxzero.compile(model, layout="interleaved", passes=default_passes(bucket_bytes=300_000))
    x = torch.ones(3, 256)
    for _ in range(2):
        zero(x).sum().backward()
        zero.zero_grad()
    with Allocations() as steady, Copies() as copies:
        zero(x).sum().backward()
    assert steady.large == []
    assert zero.schedule.totals.interleaved_copy_bytes >= 2.4 * nbytes  # both gathered and reduced, one gathered twice
    return zero.schedule.totals.interleaved_copy_bytes, copies.nbytes


__all__ = ["MIXED", "both_layouts", "count_copies", "move_weights", "train", "train_pair"]

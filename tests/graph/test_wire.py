"""Rows on the wire without a wire: what rounding loses, what conversions allocate, and what options are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fxzero
from fxzero.comm import wire_copies
from fxzero.comm.base import Bound
from fxzero.comm.gloo import GLOO, GlooComm
from fxzero.comm.wire_copies import bind_narrow_reduce, pack, reduce_scratch_nbytes, unpack
from fxzero.comm.without_ranks import PlanningComm
from fxzero.graph.layout import Bucket, ParamSpec, Payload
from fxzero.graph.sharding import Sharding
from fxzero.graph.wire import WireFormat, on_wire, split_rows
from fxzero.memory.lifetimes import Kind
from fxzero.passes import NarrowAllGathers, NarrowReduceScatters, default_passes
from fxzero.planner import plan
from tests.distributed import replicated

BF16, INT8 = WireFormat(torch.bfloat16), WireFormat(torch.int8, 256)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bucket_of(numel: int, world_size: int, dtype: torch.dtype = torch.float32) -> Bucket:
    return Bucket((ParamSpec("w", (numel,), dtype, True),), world_size)


def gathered(bucket: Bucket, format: WireFormat, full: Tensor) -> tuple[Tensor, Tensor]:
    """What all ranks have of `full` after a gather, and the rows that travelled."""
    travels = on_wire(bucket.gathered, format)
    staging = torch.full((travels.numel,), 77, dtype=travels.dtype)
    work = torch.full((bucket.shard_numel,), torch.nan) if format.block_numel else None
    for shard, row in zip(full.split(bucket.shard_numel), staging.split(travels.slice_numel), strict=True):
        pack(format, shard, row, work)()
    result = torch.full_like(full, torch.nan)
    unpack(format, bucket, staging, result, work)()
    return result, staging


@pytest.mark.parametrize("dtype, numel", [(torch.float32, 1000), (torch.bfloat16, 1000), (torch.float64, 64)])
def test_rows_have_no_more_bytes_than_values_scales_and_pad(dtype: torch.dtype, numel: int) -> None:
    payload = bucket_of(numel, 3, dtype).gathered
    assert on_wire(payload, None) is payload
    assert on_wire(payload, BF16).nbytes == 2 * payload.numel
    row = on_wire(payload, INT8).slice_nbytes
    needed = payload.slice_numel + 4 * -(-payload.slice_numel // 256)
    assert needed <= row < needed + 16 and row % 16 == 0


@given(st.integers(1, 2000), st.integers(2, 4), st.sampled_from(DTYPES), st.integers(-30, 8), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_quantised_elements_differ_by_half_a_scale_at_most(
    numel: int, world_size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    bucket = bucket_of(numel, world_size, dtype)
    values = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    full = (values * 2.0**exponent).to(dtype)
    full[numel:] = 0
    result, staging = gathered(bucket, INT8, full)
    _, scales = split_rows(staging.view(world_size, -1), bucket.shard_numel, INT8)
    eps = 2.0**-22 if dtype is torch.float64 else torch.finfo(dtype).eps
    for rank in range(world_size):
        shard, other = (x.split(bucket.shard_numel)[rank].split(256) for x in (full.double(), result.double()))
        for block, found, scale in zip(shard, other, scales[rank].double(), strict=True):
            assert scale >= (1 - 2.0**-22) * block.abs().max() / 127
            bound = scale / 2 * (1 + 2.0**-15) + eps * block.abs().max() + torch.finfo(dtype).tiny
            assert (block - found).abs().max() <= bound
    assert not result[numel:].any()


def test_block_of_zeros_and_the_largest_elements_stay() -> None:
    bucket = bucket_of(1024, 2)
    full = torch.zeros(bucket.numel)
    full[[0, 300, 301]] = torch.tensor([1e-30, 127.0, -127.0])
    result, _ = gathered(bucket, INT8, full)
    assert torch.equal(result[256:], full[256:])
    assert result[0] == pytest.approx(1e-30, rel=1e-6)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_element_that_is_not_finite_is_not_hidden(value: float) -> None:
    bucket = bucket_of(1024, 2)
    full = torch.ones(bucket.numel)
    full[700] = value
    result, _ = gathered(bucket, INT8, full)
    assert result[512:768].isnan().all()
    assert result[:512].eq(1).all() and result[768:].eq(1).all()
    result, _ = gathered(bucket, BF16, full)
    assert torch.equal(result, full) or result[700].isnan()


def large_allocations(call: Callable[[], object]) -> list[tuple[str, int]]:
    """What operators allocate, also inside of them."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events: Any = seen.events()
    return [(event.name, event.cpu_memory_usage) for event in events if event.cpu_memory_usage >= 2**14]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [BF16, INT8], ids=str)
def test_conversions_allocate_nothing(format: WireFormat, dtype: torch.dtype) -> None:
    bucket = bucket_of(2**16 + 5, 2, dtype)
    travels = on_wire(bucket.gathered, format)
    full, staging = torch.ones(bucket.numel, dtype=dtype), torch.ones(travels.numel, dtype=travels.dtype)
    work = torch.ones(bucket.shard_numel)
    calls = [pack(format, full[: bucket.shard_numel], staging[: travels.slice_numel], work)]
    calls.append(unpack(format, bucket, staging, full, work))
    assert [large_allocations(call) for call in calls] == [[], []]
    assert large_allocations(lambda: full.add_(full.float() + full.double())) != []


class Exchanged(PlanningComm):
    """A rank of a cluster whose messages were there from the beginning."""

    def bind_exchange(self, payload: Payload, sent: Tensor, received: Any) -> Any:
        return Bound(None, None)


@pytest.mark.parametrize("summed_numel", [2**17, 1000])
@pytest.mark.parametrize("accumulate", [False, True])
def test_sums_are_of_rounded_terms_in_order_and_allocate_nothing(
    accumulate: bool, summed_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_copies, "SUMMED_NUMEL", summed_numel)
    bucket = bucket_of(2**16, 3)
    comm, travels = Exchanged(1, Sharding.over(3), GLOO), on_wire(bucket.gradients, BF16)
    nbytes = reduce_scratch_nbytes(GLOO, comm.sharding, bucket, BF16, accumulate=accumulate)
    rooms = (1 + accumulate) * min(summed_numel, bucket.shard_numel)
    assert nbytes == 2 * travels.slice_nbytes + 4 * rooms
    scratch = torch.zeros(nbytes, dtype=torch.uint8)
    terms = torch.randn(3, bucket.shard_numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    others = scratch[: 2 * travels.slice_nbytes].view(torch.bfloat16)
    sent, shard = torch.zeros(travels.numel, dtype=torch.bfloat16), torch.full((bucket.shard_numel,), 0.5)
    sent.view(3, -1)[1], others.view(2, -1)[:] = terms[1], terms[[0, 2]]
    bound = bind_narrow_reduce(comm, bucket, BF16, sent, scratch, shard, accumulate=accumulate)
    assert bound.start is None and bound.wait is not None
    bound.wait()
    expected = ((terms[0].float() + terms[1].float()) + terms[2].float()) / 3
    assert torch.equal(shard, expected + 0.5 if accumulate else expected)
    assert large_allocations(bound.wait) == []


class Messages:
    """A process group of 3 in which messages arrive at once, but are sent only when that is waited for."""

    def __init__(self) -> None:
        self.unsent: list[Message] = []

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 3

    def recv(self, into: list[Tensor], peer: int, tag: int) -> Message:
        return Message([])

    def send(self, message: list[Tensor], peer: int, tag: int) -> Message:
        self.unsent.append(Message(self.unsent))
        return self.unsent[-1]


class Message:
    def __init__(self, unsent: list[Message]) -> None:
        self.unsent = unsent

    def wait(self) -> None:
        if self in self.unsent:
            self.unsent.remove(self)


@pytest.mark.parametrize("in_place", [False, True])
def test_row_is_sent_when_its_staging_bytes_are_free_again(in_place: bool) -> None:
    group, payload = Messages(), bucket_of(1000, 3).gathered
    comm = GlooComm(group)  # type: ignore[arg-type]
    full = torch.zeros(payload.numel)
    shard = full.split(payload.slice_numel)[1] if in_place else torch.zeros(payload.slice_numel)
    start, wait = comm.bind_gather(payload, shard, full)
    assert start is not None and wait is not None
    start()
    assert len(group.unsent) == 2
    wait()
    assert len(group.unsent) == (0 if in_place else 2)
    comm.drain()
    assert not group.unsent


def test_a_rank_that_is_alone_rounds_nothing() -> None:
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    plain = fxzero.compile(copy.deepcopy(model))
    zero = fxzero.compile(model, gather_dtype=torch.int8, reduce_dtype=torch.bfloat16)
    losses: list[Tensor] = []
    for module in (plain, zero):
        torch.manual_seed(1)
        losses.append(module(**case.batch(0, 16)).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    assert str(zero.schedule) == str(plain.schedule)
    for mine, theirs in zip(zero.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)


def test_model_as_narrow_as_the_wire_is_left_alone() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(64, 64, dtype=torch.bfloat16), torch.empty(2, 64, dtype=torch.bfloat16)
    narrow = default_passes(gather_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    assert str(plan(model, x, world_size=2, passes=narrow)) == str(plan(model, x, world_size=2))
    quantised = plan(model, x, world_size=2, passes=default_passes(gather_dtype=torch.int8))
    assert "received as int8/256" in str(quantised)


def test_staging_lies_in_the_arena_while_it_travels() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4))), torch.empty(2, 512)
    for gather_dtype, row in ((torch.bfloat16, 2.0), (torch.int8, 1 + 4 / 256)):
        passes = default_passes(bucket_bytes=2**20, prefetch_bytes=0, gather_dtype=gather_dtype)
        memory = plan(model, x, world_size=4, passes=passes).memory
        buffers = memory.footprint.arena.buffers
        staging = [buffer for buffer in buffers if buffer.kind is Kind.STAGING]
        assert {buffer.nbytes for buffer in staging} == {int(512 * 512 * row)}
        assert len(staging) == 7
        work = [buffer for buffer in buffers if buffer.kind is Kind.QUANTIZE]
        assert [buffer.nbytes for buffer in work] == [2**18] * (7 if gather_dtype is torch.int8 else 0)
        assert dict(memory.rows())["  staging, at most"]


def test_options_that_do_not_fit_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="dtype is torch.float16; gathers travel as torch.bfloat16 or torch.int8"):
        fxzero.compile(model, gather_dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype is torch.int8; reduce-scatters travel as torch.bfloat16"):
        fxzero.compile(model, reduce_dtype=torch.int8)
    with pytest.raises(ValueError, match="block_numel is 0; it must be at least 1"):
        NarrowAllGathers(torch.int8, block_numel=0)
    with pytest.raises(ValueError, match="passes= is the whole list: give default_passes"):
        fxzero.compile(model, passes=default_passes(), reduce_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gather_dtype=torch.int8 quantises whole shards"):
        fxzero.compile(model, gather_dtype=torch.int8, layout="interleaved")
    assert NarrowReduceScatters() == NarrowReduceScatters(torch.bfloat16)

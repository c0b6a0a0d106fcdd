"""The arena: random lifetimes against a checker of its own, broken plans, growth in place."""

import functools
import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzero.comm.gloo import GLOO
from fxzero.errors import MemoryOverlapError
from fxzero.graph.layout import ALIGNMENT_BYTES, LayoutName
from fxzero.graph.nodes import Role, is_gather, wait_of
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph, copy_of
from fxzero.memory.activations import activations_of
from fxzero.memory.arena_plan import arena_buffers, plan_arenas
from fxzero.memory.lifetimes import Buffer, Kind, MemoryPlan, plan_around, plan_memory
from fxzero.passes import default_passes
from fxzero.planning.run_passes import run_passes
from fxzero.runtime.storage import Arena
from tests.helpers.captured import trace
from tests.helpers.toy_step import toy_step
from tests.planning.test_golden import CASES, small_buckets

CPU = torch.device("cpu")


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Buffer]:
    number = draw(st.integers(0, 25))
    buffers: list[Buffer] = []
    for index in range(number):
        start = draw(st.integers(0, 30))
        buffers.append(
            Buffer(Kind.GATHER, f"b{index}", draw(st.integers(1, 5000)), start, start + draw(st.integers(0, 12)))
        )
    return buffers


@given(lifetimes())
@settings(max_examples=200, deadline=None)
def test_live_buffers_never_share_a_byte_and_the_peak_is_at_least_the_bound(buffers: list[Buffer]) -> None:
    plan = plan_memory(buffers)
    plan.verify()
    last = max((buffer.end for buffer in buffers), default=-1)
    for position in range(last + 1):
        live = sorted(
            (offset, offset + buffer.nbytes)
            for offset, buffer in zip(plan.offsets, buffers, strict=True)
            if buffer.start <= position <= buffer.end
        )
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(live))
        assert sum(end - begin for begin, end in live) <= plan.lower_bound_bytes <= plan.peak_bytes
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in plan.offsets)
    assert plan.offsets == plan_memory(buffers).offsets


@given(lifetimes(), lifetimes(), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_what_is_placed_around_a_plan_shares_no_byte_and_leaves_it_as_it_is(
    buffers: list[Buffer], more: list[Buffer], gap: int
) -> None:
    alone = plan_memory(buffers)
    fixed = MemoryPlan(alone.buffers, tuple(gap * ALIGNMENT_BYTES + offset for offset in alone.offsets))
    plan = plan_around(fixed, more)
    assert plan.buffers == (*buffers, *more)
    assert plan.offsets[: len(buffers)] == fixed.offsets
    assert shared_bytes(plan) == 0
    plan.verify()
    assert plan.lower_bound_bytes <= plan.peak_bytes
    assert all(offset >= 0 and offset % ALIGNMENT_BYTES == 0 for offset in plan.offsets)
    assert plan.offsets == plan_around(fixed, more).offsets


def test_what_is_placed_around_a_plan_goes_into_its_holes() -> None:
    fixed = MemoryPlan((Buffer(Kind.GATHER, "a", 512, 0, 5), Buffer(Kind.GATHER, "b", 512, 0, 5)), (0, 1024))
    more = [
        Buffer(Kind.SCRATCH, "c", 512, 3, 4),
        Buffer(Kind.SCRATCH, "d", 256, 6, 9),
        Buffer(Kind.SCRATCH, "e", 300, 4, 4),
    ]
    assert plan_around(fixed, more).offsets == (0, 1024, 512, 0, 1536)


def test_plan_with_overlapping_live_buffers_is_refused() -> None:
    first, second = Buffer(Kind.GATHER, "a", 512, 0, 5), Buffer(Kind.GRADIENT, "b", 512, 5, 9)
    with pytest.raises(MemoryOverlapError, match="gradient b at 256 and gather a at 0 are live together"):
        MemoryPlan((first, second), (0, 256)).verify()
    MemoryPlan((first, second), (0, 512)).verify()
    MemoryPlan((first, Buffer(Kind.GRADIENT, "b", 512, 6, 9)), (0, 256)).verify()


@given(lifetimes(), st.data())
@settings(max_examples=200, deadline=None)
def test_verify_refuses_exactly_the_plans_in_which_live_buffers_share_a_byte(
    buffers: list[Buffer], data: st.DataObject
) -> None:
    offsets = data.draw(st.lists(st.integers(0, 8000), min_size=len(buffers), max_size=len(buffers)))
    plan = MemoryPlan(tuple(buffers), tuple(offsets))
    if shared_bytes(plan):
        with pytest.raises(MemoryOverlapError):
            plan.verify()
    else:
        plan.verify()


def shared_bytes(plan: MemoryPlan) -> int:
    """Bytes that two buffers own at one position, painted position by position."""
    shared = 0
    for position in range(max((buffer.end for buffer in plan.buffers), default=-1) + 1):
        owners = torch.zeros(plan.peak_bytes, dtype=torch.int64)
        for buffer, offset in zip(plan.buffers, plan.offsets, strict=True):
            if buffer.start <= position <= buffer.end:
                owners[offset : offset + buffer.nbytes] += 1
        shared += int((owners > 1).sum())
    return shared


@functools.cache
def captured(name: str) -> StepGraph:
    """The step of a model before any pass."""
    build, batch, _ = CASES[name]
    with torch.device("meta"):
        return trace(build(), **batch()).step


@pytest.mark.parametrize("layout", get_args(LayoutName))
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", CASES)
def test_arenas_of_a_model_meet_the_lower_bound(name: str, world_size: int, layout: LayoutName) -> None:
    step = copy_of(captured(name))
    step.sharding, step.layout = Sharding.over(world_size), layout
    run_passes(step, small_buckets(CASES[name][2]))
    arenas = plan_arenas(step, GLOO, activations_of(step))
    assert arenas.keys() == {False, True}
    for arena in arenas.values():
        assert {start for kind, start in arena.placed if kind is Kind.GATHER} == (
            {*step.nodes(Role.ALL_GATHER)} if world_size > 1 else set()
        )
        assert arena.memory.peak_bytes == arena.memory.lower_bound_bytes


def test_what_travels_interleaved_is_planned_beside_its_bucket_at_the_copy_only() -> None:
    step = toy_step(num_layers=6)
    step.layout = "interleaved"
    run_passes(step, default_passes(bucket_bytes=2**14, prefetch_bytes=2**15, reduce_bytes=2**15))
    placed = plan_arenas(step, GLOO, activations_of(step))[False].placed
    at = step.positions()
    for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER):
        staging = placed[Kind.STAGING, start][0]
        assert (staging.start, staging.end) == (at[start], at[wait_of(start)])
        bucket = placed[Kind.GATHER if is_gather(start) else Kind.GRADIENT, start][0]
        assert (bucket.start if is_gather(start) else bucket.end) == at[wait_of(start) if is_gather(start) else start]
        assert staging.nbytes == bucket.nbytes == step.payload_of(start).nbytes


def test_schedule_of_equal_layers_meets_the_lower_bound() -> None:
    step = toy_step(num_layers=8)
    run_passes(step, default_passes(bucket_bytes=2**14, prefetch_bytes=2**15, reduce_bytes=2**15))
    buffers = arena_buffers(step, GLOO, activations_of(step), accumulate=False).values()
    plan = plan_memory([buffer for buffer in buffers if buffer.kind in (Kind.GATHER, Kind.GRADIENT)])
    assert plan.peak_bytes == plan.lower_bound_bytes


def test_views_stay_valid_when_the_arena_grows() -> None:
    arena = Arena(CPU)
    assert arena.reserve(1024)
    view = arena.view(256, 4, torch.float32)
    view.copy_(torch.arange(4.0))
    assert arena.reserve(1 << 20)
    assert not arena.reserve(1024)
    assert view.tolist() == [0.0, 1.0, 2.0, 3.0]
    arena.view(256, 4, torch.float32).fill_(7)
    assert view.tolist() == [7.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_view_lies_at_its_offset_in_bytes(dtype: torch.dtype) -> None:
    arena = Arena(CPU)
    arena.reserve(2048)
    view = arena.view(512, 16, dtype)
    assert view.dtype == dtype and view.shape == (16,)
    assert view.data_ptr() - arena.view(0, 1, torch.uint8).data_ptr() == 512

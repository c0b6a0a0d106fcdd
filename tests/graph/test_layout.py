"""Who owns which element: every element once, whatever the shapes and the number of ranks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzero.graph.layout import (
    ALIGNMENT_BYTES,
    Bucket,
    InterleavedBucket,
    Layout,
    LayoutName,
    ParamSpec,
    align,
    check_layout,
    group_into_buckets,
    make_bucket,
)
from fxzero.runtime.interleave import gathered_members

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
layouts = st.sampled_from(["contiguous", "interleaved"])
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def params(draw: st.DrawFn) -> list[ParamSpec]:
    number = draw(st.integers(1, 8))
    return [
        ParamSpec(f"p{index}", draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.booleans()))
        for index in range(number)
    ]


@given(params(), st.integers(1, 9), st.integers(1, 20_000))
@settings(max_examples=200, deadline=None)
def test_slices_of_all_ranks_partition_each_param(specs: list[ParamSpec], world_size: int, bucket_bytes: int) -> None:
    for bucket in group_into_buckets(specs, world_size, bucket_bytes):
        for param in bucket.params:
            slices = [bucket.slice_of(param, rank) for rank in range(world_size)]
            owned = [element for part in slices for element in range(part.start, part.stop)]
            assert owned == list(range(param.numel))
            for rank, part in enumerate(slices):
                if part.numel:
                    assert rank * bucket.shard_numel + part.offset == bucket.offsets[param.fqn] + part.start
                    assert part.offset >= 0 and part.offset + part.numel <= bucket.shard_numel


@given(params(), st.integers(2, 9), st.integers(1, 20_000))
@settings(max_examples=200, deadline=None)
def test_parts_of_an_interleaved_bucket_are_equal_and_partition_each_param(
    specs: list[ParamSpec], world_size: int, bucket_bytes: int
) -> None:
    for bucket in group_into_buckets(specs, world_size, bucket_bytes, "interleaved"):
        assert isinstance(bucket, InterleavedBucket)
        ends = [0] * world_size
        for param in bucket.params:
            slices = [bucket.slice_of(param, rank) for rank in range(world_size)]
            owned = [element for part in slices for element in range(part.start, part.stop)]
            assert owned == list(range(param.numel))
            sizes = [part.numel for part in slices if part.numel]
            assert all(size == bucket.part_numel(param) for size in sizes[:-1])
            assert (
                bucket.part_numel(param)
                < -(-param.numel // world_size) + ALIGNMENT_BYTES // bucket.dtypes.shard.itemsize
            )
            for rank, part in enumerate(slices):
                if part.numel:
                    assert (
                        ends[rank] <= part.offset and part.offset * bucket.dtypes.shard.itemsize % ALIGNMENT_BYTES == 0
                    )
                    ends[rank] = part.offset + part.numel
        assert max(ends) <= bucket.shard_numel


@given(params(), st.integers(1, 9), st.integers(1, 20_000), layouts)
@settings(max_examples=200, deadline=None)
def test_buckets_are_uniform_bounded_and_aligned(
    specs: list[ParamSpec], world_size: int, bucket_bytes: int, layout: LayoutName
) -> None:
    buckets = group_into_buckets(specs, world_size, bucket_bytes, layout)
    assert sorted(fqn for bucket in buckets for fqn in bucket.fqns) == sorted(spec.fqn for spec in specs)
    for bucket in buckets:
        assert len({param.bucket_key for param in bucket.params}) == 1
        assert len(bucket.params) == 1 or sum(param.nbytes for param in bucket.params) <= bucket_bytes
        assert bucket.numel == world_size * bucket.shard_numel
        assert bucket.shard_nbytes % ALIGNMENT_BYTES == 0
        assert all(offset * bucket.dtypes.shard.itemsize % ALIGNMENT_BYTES == 0 for offset in bucket.offsets.values())
        ends = [bucket.offsets[param.fqn] + param.numel for param in bucket.params]
        begins = [*list(bucket.offsets.values())[1:], bucket.numel]
        assert all(end <= begin for end, begin in zip(ends, begins, strict=True))


def test_members_do_not_overlap_when_sizes_are_odd() -> None:
    specs = tuple(ParamSpec(f"p{numel}", (numel,), torch.float32, True) for numel in (1, 63, 64, 65, 1001))
    bucket = Bucket(specs, 3)
    ends = [bucket.offsets[spec.fqn] + spec.numel for spec in specs]
    begins = [bucket.offsets[spec.fqn] for spec in specs[1:]] + [bucket.numel]
    assert all(end <= begin for end, begin in zip(ends, begins, strict=True))


@given(params(), st.integers(1, 17), st.integers(1, 20_000), layouts)
@settings(max_examples=200, deadline=None)
def test_gathered_shards_are_the_parameters(
    specs: list[ParamSpec], world_size: int, bucket_bytes: int, layout: LayoutName
) -> None:
    """Cut each parameter by its slices and put the shards of all ranks one after another: that holds the parameters."""
    for bucket in group_into_buckets(specs, world_size, bucket_bytes, layout):
        full = {param.fqn: torch.randn(param.shape).to(bucket.dtypes.shard) for param in bucket.params}
        shards = torch.full((world_size, bucket.shard_numel), torch.nan, dtype=bucket.dtypes.shard)
        for rank, param in itertools.product(range(world_size), bucket.params):
            part = bucket.slice_of(param, rank)
            piece = full[param.fqn].reshape(-1)[part.start : part.stop]
            shards[rank, part.offset : part.offset + part.numel] = piece
        for fqn, view in gathered_members(bucket, shards.view(-1)):
            assert view.shape == full[fqn].shape and torch.equal(view, full[fqn])


@given(params(), st.integers(1, 9), st.integers(1, 20_000))
@settings(max_examples=100, deadline=None)
def test_buckets_keep_the_order_and_are_no_more_than_needed(
    specs: list[ParamSpec], world_size: int, bucket_bytes: int
) -> None:
    layout = Layout(group_into_buckets(specs, world_size, bucket_bytes), world_size)
    position = {param.fqn: index for index, param in enumerate(specs)}
    members = [[position[fqn] for fqn in bucket.fqns] for bucket in layout.buckets]
    assert all(each == sorted(each) for each in members)
    assert [each[0] for each in members] == sorted(each[0] for each in members)
    for one, two in itertools.pairwise(layout.buckets):
        same = one.params[0].bucket_key == two.params[0].bucket_key
        fits = sum(param.nbytes for param in one.params) + two.params[0].nbytes <= bucket_bytes
        assert not (same and fits), "two buckets where one would do"
    assert layout.bucket_of.keys() == position.keys()
    assert all(fqn in bucket.fqns for fqn, bucket in layout.bucket_of.items())
    assert layout.shard_nbytes == sum(bucket.shard_nbytes for bucket in layout.buckets)


@given(params(), st.integers(1, 17))
@settings(max_examples=100, deadline=None)
def test_padding_is_less_than_one_alignment_for_each_member_and_rank(specs: list[ParamSpec], world_size: int) -> None:
    for bucket in group_into_buckets(specs, world_size, 1 << 20):
        padding = bucket.gathered.nbytes - sum(param.nbytes for param in bucket.params)
        assert 0 <= padding < ALIGNMENT_BYTES * (len(bucket.params) + world_size)
    for bucket in group_into_buckets(specs, world_size, 1 << 20, "interleaved"):
        padding = bucket.gathered.nbytes - sum(param.nbytes for param in bucket.params)
        assert 0 <= padding <= ALIGNMENT_BYTES * len(bucket.params) * world_size


def test_frozen_parameter_between_trained_ones_cuts_nothing() -> None:
    specs = [ParamSpec(name, (4,), torch.float32, name != "frozen") for name in ("first", "frozen", "last")]
    buckets = group_into_buckets(specs, 2, 1 << 20)
    assert [bucket.fqns for bucket in buckets] == [("first", "last"), ("frozen",)]


def test_a_rank_that_is_alone_has_nothing_to_interleave() -> None:
    specs = [ParamSpec("p", (5,), torch.float32, True)]
    assert make_bucket(specs, 1, "interleaved") == Bucket(tuple(specs), 1)
    assert make_bucket(specs, 2, "interleaved") != make_bucket(specs, 2)


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout is 'strided'; it must be one of 'contiguous', 'interleaved'"):
        check_layout("strided")


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_align_gives_the_least_multiple(value: int, multiple: int) -> None:
    assert value <= align(value, multiple) < value + multiple
    assert align(value, multiple) % multiple == 0

"""Who owns which element: every element once, whatever the shapes and the number of ranks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzero.layout import ALIGNMENT_BYTES, Bucket, ParamSpec, group_into_buckets

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
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


@given(params(), st.integers(1, 9), st.integers(1, 20_000))
@settings(max_examples=200, deadline=None)
def test_buckets_are_uniform_bounded_and_aligned(specs: list[ParamSpec], world_size: int, bucket_bytes: int) -> None:
    buckets = group_into_buckets(specs, world_size, bucket_bytes)
    assert sorted(fqn for bucket in buckets for fqn in bucket.fqns) == sorted(spec.fqn for spec in specs)
    for bucket in buckets:
        assert len({param.bucket_key for param in bucket.params}) == 1
        assert len(bucket.params) == 1 or sum(param.nbytes for param in bucket.params) <= bucket_bytes
        assert bucket.numel == world_size * bucket.shard_numel
        assert bucket.shard_nbytes % ALIGNMENT_BYTES == 0
        assert all(offset * bucket.dtype.itemsize % ALIGNMENT_BYTES == 0 for offset in bucket.offsets.values())


def test_members_do_not_overlap_when_sizes_are_odd() -> None:
    specs = tuple(ParamSpec(f"p{numel}", (numel,), torch.float32, True) for numel in (1, 63, 64, 65, 1001))
    bucket = Bucket(specs, 3)
    ends = [bucket.offsets[spec.fqn] + spec.numel for spec in specs]
    begins = [bucket.offsets[spec.fqn] for spec in specs[1:]] + [bucket.numel]
    assert all(end <= begin for end, begin in zip(ends, begins, strict=True))

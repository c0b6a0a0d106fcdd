"""The copies of the interleaved layout move every element to its place, and nothing but zeros beside them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzero.graph.layout import InterleavedBucket, ParamSpec
from fxzero.runtime.interleave import copy_in, copy_out
from fxzero.runtime.shards import unflatten

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@st.composite
def buckets(draw: st.DrawFn) -> InterleavedBucket:
    shapes = draw(st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=5))
    dtype = draw(st.sampled_from(DTYPES))
    specs = tuple(ParamSpec(f"p{index}", shape, dtype, True) for index, shape in enumerate(shapes))
    return InterleavedBucket(specs, draw(st.integers(2, 9)))


def values(bucket: InterleavedBucket) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Parameters; the bucket that holds them, zeros between; the shards of all ranks, cut one by one, zeros between."""
    params = {param.fqn: torch.randn(param.shape).to(bucket.dtypes.shard) for param in bucket.params}
    full = torch.zeros(bucket.numel, dtype=bucket.dtypes.shard)
    for fqn, view in unflatten(bucket, full).items():
        view.copy_(params[fqn])
    shards = torch.zeros(bucket.shard_ranks, bucket.shard_numel, dtype=bucket.dtypes.shard)
    for rank, shard in enumerate(shards):
        for param in bucket.params:
            part = bucket.slice_of(param, rank)
            shard[part.offset :][: part.numel].copy_(params[param.fqn].reshape(-1)[part.start : part.stop])
    return params, full, shards.view(-1)


@given(buckets())
@settings(max_examples=200, deadline=None)
def test_gathered_shards_are_copied_out_to_the_parameters(bucket: InterleavedBucket) -> None:
    params, _, staging = values(bucket)
    full = torch.full((bucket.numel,), torch.nan, dtype=bucket.dtypes.shard)
    copy_out(bucket, staging, full)()
    for fqn, view in unflatten(bucket, full).items():
        assert torch.equal(view, params[fqn])


@given(buckets())
@settings(max_examples=200, deadline=None)
def test_gradients_are_copied_in_between_zeros_whatever_was_there(bucket: InterleavedBucket) -> None:
    _, full, expected = values(bucket)
    staging = torch.full((bucket.numel,), torch.nan, dtype=bucket.dtypes.shard)
    copy_in(bucket, full, staging)()
    assert torch.equal(staging, expected)

import pytest
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, members
from fxzero.graph.schedule_text import format_schedule
from fxzero.passes import BucketAllGathers, InsertAllGathers, ReleaseParams, RematerializeViews
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

KIB = 1024


def test_neighbours_share_a_gather_within_the_size() -> None:
    step = toy_step()
    run_passes(step, [RematerializeViews(), InsertAllGathers(), BucketAllGathers(bucket_bytes=32 * KIB)])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  4 all_gathers, 84 KiB received  0 reduce_scatters, 0 B sent  gathered peak 48 KiB
all_gather  layers.0.w +1     32 KiB
wait        layers.0.w +1
compute     layers.0           2 ops
compute     layers.1           2 ops
all_gather  layers.2.w        16 KiB
wait        layers.2.w
compute     layers.2           2 ops
--- end of forward ---
compute     layers.2           2 ops
all_gather  layers.2.w        16 KiB
wait        layers.2.w
compute     layers.2           3 ops
compute     layers.1           2 ops
all_gather  layers.0.w +1     32 KiB
wait        layers.0.w +1
compute     layers.1           3 ops
compute     layers.0           2 ops""",
    )


def test_nothing_changes_when_each_param_fills_a_bucket() -> None:
    step = toy_step()
    run_passes(step, [RematerializeViews(), InsertAllGathers()])
    before = format_schedule(step)
    BucketAllGathers(bucket_bytes=16 * KIB)(step)
    assert format_schedule(step) == before


def test_frozen_and_trained_params_are_kept_apart() -> None:
    step = toy_step(frozen=1)
    run_passes(step, [RematerializeViews(), InsertAllGathers(), BucketAllGathers()])
    buckets = {members(start) for start in step.nodes(Role.ALL_GATHER)}
    assert buckets == {("layers.0.w", "layers.2.w"), ("layers.1.w",)}


def test_given_buckets_are_kept() -> None:
    step = toy_step()
    given = step.fixed_buckets = (("layers.2.w", "layers.0.w"), ("layers.1.w",))
    run_passes(step, [RematerializeViews(), InsertAllGathers(), BucketAllGathers()])
    assert {members(start) for start in step.nodes(Role.ALL_GATHER)} == set(given)


def test_order_mistake_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertAllGathers first") as caught:
        run_passes(toy_step(), [RematerializeViews(), BucketAllGathers()])
    assert "In pass 2 of 2: BucketAllGathers(" in caught.value.__notes__[0]


def test_bucketing_behind_releases_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run ReleaseParams after this pass"):
        run_passes(toy_step(), [RematerializeViews(), InsertAllGathers(), ReleaseParams(), BucketAllGathers()])


def test_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes is 0; it must be at least 1"):
        BucketAllGathers(bucket_bytes=0)

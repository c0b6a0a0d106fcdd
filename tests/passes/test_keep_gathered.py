import pytest
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, members
from fxzero.graph.schedule_text import format_schedule, totals
from fxzero.passes import InsertAllGathers, KeepGathered, ReleaseParams, RematerializeViews, default_passes
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

BEFORE = (RematerializeViews(), InsertAllGathers())


def test_buckets_used_first_in_backward_are_kept_within_the_budget() -> None:
    step = toy_step()
    run_passes(step, [*BEFORE, KeepGathered(max_kept_bytes=2**14)])
    assert step.kept == {("layers.2.w",)}
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  4 all_gathers, 56 KiB received  0 reduce_scatters, 0 B sent  gathered peak 48 KiB  kept 16 KiB
all_gather  layers.0.w     16 KiB
wait        layers.0.w
compute     layers.0        2 ops
all_gather  layers.1.w     16 KiB
wait        layers.1.w
compute     layers.1        2 ops
all_gather  layers.2.w     16 KiB
wait        layers.2.w
compute     layers.2        2 ops
--- end of forward ---
compute     layers.2        5 ops
compute     layers.1        2 ops
all_gather  layers.1.w     16 KiB
wait        layers.1.w
compute     layers.1        3 ops
compute     layers.0        2 ops""",
    )


def test_all_are_kept_without_a_budget() -> None:
    step = toy_step()
    run_passes(step, default_passes(bucket_bytes=2**14, max_kept_bytes=None))
    assert totals(step).num_all_gathers == 3
    assert totals(step).gathered_peak_bytes == 3 * 2**14


def test_nothing_changes_with_a_budget_of_zero_or_without_backward() -> None:
    for step in (toy_step(), toy_step(backward=False)):
        run_passes(step, BEFORE)
        before = str(step.graph)
        KeepGathered(max_kept_bytes=0 if step.has_backward else None)(step)
        assert str(step.graph) == before


def test_order_mistake_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertAllGathers first"):
        KeepGathered()(toy_step())


def test_keeping_behind_releases_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run ReleaseParams after this pass"):
        run_passes(toy_step(), [*BEFORE, ReleaseParams(), KeepGathered()])


def test_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="max_kept_bytes is -1; it must be at least 0, or None"):
        KeepGathered(max_kept_bytes=-1)


def test_buckets_that_stay_until_the_shards_change_are_read_in_backward() -> None:
    step = toy_step()
    run_passes(step, [*BEFORE, KeepGathered(buckets=(), resident=(("layers.1.w",),))])
    gathers = [fqns for fqns in map(members, step.nodes(Role.ALL_GATHER)) if fqns == ("layers.1.w",)]
    assert len(gathers) == 1

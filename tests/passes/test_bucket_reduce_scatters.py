import pytest
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, members
from fxzero.graph.schedule_text import format_schedule
from fxzero.passes import (
    BucketAllGathers,
    BucketReduceScatters,
    InsertAllGathers,
    InsertReduceScatters,
    RematerializeViews,
)
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

BEFORE = (RematerializeViews(), InsertAllGathers(), InsertReduceScatters())


def test_gradients_of_a_bucket_are_reduced_together_when_the_last_is_ready() -> None:
    step = toy_step()
    run_passes(step, [*BEFORE, BucketAllGathers(bucket_bytes=2**15), BucketReduceScatters()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  4 all_gathers, 84 KiB received  2 reduce_scatters, 42 KiB sent  gathered peak 48 KiB
all_gather      layers.0.w +1     32 KiB
wait            layers.0.w +1
compute         layers.0           2 ops
compute         layers.1           2 ops
all_gather      layers.2.w        16 KiB
wait            layers.2.w
compute         layers.2           2 ops
--- end of forward ---
compute         layers.2           2 ops
reduce_scatter  layers.2.w        16 KiB
wait_reduce     layers.2.w
all_gather      layers.2.w        16 KiB
wait            layers.2.w
compute         layers.2           3 ops
compute         layers.1           2 ops
all_gather      layers.0.w +1     32 KiB
wait            layers.0.w +1
compute         layers.1           3 ops
compute         layers.0           2 ops
reduce_scatter  layers.0.w +1     32 KiB
wait_reduce     layers.0.w +1""",
    )


def test_member_that_the_step_does_not_reach_gets_zeros() -> None:
    step = toy_step()
    grads = {fqn: grad for fqn, grad in step.grads.items() if fqn != "layers.1.w"}
    step.set_output(step.model_outputs, grads, step.input_grads)
    run_passes(step, [*BEFORE, BucketAllGathers(), BucketReduceScatters()])
    (start,) = step.nodes(Role.REDUCE_SCATTER)
    assert members(start) == ("layers.0.w", "layers.1.w", "layers.2.w")
    assert "layers.1.w" not in step.grads


def test_nothing_changes_when_gathers_are_not_bucketed() -> None:
    step = toy_step()
    run_passes(step, BEFORE)
    before = format_schedule(step)
    BucketReduceScatters()(step)
    assert format_schedule(step) == before


def test_order_mistake_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertReduceScatters first"):
        BucketReduceScatters()(toy_step())


def test_bucketing_twice_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run BucketReduceScatters once"):
        run_passes(toy_step(), [*BEFORE, BucketAllGathers(), BucketReduceScatters(), BucketReduceScatters()])

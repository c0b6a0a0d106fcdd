import pytest
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role
from fxzero.graph.schedule_text import format_diff, format_schedule
from fxzero.passes import InsertAllGathers, PrefetchAllGathers, RematerializeViews
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

BEFORE = (RematerializeViews(), InsertAllGathers())


def test_gathers_start_early_within_the_budget() -> None:
    step = toy_step(backward=False, num_layers=4)
    run_passes(step, BEFORE)
    before = format_schedule(step)
    PrefetchAllGathers(max_inflight_bytes=2**15)(step)
    assert_expected_inline(
        format_diff(before, format_schedule(step)),
        """\
--- before
+++ after
@@ -1,13 +1,13 @@
 world_size=8  4 all_gathers, 56 KiB received  gathered peak 64 KiB
 all_gather  layers.0.w     16 KiB
+all_gather  layers.1.w     16 KiB
 wait        layers.0.w
 compute     layers.0        2 ops
-all_gather  layers.1.w     16 KiB
+all_gather  layers.2.w     16 KiB
 wait        layers.1.w
 compute     layers.1        2 ops
-all_gather  layers.2.w     16 KiB
+all_gather  layers.3.w     16 KiB
 wait        layers.2.w
 compute     layers.2        2 ops
-all_gather  layers.3.w     16 KiB
 wait        layers.3.w
 compute     layers.3        2 ops""",
    )


def test_one_gather_is_always_ahead_whatever_the_budget() -> None:
    step = toy_step(backward=False)
    run_passes(step, [*BEFORE, PrefetchAllGathers(max_inflight_bytes=0)])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  3 all_gathers, 42 KiB received  gathered peak 48 KiB
all_gather  layers.0.w     16 KiB
all_gather  layers.1.w     16 KiB
wait        layers.0.w
compute     layers.0        2 ops
all_gather  layers.2.w     16 KiB
wait        layers.1.w
compute     layers.1        2 ops
wait        layers.2.w
compute     layers.2        2 ops""",
    )


def test_nothing_moves_when_there_is_one_gather() -> None:
    step = toy_step(backward=False, num_layers=1)
    run_passes(step, BEFORE)
    before = format_schedule(step)
    PrefetchAllGathers()(step)
    assert format_schedule(step) == before


def test_nothing_moves_in_backward_when_only_forward_gathers() -> None:
    step = toy_step(num_layers=1)
    run_passes(step, [*BEFORE, PrefetchAllGathers()])
    assert len(step.nodes(Role.ALL_GATHER)) == 1 and step.has_backward


def test_order_mistake_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertAllGathers first"):
        PrefetchAllGathers()(toy_step())


def test_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="max_inflight_bytes is -1; it must be at least 0"):
        PrefetchAllGathers(max_inflight_bytes=-1)

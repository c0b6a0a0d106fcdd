import pytest
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.schedule_text import format_schedule
from fxzero.passes import InsertReduceScatters, SinkWaits
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step


def test_reductions_are_waited_for_at_the_end_when_the_budget_allows() -> None:
    step = toy_step()
    run_passes(step, [InsertReduceScatters(), SinkWaits()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  0 all_gathers, 0 B received  3 reduce_scatters, 42 KiB sent  gathered peak 0 B
compute         layers.0        2 ops
compute         layers.1        2 ops
compute         layers.2        2 ops
--- end of forward ---
compute         layers.2        2 ops
reduce_scatter  layers.2.w     16 KiB
compute         layers.2        2 ops
compute         layers.1        2 ops
reduce_scatter  layers.1.w     16 KiB
compute         layers.1        2 ops
compute         layers.0        2 ops
reduce_scatter  layers.0.w     16 KiB
wait_reduce     layers.2.w
wait_reduce     layers.1.w
wait_reduce     layers.0.w""",
    )


def test_oldest_reduction_is_waited_for_when_the_budget_needs_its_memory() -> None:
    step = toy_step()
    run_passes(step, [InsertReduceScatters(), SinkWaits(max_inflight_bytes=2**15)])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  0 all_gathers, 0 B received  3 reduce_scatters, 42 KiB sent  gathered peak 0 B
compute         layers.0        2 ops
compute         layers.1        2 ops
compute         layers.2        2 ops
--- end of forward ---
compute         layers.2        2 ops
reduce_scatter  layers.2.w     16 KiB
compute         layers.2        2 ops
compute         layers.1        2 ops
reduce_scatter  layers.1.w     16 KiB
compute         layers.1        2 ops
compute         layers.0        2 ops
wait_reduce     layers.2.w
reduce_scatter  layers.0.w     16 KiB
wait_reduce     layers.1.w
wait_reduce     layers.0.w""",
    )


def test_nothing_changes_the_second_time() -> None:
    step = toy_step()
    run_passes(step, [InsertReduceScatters(), SinkWaits()])
    before = str(step.graph)
    SinkWaits()(step)
    assert str(step.graph) == before


def test_order_mistake_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertReduceScatters first"):
        SinkWaits()(toy_step())

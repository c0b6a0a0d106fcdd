import pytest
import torch
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.schedule_text import format_schedule, totals
from fxzero.passes import BucketReduceScatters, InsertReduceScatters, NarrowReduceScatters
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step


def test_reduce_scatters_move_half_the_bytes() -> None:
    step = toy_step(num_layers=2)
    run_passes(step, [InsertReduceScatters(), NarrowReduceScatters()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  0 all_gathers, 0 B received  2 reduce_scatters, 14 KiB sent as bfloat16  gathered peak 0 B
compute         layers.0        2 ops
compute         layers.1        2 ops
--- end of forward ---
compute         layers.1        2 ops
reduce_scatter  layers.1.w      8 KiB  bfloat16
wait_reduce     layers.1.w
compute         layers.1        2 ops
compute         layers.0        2 ops
reduce_scatter  layers.0.w      8 KiB  bfloat16
wait_reduce     layers.0.w""",
    )
    assert totals(step).reduced_bytes == 2 * 7 * 512 * torch.bfloat16.itemsize


def test_nothing_changes_alone_without_backward_or_under_no_sync() -> None:
    unsynchronised = toy_step()
    unsynchronised.synchronize = False
    for step in (toy_step(world_size=1), toy_step(backward=False), unsynchronised):
        run_passes(step, [InsertReduceScatters()])
        before = str(step.graph)
        NarrowReduceScatters()(step)
        assert str(step.graph) == before


def test_order_mistakes_are_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertReduceScatters first"):
        NarrowReduceScatters()(toy_step())
    step = toy_step()
    run_passes(step, [InsertReduceScatters(), NarrowReduceScatters()])
    with pytest.raises(PassOrderError, match="run NarrowReduceScatters after this pass"):
        BucketReduceScatters()(step)

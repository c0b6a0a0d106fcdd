import pytest
import torch
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError, WireFormatError
from fxzero.graph.nodes import Role, wire_format
from fxzero.graph.schedule_text import format_schedule, format_table, totals
from fxzero.graph.verify import collectives
from fxzero.graph.wire import WireFormat
from fxzero.passes import BucketAllGathers, InsertAllGathers, NarrowAllGathers, RematerializeViews, default_passes
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

BEFORE = (RematerializeViews(), InsertAllGathers())


def test_gathers_move_half_the_bytes_in_bfloat16() -> None:
    step = toy_step(num_layers=2)
    run_passes(step, [*BEFORE, NarrowAllGathers()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  3 all_gathers, 21 KiB received as bfloat16  0 reduce_scatters, 0 B sent  gathered peak 32 KiB
all_gather  layers.0.w      8 KiB  bfloat16
wait        layers.0.w
compute     layers.0        2 ops
all_gather  layers.1.w      8 KiB  bfloat16
wait        layers.1.w
compute     layers.1        2 ops
--- end of forward ---
compute     layers.1        2 ops
all_gather  layers.1.w      8 KiB  bfloat16
wait        layers.1.w
compute     layers.1        3 ops
compute     layers.0        2 ops""",
    )
    assert collectives(step)[0] == "all_gather layers.0.w as bfloat16"


def test_gathers_move_a_quarter_and_the_scales_in_int8() -> None:
    step = toy_step(num_layers=2)
    before = totals(step)
    run_passes(step, [*BEFORE, NarrowAllGathers(torch.int8)])
    assert [wire_format(start) for start in step.nodes(Role.ALL_GATHER)] == [WireFormat(torch.int8, 256)] * 3
    rows = 512 + 2 * 4 + 8  # elements of a shard, its scales, and what pads it to 16 bytes
    assert totals(step).gathered_bytes == 3 * 7 * rows
    assert before.gathered_bytes == 0
    assert "4.1 KiB int8/256" in format_table(step)


def test_a_rank_that_is_alone_and_narrow_buckets_are_left_alone() -> None:
    for step in (toy_step(world_size=1), toy_step(width=0)):
        run_passes(step, BEFORE)
        before = str(step.graph)
        NarrowAllGathers(torch.int8)(step)
        assert str(step.graph) == before


def test_order_mistakes_are_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertAllGathers first"):
        NarrowAllGathers()(toy_step())
    step = toy_step()
    run_passes(step, [*BEFORE, NarrowAllGathers()])
    with pytest.raises(PassOrderError, match="run NarrowAllGathers after this pass"):
        BucketAllGathers()(step)


def test_an_interleaved_layout_cannot_be_quantised() -> None:
    step = toy_step()
    step.layout = "interleaved"
    with pytest.raises(WireFormatError, match="an interleaved layout cannot be quantised"):
        run_passes(step, default_passes(gather_dtype=torch.int8))

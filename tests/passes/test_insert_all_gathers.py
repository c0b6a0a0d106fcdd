from expecttest import assert_expected_inline

from fxzero.graph.schedule_text import format_schedule
from fxzero.passes import InsertAllGathers, RematerializeViews
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step


def test_each_param_is_gathered_once_per_phase() -> None:
    step = toy_step(num_layers=2)
    run_passes(step, [RematerializeViews(), InsertAllGathers()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  3 all_gathers, 42 KiB received  0 reduce_scatters, 0 B sent  gathered peak 32 KiB
all_gather  layers.0.w     16 KiB
wait        layers.0.w
compute     layers.0        2 ops
all_gather  layers.1.w     16 KiB
wait        layers.1.w
compute     layers.1        2 ops
--- end of forward ---
compute     layers.1        2 ops
all_gather  layers.1.w     16 KiB
wait        layers.1.w
compute     layers.1        3 ops
compute     layers.0        2 ops""",
    )


def test_nothing_is_inserted_when_all_is_gathered_already() -> None:
    step = toy_step()
    InsertAllGathers()(step)
    before = str(step.graph)
    InsertAllGathers()(step)
    assert str(step.graph) == before

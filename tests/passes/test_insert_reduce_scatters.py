from expecttest import assert_expected_inline

from fxzero.graph.nodes import Role
from fxzero.graph.schedule_text import format_schedule
from fxzero.passes import InsertReduceScatters
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step


def test_each_gradient_is_reduced_where_it_is_ready() -> None:
    step = toy_step(num_layers=2)
    run_passes(step, [InsertReduceScatters()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  0 all_gathers, 0 B received  2 reduce_scatters, 28 KiB sent  gathered peak 0 B
compute         layers.0        2 ops
compute         layers.1        2 ops
--- end of forward ---
compute         layers.1        2 ops
reduce_scatter  layers.1.w     16 KiB
wait_reduce     layers.1.w
compute         layers.1        2 ops
compute         layers.0        2 ops
reduce_scatter  layers.0.w     16 KiB
wait_reduce     layers.0.w""",
    )


def test_gradients_stay_unsharded_under_no_sync() -> None:
    step = toy_step(num_layers=2)
    step.synchronize = False
    run_passes(step, [InsertReduceScatters()])
    assert not step.nodes(Role.REDUCE_SCATTER)
    assert len(step.nodes(Role.WRITE_GRAD)) == 2


def test_forward_only_step_is_left_alone() -> None:
    step = toy_step(backward=False)
    before = str(step.graph)
    InsertReduceScatters()(step)
    assert str(step.graph) == before

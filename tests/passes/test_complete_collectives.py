import pytest
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.needs import needs_of
from fxzero.graph.nodes import Role, grad_of
from fxzero.graph.recipe import Need
from fxzero.graph.schedule_text import format_schedule
from fxzero.passes import CompleteCollectives, InsertAllGathers, InsertReduceScatters, RematerializeViews
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

BEFORE = (RematerializeViews(), InsertAllGathers(), InsertReduceScatters())


def whole_list() -> tuple[Need, ...]:
    """What a step of three layers needs."""
    step = toy_step(num_layers=3)
    run_passes(step, BEFORE)
    return needs_of(step)


def test_what_only_others_need_is_gathered_and_reduced_too() -> None:
    step = toy_step(num_layers=3, frozen=1)
    run_passes(step, [*BEFORE, CompleteCollectives(whole_list())])
    assert needs_of(step) == whole_list()
    assert [grad_of(slot) is None for slot in step.nodes(Role.WRITE_GRAD)] == [False, True, False]
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  5 all_gathers, 70 KiB received  3 reduce_scatters, 42 KiB sent  gathered peak 48 KiB
all_gather      layers.0.w     16 KiB
wait            layers.0.w
compute         layers.0        2 ops
all_gather      layers.1.w     16 KiB
wait            layers.1.w
compute         layers.1        2 ops
all_gather      layers.2.w     16 KiB
wait            layers.2.w
compute         layers.2        2 ops
--- end of forward ---
compute         layers.2        2 ops
reduce_scatter  layers.2.w     16 KiB
wait_reduce     layers.2.w
all_gather      layers.2.w     16 KiB
wait            layers.2.w
compute         layers.2        3 ops
reduce_scatter  layers.1.w     16 KiB
wait_reduce     layers.1.w
all_gather      layers.1.w     16 KiB
wait            layers.1.w
compute         layers.1        3 ops
compute         layers.0        2 ops
reduce_scatter  layers.0.w     16 KiB
wait_reduce     layers.0.w""",
    )


def test_nothing_changes_where_nothing_is_missing() -> None:
    step = toy_step(num_layers=3)
    run_passes(step, BEFORE)
    before = format_schedule(step)
    CompleteCollectives(whole_list())(step)
    CompleteCollectives()(step)
    assert format_schedule(step) == before


def test_gathers_move_up_and_reductions_down_where_the_list_has_another_order() -> None:
    gathers = [need for need in whole_list() if need.role == "all_gather"]
    order = (*sorted(gathers, key=lambda need: need.phase == "backward"), *set(whole_list()).difference(gathers))
    step = toy_step(num_layers=3)
    run_passes(step, [*BEFORE, CompleteCollectives(order)])
    assert needs_of(step) == order


def test_no_gradient_is_reduced_under_no_sync() -> None:
    step = toy_step(num_layers=3, frozen=1)
    step.synchronize = False
    run_passes(step, [*BEFORE, CompleteCollectives(whole_list())])
    assert len(step.nodes(Role.WRITE_GRAD)) == 2 and not step.nodes(Role.REDUCE_SCATTER)


def test_a_step_that_needs_more_than_the_list_is_refused() -> None:
    step = toy_step(num_layers=3)
    with pytest.raises(PassOrderError, match=r"no all_gather of layers\.1\.w in forward"):
        run_passes(step, [*BEFORE, CompleteCollectives(whole_list()[:1])])

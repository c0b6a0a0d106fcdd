import pytest
from expecttest import assert_expected_inline

from fxzero.errors import PassOrderError
from fxzero.graph.schedule_text import format_schedule
from fxzero.passes import InsertAllGathers, ReleaseParams, RematerializeViews
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step


def test_bucket_is_released_after_the_last_reader_of_a_view() -> None:
    step = toy_step(num_layers=2, backward=False)
    run_passes(step, [RematerializeViews(), InsertAllGathers(), ReleaseParams()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8  2 all_gathers, 28 KiB received  gathered peak 16 KiB
all_gather  layers.0.w     16 KiB
wait        layers.0.w
compute     layers.0        2 ops
release     layers.0.w
all_gather  layers.1.w     16 KiB
wait        layers.1.w
compute     layers.1        2 ops
release     layers.1.w""",
    )


def test_nothing_changes_the_second_time() -> None:
    step = toy_step(backward=False)
    run_passes(step, [RematerializeViews(), InsertAllGathers(), ReleaseParams()])
    before = str(step.graph)
    ReleaseParams()(step)
    assert str(step.graph) == before


def test_order_mistake_is_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertAllGathers first"):
        ReleaseParams()(toy_step())

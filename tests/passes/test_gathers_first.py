import pytest

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, members
from fxzero.graph.schedule_text import format_schedule
from fxzero.graph.step import StepGraph
from fxzero.passes import GathersFirst, InsertAllGathers, InsertReduceScatters, RematerializeViews, SinkWaits
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

BEFORE = (RematerializeViews(), InsertAllGathers(), InsertReduceScatters())
LATER = ((("layers.2.w",), ("layers.1.w",)),)


def starts_of_backward(step: StepGraph) -> list[tuple[str, str]]:
    boundary = step.end_forward
    assert boundary is not None
    nodes = [node for node in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER) if node > boundary]
    return [("gather" if node in step.nodes(Role.ALL_GATHER) else "reduce", members(node)[0]) for node in nodes]


def test_reduction_starts_right_behind_the_gather() -> None:
    before, after = toy_step(), toy_step()
    run_passes(before, BEFORE)
    run_passes(after, [*BEFORE, GathersFirst(LATER), SinkWaits()])
    two, one = ("reduce", "layers.2.w"), ("gather", "layers.1.w")
    told = starts_of_backward(before)
    assert told.index(two) < told.index(one)
    moved = starts_of_backward(after)
    assert moved.index(two) == moved.index(one) + 1
    assert sorted(moved) == sorted(told)


@pytest.mark.parametrize(
    "later",
    [(), ((("layers.1.w",), ("layers.2.w",)),), ((("nobody",), ("layers.1.w",)),), ((("layers.2.w",), ("nobody",)),)],
    ids=["no pairs", "gather starts first", "no such reduction", "no such gather"],
)
def test_nothing_changes_when_no_reduction_is_in_the_way(
    later: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...],
) -> None:
    before, after = toy_step(), toy_step()
    run_passes(before, BEFORE)
    run_passes(after, [*BEFORE, GathersFirst(later)])
    assert format_schedule(before) == format_schedule(after)


def test_nothing_changes_without_backward() -> None:
    step = toy_step(backward=False)
    run_passes(step, [*BEFORE, GathersFirst(LATER)])
    assert not step.nodes(Role.REDUCE_SCATTER)


def test_refused_before_there_are_reductions() -> None:
    with pytest.raises(PassOrderError, match="InsertReduceScatters"):
        run_passes(toy_step(), [RematerializeViews(), InsertAllGathers(), GathersFirst(LATER)])

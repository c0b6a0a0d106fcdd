import pytest
import torch
from expecttest import assert_expected_inline

from fxzero.errors import InsideGatherError, PassOrderError
from fxzero.graph.nodes import Role, is_inside, set_inside, set_wire_format, wire_format
from fxzero.graph.schedule_text import format_schedule, format_table, totals
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph
from fxzero.graph.verify import collectives, verify_graph
from fxzero.graph.wire import WireFormat
from fxzero.passes import (
    BucketAllGathers,
    InsertAllGathers,
    KeepGathered,
    LocalizeAllGathers,
    RematerializeViews,
    default_passes,
)
from fxzero.planning.run_passes import run_passes
from tests.helpers.toy_step import toy_step

BEFORE = (RematerializeViews(), InsertAllGathers())


def shared_step(num_layers: int = 2) -> StepGraph:
    """Eight ranks in two nodes that share the shards."""
    step = toy_step(num_layers)
    step.sharding = Sharding.over(8, 2, "shard")
    return step


def test_gathers_in_backward_stay_inside_the_node() -> None:
    step = shared_step()
    run_passes(step, [*BEFORE, LocalizeAllGathers()])
    assert_expected_inline(
        format_schedule(step),
        """\
world_size=8 (2 nodes of 4, sharded across)  3 all_gathers, 36 KiB received inside, 4 KiB across  0 reduce_scatters, 0 B sent inside, 0 B across  gathered peak 32 KiB
all_gather  layers.0.w     16 KiB  across
wait        layers.0.w
compute     layers.0        2 ops
all_gather  layers.1.w     16 KiB  across
wait        layers.1.w
compute     layers.1        2 ops
--- end of forward ---
compute     layers.1        2 ops
all_gather  layers.1.w     16 KiB
wait        layers.1.w
compute     layers.1        3 ops
compute     layers.0        2 ops""",  # noqa: E501
    )
    assert "16 KiB across" in format_table(step)
    assert collectives(step)[-2:] == ["all_gather layers.1.w", "all_gather layers.1.w inside"]
    assert [payload.slice_nbytes for payload in step.secondaries().values()] == [16 * 1024 // 4]
    assert totals(step).across_bytes == totals(step).gathered_across_bytes == 2 * 16 * 1024 // 8


def test_a_bucket_that_is_kept_has_no_secondary_shard() -> None:
    step = shared_step()
    run_passes(step, [*BEFORE, KeepGathered(), LocalizeAllGathers()])
    assert step.secondaries() == {}


def test_one_group_and_replicas_are_left_alone() -> None:
    replicas = shared_step()
    replicas.sharding = Sharding.over(8, 2)
    for step in (toy_step(), replicas):
        run_passes(step, BEFORE)
        before = str(step.graph)
        LocalizeAllGathers()(step)
        assert str(step.graph) == before


def test_a_type_for_the_wire_leaves_a_gather_inside() -> None:
    step = shared_step()
    run_passes(step, default_passes(gather_dtype=torch.bfloat16))
    again = [start for start in step.nodes(Role.ALL_GATHER) if is_inside(start)]
    assert [wire_format(start) for start in again] == [WireFormat(torch.bfloat16)]
    assert [payload.dtype for payload in step.secondaries().values()] == [torch.bfloat16]


def test_order_mistakes_are_refused() -> None:
    with pytest.raises(PassOrderError, match="run InsertAllGathers first"):
        LocalizeAllGathers()(toy_step())
    step = shared_step()
    run_passes(step, [*BEFORE, LocalizeAllGathers()])
    with pytest.raises(PassOrderError, match="run LocalizeAllGathers after this pass"):
        BucketAllGathers()(step)


def test_a_gather_of_secondary_shards_that_are_not_there_is_refused() -> None:
    step = shared_step()
    run_passes(step, BEFORE)
    first, _, again = step.nodes(Role.ALL_GATHER)
    set_inside(first)
    with pytest.raises(
        InsideGatherError, match="'all_gather layers.0.w' is to stay .* no gather before it has crossed"
    ):
        verify_graph(step)
    first.kwargs = {}
    set_inside(again)
    verify_graph(step)
    set_wire_format(again, WireFormat(torch.bfloat16))
    with pytest.raises(InsideGatherError, match=r"what crossed nodes before travelled as torch.float32"):
        verify_graph(step)
    again.kwargs = {}
    set_inside(again)
    step.sharding = Sharding.over(8)
    with pytest.raises(InsideGatherError, match="nodes share no shards"):
        verify_graph(step)

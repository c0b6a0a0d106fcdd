"""Optimizations are turned off by name, each where it is chosen; test_ablation_ranks.py has the rest."""

from typing import Any, get_args

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fxzero
from fxzero.comm.base import Comm, LocalComm
from fxzero.comm.gloo import GLOO
from fxzero.comm.without_ranks import PlanningComm
from fxzero.graph.layout import ParamSpec, make_bucket
from fxzero.graph.recipe import Recipe
from fxzero.graph.schedule_text import format_schedule
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph
from fxzero.memory.lifetimes import Buffer, Kind
from fxzero.passes import default_passes
from fxzero.planning.run_passes import run_passes
from fxzero.reference import ablation
from fxzero.reference.ablation import OPTIMIZATIONS, Optimization
from fxzero.reference.tensor_lists import with_tensor_lists
from fxzero.reference.transient import TransientMemory
from fxzero.testing import engine_of
from tests.helpers.pairs import Net, assert_same, both, pair, points, sgd
from tests.helpers.payloads import one_payload
from tests.helpers.toy_step import toy_step


def test_names_are_given_once_and_in_order() -> None:
    assert ablation.names(()) == ()
    assert ablation.names("prefetch") == ("prefetch",)
    assert ablation.names(["fused_norm", "overlap", "fused_norm"]) == ("overlap", "fused_norm")
    assert ablation.names("all") == tuple(OPTIMIZATIONS) == get_args(Optimization)


def test_each_name_is_in_the_list_of_what_was_optimized() -> None:
    assert ablation.__doc__ is not None
    lines = ablation.__doc__.splitlines()
    for name, effect in OPTIMIZATIONS.items():
        assert any(line.strip().startswith(f"{effect.row}  ") and name in line for line in lines), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": ["overlap", "speed"]}, "without has 'speed'; it must be \"all\", or of: overlap, prefetch"),
        ({"without": "everything"}, "without has 'everything'"),
        (
            {"without": "all", "passes": default_passes()},
            "passes= is the whole list: take what schedules overlap, prefetch, buckets out of it",
        ),
        ({"without": "persistent_buffers", "memory_budget": 2**30}, "memory_budget plans persistent buffers"),
    ],
)
def test_what_contradicts_other_options_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fxzero.compile(Net(), **options)


def test_what_is_no_pass_goes_with_a_list_of_passes() -> None:
    passes = default_passes(bucket_bytes=1)
    zero, _ = pair(without=["layout", "flat_collectives", "persistent_buffers", "fused_norm"], passes=passes)
    assert default_passes(engine_of(zero).sharded.recipe) == passes
    assert engine_of(zero).sharded.recipe.layout == "interleaved"


@pytest.mark.parametrize("memory_budget", [None, 2**30])
def test_training_alone_is_that_of_the_plain_model(memory_budget: int | None) -> None:
    without = [name for name in OPTIMIZATIONS if memory_budget is None or name != "persistent_buffers"]
    zero, plain = pair(without=without, memory_budget=memory_budget)
    optimizers = [sgd(zero), sgd(plain)]
    for step in range(3):
        for micro in range(2):
            for output in both(zero, plain, points(2 * step + micro), micro == 0, seed=micro):
                output.loss.backward()
        assert_same(zero, plain)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(zero, plain)


def _scheduled(*without: Optimization) -> StepGraph:
    recipe = ablation.recipe_without(without, Recipe(bucket_bytes=1))
    step = toy_step(num_layers=2).under(recipe)
    run_passes(step, default_passes(recipe))
    return step


def test_schedule_without_overlap_waits_at_once() -> None:
    assert_expected_inline(
        format_schedule(_scheduled("overlap")),
        """\
world_size=8  3 all_gathers, 42 KiB received  2 reduce_scatters, 28 KiB sent  gathered peak 16 KiB  without overlap
all_gather      layers.0.w     16 KiB
wait            layers.0.w
compute         layers.0        2 ops
release         layers.0.w
all_gather      layers.1.w     16 KiB
wait            layers.1.w
compute         layers.1        2 ops
release         layers.1.w
--- end of forward ---
compute         layers.1        2 ops
reduce_scatter  layers.1.w     16 KiB
wait_reduce     layers.1.w
all_gather      layers.1.w     16 KiB
wait            layers.1.w
compute         layers.1        3 ops
release         layers.1.w
compute         layers.0        2 ops
reduce_scatter  layers.0.w     16 KiB
wait_reduce     layers.0.w""",
    )


def test_schedule_without_prefetch_waits_for_gathers_alone() -> None:
    assert_expected_inline(
        format_schedule(_scheduled("prefetch")),
        """\
world_size=8  3 all_gathers, 42 KiB received  2 reduce_scatters, 28 KiB sent  gathered peak 16 KiB  without prefetch
all_gather      layers.0.w     16 KiB
wait            layers.0.w
compute         layers.0        2 ops
release         layers.0.w
all_gather      layers.1.w     16 KiB
wait            layers.1.w
compute         layers.1        2 ops
release         layers.1.w
--- end of forward ---
compute         layers.1        2 ops
reduce_scatter  layers.1.w     16 KiB
all_gather      layers.1.w     16 KiB
wait            layers.1.w
compute         layers.1        3 ops
release         layers.1.w
compute         layers.0        2 ops
reduce_scatter  layers.0.w     16 KiB
wait_reduce     layers.1.w
wait_reduce     layers.0.w""",
    )


def test_nothing_else_is_taken_out_of_the_passes() -> None:
    passes = default_passes()
    unscheduled: tuple[Optimization, ...] = ("layout", "flat_collectives", "persistent_buffers", "fused_norm")
    assert default_passes(ablation.recipe_without(unscheduled, Recipe())) == passes
    assert len(default_passes(ablation.recipe_without(("overlap",), Recipe()))) == len(passes) - 2


# -- collectives of lists ----------------------------------------------------------------------------------------


def test_lists_are_for_ranks_that_communicate() -> None:
    alone = LocalComm()
    assert with_tensor_lists(alone) is alone
    lists = with_tensor_lists(PlanningComm(1, Sharding.over(4), GLOO))
    payload = one_payload(4, 1000)
    assert lists.reduce_scratch_numel(payload) == payload.slice_numel
    assert lists.reduce_scratch_numel(payload, accumulate=False) == 0

    class Other(LocalComm):
        pass

    with pytest.raises(ValueError, match="no collectives of lists of tensors for a Other"):
        with_tensor_lists(Other())


def test_comm_is_another_one_only_without_flat_collectives() -> None:
    comm: Comm = PlanningComm(0, Sharding.over(2), GLOO)
    assert ablation.comm_without(("overlap", "persistent_buffers"), comm) is comm
    assert ablation.comm_without(("flat_collectives",), comm) is not comm


# -- memory for the time of a use --------------------------------------------------------------------------------


def test_a_buffer_has_memory_from_take_to_give_back() -> None:
    memory = TransientMemory(torch.device("cpu"))
    step = toy_step(num_layers=1)
    first, second, *_ = step.graph.nodes
    buffers = {
        (Kind.GATHER, first): (Buffer(Kind.GATHER, "a", 1024, 0, 1), 0),
        (Kind.GATHER, second): (Buffer(Kind.GATHER, "b", 2048, 1, 2), 0),
    }
    placed = memory.spread(buffers)
    (_, at), (_, other) = placed.values()
    assert abs(at - other) >= 1024, "no two overlap"
    view = memory.view(at, 256, torch.float32)
    head = memory.view(at, 256, torch.float32)[:3]
    assert view.untyped_storage().nbytes() == 1024
    memory.close()
    assert view.untyped_storage().nbytes() == 0 and memory.nbytes == 0
    memory.take(at, 1024)()
    view.fill_(3.0)
    again = memory.spread(buffers)  # another variant of the plan finds what is there
    assert memory.view(again[Kind.GATHER, first][1], 256, torch.float32).eq(3.0).all()
    memory.close()
    assert head.tolist() == [3.0] * 3
    memory.give_back(at)()
    assert head.untyped_storage().nbytes() == 0


def test_temporaries_have_no_places_without_persistent_buffers() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 512), nn.Linear(512, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()).sum()

    x = torch.randn(128, 64)
    full, without = (fxzero.compile(Wide(), example=x, without=names) for names in ((), "persistent_buffers"))
    assert full.schedule.memory.temporary_arena_bytes > 0
    assert without.schedule.memory.temporary_arena_bytes == 0
    assert without.schedule.memory.lower_bound_bytes == full.schedule.memory.lower_bound_bytes
    assert "at_" in full.schedule.code and "at_" not in without.schedule.code.replace("cat_", "")


def test_buckets_of_one_parameter_have_nothing_to_interleave() -> None:
    assert ablation.recipe_without(("layout",), Recipe()).layout == "interleaved"
    assert ablation.recipe_without(("buckets", "layout"), Recipe()).layout == "contiguous"
    assert ablation.recipe_without(("buckets",), Recipe(layout="interleaved")).layout == "interleaved"
    for shape in (1000,), (7, 3), (1,), (64, 64):
        params = [ParamSpec("w", shape, torch.float32, True)]
        one, other = (make_bucket(params, 4, layout) for layout in ("contiguous", "interleaved"))
        assert other.interleaved and (one.numel, one.offsets) == (other.numel, other.offsets)
        assert [one.slice_of(params[0], rank) for rank in range(4)] == [
            other.slice_of(params[0], rank) for rank in range(4)
        ]

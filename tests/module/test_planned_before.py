"""With `example=`, all is planned before the first batch: nothing is planned and nothing grows while it trains."""

import pytest
import torch

import fxzero
from fxzero.module import plan_maker
from fxzero.testing import engine_of, run_ranks
from tests.helpers.pairs import Net, points


def accumulates_without_planning(rank: int, world_size: int, without: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    zero = fxzero.compile(model, optimizer=optimizer, example=points(), without=without or ())
    arena = engine_of(zero).sharded.arena
    before, num_plans = arena.num_grown, _count_plans()
    for _ in range(2):
        for micro_step in range(4):  # overwrites, adds, holds, adds what was held
            with zero.no_sync() if micro_step == 2 else torch.enable_grad():
                zero(points(micro_step)).loss.backward()
        zero.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(num_plans) == 0, "a step planned"
    assert arena.num_grown == before, "a step made the arena longer"
    zero(points(), use_extra=True)
    assert len(num_plans) == 1, "another kind of call is planned"


def _count_plans() -> list[int]:
    """A list that grows with each plan that is made from now on."""
    counted: list[int] = []
    make_plan = plan_maker.make_plan

    def counting(*args: object, **kwargs: object) -> object:
        counted.append(1)
        return make_plan(*args, **kwargs)  # type: ignore[arg-type]

    plan_maker.make_plan = counting  # type: ignore[assignment]
    return counted


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_maker, "make_plan", plan_maker.make_plan)


@pytest.mark.parametrize("without", ["", "persistent_buffers"])
def test_steps_plan_nothing_and_never_grow_the_arena(without: str) -> None:
    accumulates_without_planning(0, 1, without)


def test_ranks_plan_nothing_and_never_grow_the_arena() -> None:
    run_ranks(2, accumulates_without_planning, "")


@pytest.mark.parametrize("without", ["buckets", "layout", "persistent_buffers", "all"])
def test_the_code_and_the_memory_shown_are_those_that_run(without: str) -> None:
    torch.manual_seed(0)
    zero = fxzero.compile(Net(), example=points(), without=without)
    planned, needed = zero.schedule.code, zero.schedule.memory.footprint
    zero(points()).loss.backward()
    assert zero.schedule.code == planned
    (functions,) = engine_of(zero).last._functions.values()
    shown: dict[str, object] = {}
    exec(planned, shown)
    for phase in ("forward", "backward"):
        assert code_of(functions[phase]) == code_of(shown[phase])
    assert zero.schedule.memory.footprint == needed


def code_of(function: object) -> tuple[object, ...]:
    """What a function runs, by name."""
    code = function.__code__  # type: ignore[attr-defined]
    return code.co_code, code.co_names, code.co_varnames

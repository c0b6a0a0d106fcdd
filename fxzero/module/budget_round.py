"""Fit the plans of one model into memory: what it holds, its budget in bytes, the one choice that all ranks share."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxzero.comm import agree
from fxzero.graph.names import format_bytes
from fxzero.graph.step import StepGraph
from fxzero.memory.footprint import Footprint, Held, footprint, held_by
from fxzero.module.optimizer_classes import state_per_element
from fxzero.planning.fix_layout import layout_of
from fxzero.planning.keep_within_budget import AUTO_SHARE, Choice, choose, free_bytes, least, must_choose
from fxzero.planning.run_passes import Pass
from fxzero.runtime.executable import Executable

if TYPE_CHECKING:
    from fxzero.module.engine import Engine

logger = logging.getLogger(__name__)


@dataclass
class Fitting:
    """What was decided at the first plan with a backward, for all plans and on all ranks."""

    choice: Choice | None = None
    budget_bytes: int | None = None
    """This rank's memory budget; None without one."""

    def choose(self, engine: Engine, step: StepGraph, passes: Sequence[Pass]) -> Choice | None:
        """What this rank would keep and recompute; None if there is nothing to choose, or not any more."""
        needed = must_choose(passes, engine.options.memory_budget)
        if self.choice is not None or not needed or not step.has_backward:
            return None
        self.budget_bytes = _budget_bytes(engine)
        return choose(step, passes, engine.comm.backend, lambda plan: held(engine, plan), self.budget_bytes)

    def agree(self, engine: Engine, own: Choice, topic: str) -> None:
        """Settle on the choice of all ranks, whose shapes and free memory may differ."""
        lines = agree.exchange(engine.group, topic, own.lines(), timeout=engine.options.timeout)
        choices = [Choice.of_lines(each) for each in lines]
        buckets = {fqns for each in choices for fqns in (*(each.kept or ()), *each.resident)}
        nbytes = {fqns: sum(engine.specs[fqn].nbytes for fqn in fqns) for fqns in buckets}
        self.choice = least(choices, nbytes)

    def warn_if_over(self, engine: Engine, step: StepGraph) -> None:
        """Say that a plan for a later, larger shape needs more than the budget it was not chosen for."""
        if self.budget_bytes is None:
            return
        needed = footprint(step, engine.comm.backend, held(engine, step), accumulate=True).planned_peak_bytes
        if needed > self.budget_bytes:
            logger.warning(
                "A step with these inputs needs %s on a rank; memory_budget is %s.",
                format_bytes(needed),
                format_bytes(self.budget_bytes),
            )


def held(engine: Engine, step: StepGraph) -> Held:
    """What a rank of this model holds from step to step beside the arena, under a plan."""
    layout = engine.shards.layout if engine.shards is not None else layout_of(step, engine.options.passes)
    buffers = sum(buffer.nbytes for _, buffer in engine.named_buffers())
    state = state_per_element(engine.optimizers)
    secondaries = {*step.secondaries().values(), *(engine.shards.secondaries.parts if engine.shards else ())}
    return held_by(
        layout, state_per_element=state, buffers=buffers, synchronize=step.synchronize, secondaries=secondaries
    )


def footprint_of(engine: Engine, executable: Executable) -> Footprint:
    """The memory of a plan: of the variant of its backward that needs the most of those that ran."""
    arena = max(executable.memory.values(), key=lambda plan: plan.peak_bytes, default=None)
    step = executable.step
    return footprint(step, engine.comm.backend, held(engine, step), arena=arena, arena_bytes=engine.arena.nbytes)


def _budget_bytes(engine: Engine) -> int | None:
    budget = engine.options.memory_budget
    if budget != "auto":
        return budget
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", engine.comm.sharding.world_size))
    free = int(AUTO_SHARE * free_bytes(engine.options.device, ranks_here))
    if engine.shards is None:  # what full parameters take now will be given back
        return free + sum(param.nbytes for param in engine.params.values() if not param.is_meta)
    shards = engine.shards
    return free + engine.arena.nbytes + shards.params.nbytes + shards.grads.nbytes + shards.secondaries.nbytes

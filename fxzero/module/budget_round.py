"""What is chosen by the inputs of the first plan with a backward: what stays gathered under a budget, recomputation."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal

from fxzero.graph.names import format_bytes
from fxzero.graph.recipe import Recipe
from fxzero.graph.step import StepGraph
from fxzero.memory.footprint import Held, held_by
from fxzero.module.one_choice import exchange_recipes
from fxzero.module.sharded_model import ShardedModel
from fxzero.planning.fix_layout import layout_of
from fxzero.planning.keep_within_budget import AUTO_SHARE, depends_on_inputs, fit_recipe, free_bytes, least
from fxzero.planning.plan import Plan

logger = logging.getLogger(__name__)


@dataclass
class BudgetRound:
    """One choice for all plans of a model, and on all ranks."""

    memory_budget: int | Literal["auto"] | None = None
    budget_bytes: int | None = None
    """This rank's memory budget; None without one, and before the choice."""
    _is_made: bool = False

    def must_choose(self, sharded: ShardedModel, step: StepGraph) -> bool:
        """True at the first plan with a backward, if there is something to choose."""
        if self._is_made or sharded.passes is not None or not step.has_backward:
            return False
        return depends_on_inputs(sharded.recipe, self.memory_budget)

    def choose(self, sharded: ShardedModel, captured: StepGraph) -> Recipe:
        """What this rank would keep and recompute."""
        self.budget_bytes = self._free_bytes(sharded) if self.memory_budget == "auto" else self.memory_budget
        backend = sharded.comm.backend
        return fit_recipe(captured, sharded.recipe, backend, lambda plan: held(sharded, plan), self.budget_bytes)

    def settle(self, sharded: ShardedModel, own: Recipe, topic: str) -> None:
        """Take the one choice of all ranks, whose shapes and free memory may differ; a collective."""
        recipes = exchange_recipes(sharded, own, topic)
        buckets = {fqns for each in recipes for fqns in (*(each.kept or ()), *each.resident)}
        nbytes = {fqns: sum(sharded.specs[fqn].gathered_nbytes for fqn in fqns) for fqns in buckets}
        sharded.recipe = least(recipes, nbytes)
        self._is_made = True

    def warn_if_over(self, sharded: ShardedModel, plan: Plan) -> None:
        """Say that a plan for a later, larger shape needs more than the budget it was not chosen for."""
        if self.budget_bytes is None:
            return
        needed = plan.footprint(held(sharded, plan.step)).planned_peak_bytes
        if needed > self.budget_bytes:
            logger.warning(
                "A step with these inputs needs %s on a rank; memory_budget is %s.",
                format_bytes(needed),
                format_bytes(self.budget_bytes),
            )

    def _free_bytes(self, sharded: ShardedModel) -> int:
        """The part of what is free that a rank plans with, and what it holds already and will use again."""
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", sharded.comm.sharding.world_size))
        free = int(AUTO_SHARE * free_bytes(sharded.devices.compute, ranks_here))
        shards = sharded.shards
        if shards is None:  # what full parameters take now will be given back
            return free + sum(param.nbytes for param in sharded.param_list if not param.is_meta)
        return free + sharded.arena.nbytes + shards.params.nbytes + shards.grads.nbytes + shards.secondaries.nbytes


def held(sharded: ShardedModel, step: StepGraph) -> Held:
    """What a rank of this model holds from step to step beside the arena, under a plan."""
    shards = sharded.shards
    layout = shards.layout if shards is not None else layout_of(step, sharded.recipe, sharded.passes)
    return held_by(
        layout,
        state_per_element=sharded.state_per_element,
        buffers=sum(buffer.nbytes for _, buffer in sharded.named_buffers()),
        synchronize=step.synchronize,
        secondaries={*step.secondaries().values(), *(shards.secondaries.parts if shards else ())},
    )

"""Choose once what stays gathered under a memory budget, and what is recomputed, for the inputs of one plan.

state   from       `choose`                                                                    `warn_if_over`
open    compile    at a plan with a backward, if the options leave something to its inputs:    does nothing
                   chooses, and the state is made
made    `choose`   does nothing                                                                compares each plan
"""

import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fxzero.comm import agree
from fxzero.graph.names import format_bytes
from fxzero.graph.step import StepGraph
from fxzero.memory.footprint import Held, held_by
from fxzero.module.sharded_model import ShardedModel
from fxzero.planning.fix_layout import layout_of
from fxzero.planning.keep_within_budget import AUTO_SHARE, depends_on_inputs, fit_recipe, free_bytes, least
from fxzero.planning.plan import Plan

logger = logging.getLogger(__name__)


@dataclass
class BudgetRound:
    """The choice for all plans of a model, on all ranks alike."""

    memory_budget: int | Literal["auto"] | None = None
    """Bytes that a rank may use; "auto" stands for the free memory, and None for no limit."""
    budget_bytes: int | None = None
    """Bytes that this rank may use; None without a limit, and before the choice."""
    _is_made: bool = False

    def choose(self, sharded: ShardedModel, captured: StepGraph, topic: str) -> bool:
        """Choose what stays gathered and how far to recompute, at the first plan with a backward; a collective then.

        Ranks may differ in shapes and free memory: all take the recipe that keeps least.

        Returns:
            True if this was the choice.
        """
        if self._is_made or sharded.passes is not None or not captured.has_backward:
            return False
        if not depends_on_inputs(sharded.recipe, self.memory_budget):
            return False
        with agree.reporting_failure(sharded.group, topic):
            self.budget_bytes = self._free_bytes(sharded) if self.memory_budget == "auto" else self.memory_budget
            backend, held_by_plan = sharded.comm.backend, partial(held, sharded)
            own = fit_recipe(captured, sharded.recipe, backend, held_by_plan, self.budget_bytes)
        recipes = sharded.exchange_recipes(own, topic)
        buckets = {fqns for each in recipes for fqns in (*(each.kept or ()), *each.resident)}
        nbytes = {fqns: sum(sharded.specs[fqn].gathered_nbytes for fqn in fqns) for fqns in buckets}
        sharded.recipe = least(recipes, nbytes)
        self._is_made = True
        return True

    def warn_if_over(self, sharded: ShardedModel, plan: Plan) -> None:
        """Warn if a plan for a later, larger shape needs more than the budget."""
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
        """The bytes that a rank can plan with: a share of the free memory, and memory that it holds already."""
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", sharded.comm.sharding.world_size))
        free = int(AUTO_SHARE * free_bytes(sharded.devices.compute, ranks_here))
        shards = sharded.shards
        if shards is None:  # full parameters will be freed
            return free + sum(param.nbytes for param in sharded.param_list if not param.is_meta)
        buffers = (shards.params, shards.copies, shards.grads, shards.secondaries)
        return free + sharded.arena.nbytes + sum(buffer.nbytes for buffer in buffers)


def held(sharded: ShardedModel, step: StepGraph) -> Held:
    """Bytes by kind that a rank of this model holds from step to step under a plan, beside the arena."""
    shards = sharded.shards
    layout = shards.layout if shards is not None else layout_of(step, sharded.recipe, sharded.passes)
    return held_by(
        layout,
        sharded.devices,
        state_per_element=sharded.state_per_element,
        buffers=sum(tensor.nbytes for tensor in sharded.plain_tensors().values()),
        unsharded=step.needs_unsharded,
        secondaries={*step.secondaries().values(), *(shards.secondaries.parts if shards else ())},
    )

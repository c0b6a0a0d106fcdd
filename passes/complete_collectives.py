"""Give a step the collectives that other ranks need and it does not."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.needs import missing_from, needs_of
from fxzero.graph.nodes import Role, gathered_params, is_gather, members, role, wait_of
from fxzero.graph.recipe import Need, Needs
from fxzero.graph.step import Phase, StepGraph


@dataclass(frozen=True)
class CompleteCollectives:
    """Gather parameters that only other ranks read, and reduce a slot without a gradient where only others have one.

    Before:  all_gather text | wait text | mm(x, text) | all_gather head | ...
    After:   all_gather text | wait text | mm(x, text) | all_gather image | wait image | all_gather head | ...

    All ranks are given one list. Each keeps its own collectives where they are, and writes each of the others in front
    of the next that it has. If its own have another order than in the list, which then has all gathers of the phase
    before all reductions, gathers move to the begin of the phase and reductions to its end.

    Needs: InsertAllGathers, InsertReduceScatters; runs before collectives are bucketed. Numerics: unchanged, bit for
    bit; a slot without a gradient is negative zeros, which change no sum.
    Source: PyTorch's DistributedDataParallel with find_unused_parameters; deviation: known before the step.
    """

    needs: Needs = ()
    """What all ranks need together, in the order of the collectives. Empty: nothing is missing."""

    def __call__(self, step: StepGraph, /) -> None:
        if not self.needs:
            return
        for phase, nodes in step.phases():
            order = [need for need in self.needs if need.phase == phase.value]
            end = step.output if phase is Phase.BACKWARD else step.end_forward or step.output
            starts = {
                (role(node).value, members(node)[0]): node
                for node in nodes
                if role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER)
            }
            own = tuple(need for need in needs_of(step) if need.phase == phase.value)
            if missing_from(own, tuple(order)) is not None:
                _rearrange(starts, order, nodes, end)
            for need in reversed(order):
                if (need.role, need.fqn) in starts:
                    end = starts[need.role, need.fqn]
                elif need.role == Role.ALL_GATHER.value or step.synchronize:
                    end = self._add(step, need, end)
        if (need := missing_from(needs_of(step), self.needs)) is not None:
            raise PassOrderError(f"the collectives that ranks agreed on have no {need}, or have it in another place")

    def _add(self, step: StepGraph, need: Need, following: fx.Node) -> fx.Node:
        """Write a collective and its wait in front of a node."""
        with step.graph.inserting_before(following):
            if need.role == Role.ALL_GATHER.value:
                start = step.graph.call_function(ops.all_gather, (step.param_nodes()[need.fqn],))
            else:
                slot = step.graph.call_function(ops.write_grad, (None, need.fqn))
                start = step.graph.call_function(ops.reduce_scatter, (slot,))
            step.graph.call_function(ops.wait, (start,))
        return start


def _rearrange(
    starts: dict[tuple[str, str], fx.Node], order: Sequence[Need], phase: Sequence[fx.Node], end: fx.Node
) -> None:
    """Move the gathers of a phase to its begin and the reductions to its end, in the order of the list."""
    own = [starts[need.role, need.fqn] for need in order if (need.role, need.fqn) in starts]
    parts = {start: [start, wait_of(start)] for start in own}
    for start in filter(is_gather, own):
        parts[start] += gathered_params(wait_of(start)).values()
    moving = {node for nodes in parts.values() for node in nodes}
    begin = next((node for node in phase if node not in moving), end)
    for start in own:
        for node in parts[start]:
            (begin if is_gather(start) else end).prepend(node)

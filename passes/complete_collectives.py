"""Give a step the collectives that other ranks need and it does not."""

from dataclasses import dataclass

from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.needs import missing_from, needs_of
from fxzero.graph.nodes import Role, members, role
from fxzero.graph.recipe import Need, Needs
from fxzero.graph.step import Phase, StepGraph


@dataclass(frozen=True)
class CompleteCollectives:
    """Gather parameters that only other ranks read, and reduce a slot without a gradient where only others have one.

    Before:  all_gather text | wait text | mm(x, text) | all_gather head | ...
    After:   all_gather text | wait text | mm(x, text) | all_gather image | wait image | all_gather head | ...

    All ranks are given one list. Each keeps its own collectives where they are, and writes each of the others in front
    of the next that it has.

    Needs: InsertAllGathers, InsertReduceScatters; runs before collectives are bucketed. Numerics: unchanged, bit for
    bit; a slot without a gradient is negative zeros, which change no sum.
    Source: PyTorch's DistributedDataParallel with find_unused_parameters; deviation: known before the step.
    """

    needs: Needs = ()
    """What all ranks need together, in the order of the collectives. Empty: nothing is missing."""

    def __call__(self, step: StepGraph, /) -> None:
        if not self.needs:
            return
        if (need := missing_from(needs_of(step), self.needs)) is not None:
            raise PassOrderError(f"the collectives that ranks agreed on have no {need}, or have it in another place")
        for phase, nodes in step.phases():
            gathered = {members(node)[0]: node for node in nodes if role(node) is Role.ALL_GATHER}
            reduced = {members(node)[0]: node for node in nodes if role(node) is Role.REDUCE_SCATTER}
            following = step.output if phase is Phase.BACKWARD else step.end_forward or step.output
            for need in reversed([need for need in self.needs if need.phase == phase.value]):
                of_role = gathered if need.role == Role.ALL_GATHER.value else reduced
                if need.fqn in of_role:
                    following = of_role[need.fqn]
                elif of_role is gathered or step.synchronize:
                    following = self._add(step, need, following)

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

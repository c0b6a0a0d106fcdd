"""Keep gathered buckets from forward until backward, where memory allows, instead of gathering them again."""

import operator
from dataclasses import dataclass

from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, gathered_params, members, new_value, wait_of
from fxzero.graph.placing import kept_from_forward
from fxzero.graph.step import Phase, StepGraph


@dataclass(frozen=True)
class KeepGathered:
    """Let backward read what forward gathered, for buckets whose bytes fit.

    Before:  all_gather w | wait w | mm(x, w) | end_forward | all_gather w | wait w | mm(grad, w)
    After:   all_gather w | wait w | mm(x, w) | end_forward | mm(grad, w)

    Buckets are chosen in the order of their first use in backward: the first ones are the last in forward, so they are
    held for the shortest time. With every bucket kept, a step moves two thirds of the bytes, at the residency of ZeRO
    stage 2; parameters, gradients and optimizer state stay sharded.

    Needs: BucketAllGathers (or InsertAllGathers alone). Numerics: unchanged, bit for bit.
    Source: FSDP2's reshard_after_forward; deviation: chosen per bucket under a budget, not per module by hand.
    """

    max_kept_bytes: int | None = None
    """Upper bound on the bytes kept from forward to backward, per rank; None keeps every bucket."""
    buckets: tuple[tuple[str, ...], ...] | None = None
    """Buckets to keep. None leaves the choice to `max_kept_bytes`."""
    resident: tuple[tuple[str, ...], ...] = ()
    """Buckets that stay gathered even longer, until the shards change; backward reads these too."""

    def __post_init__(self) -> None:
        if self.max_kept_bytes is not None and self.max_kept_bytes < 0:
            raise ValueError(f"max_kept_bytes is {self.max_kept_bytes}; it must be at least 0, or None")

    def __call__(self, step: StepGraph, /) -> None:
        step.resident = self.resident
        if not step.has_backward:
            return
        gathers = step.all_gathers()
        if step.nodes(Role.RELEASE):
            raise PassOrderError("a bucket is released already; run ReleaseParams after this pass")
        phase_of = step.phase_of()
        forward = {members(start): start for start in gathers if phase_of[start] is Phase.FORWARD}
        again = [start for start in gathers if phase_of[start] is Phase.BACKWARD and members(start) in forward]
        if self.buckets is not None:
            stays = [members(start) in self.buckets for start in again]
        else:
            stays = kept_from_forward([step.payload_of(start).nbytes for start in again], self.max_kept_bytes)
        for start, stay in zip(again, stays, strict=True):
            if stay or members(start) in self.resident:
                self._keep(step, forward[members(start)], start)

    def _keep(self, step: StepGraph, kept: fx.Node, again: fx.Node) -> None:
        """Let the readers of a second gather read the first, and drop the second."""
        bucket, wait = members(kept), wait_of(kept)
        there, index = gathered_params(wait), {fqn: at for at, fqn in enumerate(bucket)}
        for fqn, old in gathered_params(wait_of(again)).items():
            if fqn not in there:
                with step.graph.inserting_after(wait):
                    there[fqn] = step.graph.call_function(operator.getitem, (wait, index[fqn]))
                new_value(there[fqn], old.meta["val"])
            old.replace_all_uses_with(there[fqn])
            step.graph.erase_node(old)
        step.graph.erase_node(wait_of(again))
        step.graph.erase_node(again)
        step.kept.add(bucket)

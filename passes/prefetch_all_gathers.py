"""Launch each all-gather early, so that it overlaps the compute before its wait."""

from dataclasses import dataclass

from fxzero.graph.nodes import wait_of
from fxzero.graph.placing import gather_starts
from fxzero.graph.step import StepGraph

MIB = 2**20


@dataclass(frozen=True)
class PrefetchAllGathers:
    """Move all-gather launches up within their phase, keeping their waits at the first use.

    Before:  all_gather 0 | wait 0 | compute 0 | all_gather 1 | wait 1 | compute 1
    After:   all_gather 0 | all_gather 1 | wait 0 | compute 0 | wait 1 | compute 1

    The order of the gathers stays. Each is launched at the start of its phase, or before the earliest wait at which
    its bytes and those in flight fit the budget. Whatever its size, a gather starts at least one wait early, so that
    the next start is issued before a wait blocks the host.

    Needs: InsertAllGathers. Numerics: unchanged, bit for bit.
    Source: DeepCompile (arXiv:2504.09983), proactive prefetching; deviation: a byte budget, not a profile.
    """

    max_inflight_bytes: int = 48 * MIB
    """Upper bound on bytes gathered but not yet waited for, per rank, while more than two gathers are in flight."""

    def __post_init__(self) -> None:
        if self.max_inflight_bytes < 0:
            raise ValueError(f"max_inflight_bytes is {self.max_inflight_bytes}; it must be at least 0")

    def __call__(self, step: StepGraph, /) -> None:
        gathers = set(step.all_gathers())
        for _, nodes in step.phases():
            starts = [node for node in nodes if node in gathers]
            nbytes = [step.payload_of(start).nbytes for start in starts]
            head = next((node for node in nodes if node not in starts), None)
            for start, first in zip(starts, gather_starts(nbytes, self.max_inflight_bytes), strict=True):
                anchor = wait_of(starts[first]) if first > 0 else head
                assert anchor is not None
                anchor.prepend(start)

"""Start gathers that block compute before reductions that block nothing."""

from dataclasses import dataclass

from fxzero.graph.nodes import Role, members, wait_of
from fxzero.graph.step import Phase, StepGraph


@dataclass(frozen=True)
class GathersFirst:
    """Start chosen reduce-scatters behind a later all-gather of backward.

    Before:  write_grad 2 | reduce_scatter 2 | mm | all_gather 0 | mm | wait 0
    After:   write_grad 2 | mm | all_gather 0 | reduce_scatter 2 | mm | wait 0

    A link sends one message after another, in the order of starts. The pairs to exchange are chosen before, from costs;
    a pair whose gather is missing, or starts first anyway, changes nothing.

    Needs: BucketReduceScatters; PrefetchAllGathers, whose gathers it orders by; before SinkWaits.
    Numerics: unchanged, bit for bit.
    Source: list scheduling, with the most urgent message first.
    """

    later: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    """Pairs of buckets: the reduction of the first starts right behind the gather of the second."""

    def __call__(self, step: StepGraph, /) -> None:
        reductions = {members(start): start for start in step.reduce_scatters()}
        phase_of = step.phase_of()
        gathers = {members(start): start for start in step.nodes(Role.ALL_GATHER) if phase_of[start] is Phase.BACKWARD}
        for reduced, gathered in self.later:
            start, gather = reductions.get(reduced), gathers.get(gathered)
            if start is not None and gather is not None and start < gather:
                gather.append(start)
                start.append(wait_of(start))  # SinkWaits, which comes next, moves it down again

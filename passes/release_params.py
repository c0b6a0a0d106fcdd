"""Release each gathered bucket after its last reader."""

from dataclasses import dataclass

from fxzero.graph import ops
from fxzero.graph.aliasing import in_memory_of
from fxzero.graph.nodes import gathered_params, members, read_until, release_of, wait_of
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class ReleaseParams:
    """Write a release after the last reader of each gathered bucket, views of its members included.

    Before:  wait w | wt = t(w) | mm(x, wt) | relu
    After:   wait w | wt = t(w) | mm(x, wt) | release w | relu

    No other pass writes releases. A bucket that stays until the shards change (`step.resident`) has no release.

    Needs: InsertAllGathers; runs after all passes that move readers. Numerics: unchanged, bit for bit.
    Source: ZeRO stage 3 (arXiv:1910.02054); deviation: per bucket at its last reader, not per module.
    """

    def __call__(self, step: StepGraph, /) -> None:
        for start in step.all_gathers():
            wait = wait_of(start)
            if release_of(wait) is not None or members(wait) in step.resident:
                continue
            values = [value for param in gathered_params(wait).values() for value in in_memory_of(param)]
            readers = [until for value in values for user in value.users for until in read_until(user)]
            last = max([wait, *values, *readers])
            with step.graph.inserting_after(last):
                step.graph.call_function(ops.release, (wait,))

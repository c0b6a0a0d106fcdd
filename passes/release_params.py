"""Release each gathered bucket after its last reader."""

from __future__ import annotations

from dataclasses import dataclass

from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.aliasing import in_memory_of
from fxzero.graph.nodes import Role, gathered_params, is_gather, members, read_until, release_of, started_by
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class ReleaseParams:
    """Write a release after the last reader of each gathered bucket, views of its members included.

    Before:  wait w | wt = t(w) | mm(x, wt) | relu
    After:   wait w | wt = t(w) | mm(x, wt) | release w | relu

    The only pass that writes releases. A bucket that stays until the shards change (`step.resident`) has none.

    Needs: InsertAllGathers; runs last of those that move readers. Numerics: unchanged, bit for bit.
    Source: ZeRO stage 3 (arXiv:1910.02054); deviation: per bucket at its last reader, not per module.
    """

    def __call__(self, step: StepGraph, /) -> None:
        if not step.nodes(Role.ALL_GATHER) and any(param.users for param in step.param_nodes().values()):
            raise PassOrderError("no all_gather in the graph; run InsertAllGathers first")
        positions = step.positions()
        for wait in step.nodes(Role.WAIT):
            if not is_gather(started_by(wait)) or release_of(wait) is not None or members(wait) in step.resident:
                continue
            last = wait
            for param in gathered_params(wait).values():
                for value in in_memory_of(param):
                    readers = [until for user in value.users for until in read_until(user)]
                    last = max((last, value, *readers), key=lambda node: positions[node])
            with step.graph.inserting_after(last):
                step.graph.call_function(ops.release, (wait,))

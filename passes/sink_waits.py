"""Wait as late as is legal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph.nodes import Role, gathered_params, is_gather, started_by, wait_of
from fxzero.graph.placing import reductions_finished
from fxzero.graph.step import StepGraph

MIB = 2**20


@dataclass(frozen=True)
class SinkWaits:
    """Move each wait of a gather to its first reader, and each wait of a reduce-scatter down within a byte budget.

    Before:  reduce_scatter 1 | wait 1 | compute 0 | reduce_scatter 0 | wait 0
    After:   reduce_scatter 1 | compute 0 | reduce_scatter 0 | wait 1 | wait 0

    A reduce-scatter never blocks compute: it is waited for at the end of backward, or when the budget needs its
    memory back, which is just before the launch that would exceed it.

    Needs: InsertReduceScatters. Numerics: unchanged, bit for bit.
    Source: PyTorch Inductor's sink_waits; deviation: bounded by bytes, since an unwaited reduction holds its bucket.
    """

    max_inflight_bytes: int = 48 * MIB
    """Upper bound on the bytes of gradient buckets in flight, per rank; one reduction may always be in flight."""

    def __post_init__(self) -> None:
        if self.max_inflight_bytes < 0:
            raise ValueError(f"max_inflight_bytes is {self.max_inflight_bytes}; it must be at least 0")

    def __call__(self, step: StepGraph, /) -> None:
        if step.has_backward and step.synchronize and step.grads and not step.nodes(Role.REDUCE_SCATTER):
            raise PassOrderError("no reduce_scatter in the graph; run InsertReduceScatters first")
        positions = step.positions()
        for wait in step.nodes(Role.WAIT):
            if is_gather(started_by(wait)):
                self._sink_to_readers(wait, positions)
        self._sink_reductions(step)

    def _sink_to_readers(self, wait: fx.Node, positions: dict[fx.Node, int]) -> None:
        outputs = list(gathered_params(wait).values())
        readers = [user for output in outputs for user in output.users]
        if readers:
            first = min(readers, key=lambda reader: positions[reader])
            first.prepend(wait)
            for output in sorted(outputs, key=lambda output: positions[output]):
                first.prepend(output)

    def _sink_reductions(self, step: StepGraph) -> None:
        starts = step.nodes(Role.REDUCE_SCATTER)
        nbytes = [step.payload_of(start).nbytes for start in starts]
        end = 0
        for start, finished in zip(starts, reductions_finished(nbytes, self.max_inflight_bytes), strict=True):
            for index in finished:
                start.prepend(wait_of(starts[index]))
            end = finished.stop
        for start in starts[end:]:
            step.output.prepend(wait_of(start))

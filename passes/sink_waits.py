"""Wait as late as is legal."""

from dataclasses import dataclass

from torch import fx

from fxzero.graph.nodes import Role, gathered_params, is_gather, wait_of
from fxzero.graph.placing import reductions_finished
from fxzero.graph.step import StepGraph

MIB = 2**20


@dataclass(frozen=True)
class SinkWaits:
    """Move each wait of a gather to its first reader, and each wait of a reduce-scatter down within a byte budget.

    Before:  reduce_scatter 1 | wait 1 | compute 0 | reduce_scatter 0 | wait 0
    After:   reduce_scatter 1 | compute 0 | reduce_scatter 0 | wait 1 | wait 0

    A reduce-scatter never blocks compute: its wait stands at the end of backward, or just before the launch of another
    reduce-scatter that would exceed the budget.

    Needs: InsertReduceScatters. Numerics: unchanged, bit for bit.
    Source: PyTorch Inductor's sink_waits; deviation: bounded by bytes, since an unwaited reduction holds its bucket.
    """

    max_inflight_bytes: int = 48 * MIB
    """Upper bound on the bytes of gradient buckets in flight, per rank; one reduction may always be in flight."""

    def __post_init__(self) -> None:
        if self.max_inflight_bytes < 0:
            raise ValueError(f"max_inflight_bytes is {self.max_inflight_bytes}; it must be at least 0")

    def __call__(self, step: StepGraph, /) -> None:
        reductions = step.reduce_scatters()
        for wait in step.nodes(Role.WAIT):
            if is_gather(wait):
                self._sink_to_readers(wait)
        self._sink_reductions(step, reductions)

    def _sink_to_readers(self, wait: fx.Node) -> None:
        outputs = sorted(gathered_params(wait).values())
        readers = [user for output in outputs for user in output.users]
        if readers:
            first = min(readers)
            for node in (wait, *outputs):
                first.prepend(node)

    def _sink_reductions(self, step: StepGraph, starts: list[fx.Node]) -> None:
        nbytes = [step.payload_of(start).nbytes for start in starts]
        end = 0
        for start, finished in zip(starts, reductions_finished(nbytes, self.max_inflight_bytes), strict=True):
            for index in finished:
                start.prepend(wait_of(starts[index]))
            end = finished.stop
        for start in starts[end:]:
            step.output.prepend(wait_of(start))

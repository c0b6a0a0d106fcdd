"""Reduce each gradient where it is ready."""

from dataclasses import dataclass

from torch import fx

from fxzero.graph import ops
from fxzero.graph.step import Phase, StepGraph


@dataclass(frozen=True)
class InsertReduceScatters:
    """Write each parameter's gradient to its bucket and reduce it, right where it is ready.

    Before:  dw = mm(...) | output dw
    After:   dw = mm(...) | slot = write_grad dw | start = reduce_scatter slot | wait start | output

    Under no_sync() (`step.synchronize` is False) the gradient stays in its slot, unsharded, and nothing is reduced.

    Needs: nothing. Numerics: unchanged, bit for bit; the mean over ranks is the collective's.
    Source: ZeRO stage 2 (arXiv:1910.02054).
    """

    def __call__(self, step: StepGraph, /) -> None:
        boundary = step.end_forward
        if boundary is None:
            return
        phase_of = step.phase_of()
        grads = dict(step.grads)
        for fqn, grad in grads.items():
            ready = grad if phase_of.get(grad) is Phase.BACKWARD else boundary
            grads[fqn] = self._reduce(step, ready, grad, fqn)
        step.set_output(step.model_outputs, grads, step.input_grads)

    def _reduce(self, step: StepGraph, ready: fx.Node, grad: fx.Node, fqn: str) -> fx.Node:
        with step.graph.inserting_after(ready):
            slot = step.graph.call_function(ops.write_grad, (grad, fqn))
        if not step.synchronize:
            return slot
        with step.graph.inserting_after(slot):
            start = step.graph.call_function(ops.reduce_scatter, (slot,))
        with step.graph.inserting_after(start):
            return step.graph.call_function(ops.wait, (start,))

"""The step behind one torch.autograd.Function: outputs that can be differentiated, gradients that go to the shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxzero.errors import StaleBackwardError
from fxzero.runtime import Executable

if TYPE_CHECKING:
    from fxzero.engine import Engine


class Call:
    """One call of the module, from its forward to its backward."""

    def __init__(self, engine: Engine, executable: Executable, inputs: list[torch.Tensor], replan: Any) -> None:
        self._engine = engine
        self._executable = executable
        self._inputs = inputs
        self._replan = replan
        """Makes the executable for another pattern of arriving gradients."""
        self._saved: list[Any] | None = None
        self._version = 0
        self._rng_state: torch.Tensor | None = None
        self._old_buffers: dict[int, torch.Tensor] = {}

    @property
    def executable(self) -> Executable:
        return self._executable

    def forward(self, *, keep: bool) -> tuple[Any, ...]:
        """Run forward; with `keep`, keep what backward needs."""
        executable = self._executable
        buffers = self._engine.buffers(executable)
        if keep:
            self._version = self._engine.version()
            if executable.draws_random:
                self._rng_state = torch.get_rng_state()
            self._old_buffers = {index: buffers[index].clone() for index in executable.mutated_buffers}
        outputs, saved = executable.forward(self._inputs, buffers)
        if keep:
            self._saved = saved
        return outputs

    def backward(self, arriving: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
        """Run backward for the gradients that arrive, one per output of the Function."""
        if torch.is_grad_enabled():
            raise StaleBackwardError(
                "create_graph=True: gradients of gradients are not in the schedule. Call backward without create_graph."
            )
        if self._saved is None:
            raise StaleBackwardError(
                "A second backward through one forward: its saved values are freed as they are used (retain_graph has "
                "no effect). Call the module again before each backward."
            )
        if self._version != self._engine.version():
            self._saved = None
            raise StaleBackwardError(
                "The parameters changed between this forward and its backward (an optimizer step or a load). Call the "
                "module again before backward."
            )
        pattern = self._executable.pattern_of(arriving)
        if pattern != self._executable.plan.captured.differentiated:
            self._run_again_for(pattern)
        saved, self._saved = self._saved, None
        tangents = [grad for grad in arriving if grad is not None]
        return self._engine.backward(self._executable, saved, tangents)

    def _run_again_for(self, pattern: tuple[int, ...]) -> None:
        """Repeat forward under the plan for these arriving gradients: same random draws, same buffers."""
        self._executable = executable = self._replan(pattern)
        buffers = self._engine.buffers(executable)
        for index, old in self._old_buffers.items():
            buffers[index] = old
        now = torch.get_rng_state()
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state)
        try:
            _, self._saved = executable.forward(self._inputs, buffers)
        finally:
            torch.set_rng_state(now)


class StepFunction(torch.autograd.Function):
    """Forward and backward of one call. Its tensor arguments are an anchor and the inputs that require grad."""

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        outputs = call.forward(keep=True)
        executable = call.executable
        tensors = [outputs[index] for index in executable.tensor_outputs]
        fixed = [outputs[index] for index in executable.tensor_outputs if index not in executable.differentiable]
        ctx.mark_non_differentiable(*fixed)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *arriving: torch.Tensor | None) -> tuple[Any, ...]:
        return (None, None, *ctx.call.backward(arriving))

"""The step behind one torch.autograd.Function: outputs that can be differentiated, gradients that go to the shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from fxzero import torch_internals
from fxzero.errors import StaleBackwardError
from fxzero.module.call_kind import Pattern
from fxzero.module.initialize import rng_state, set_rng_state
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.executable import Executable

Replan: TypeAlias = Callable[[Pattern], Executable]
"""Makes the executable for another pattern of arriving gradients."""
RunBackward: TypeAlias = Callable[[Executable, list[Any], list[torch.Tensor]], tuple[Any, ...]]
"""Runs the backward of an executable, given what was saved and the gradients that arrive: those of the inputs."""


class Call:
    """One call of the module, from its forward to its backward. It holds nothing any more once backward has run."""

    def __init__(
        self,
        sharded: ShardedModel,
        run_backward: RunBackward,
        executable: Executable,
        inputs: list[torch.Tensor],
        replan: Replan,
    ) -> None:
        self._sharded, self._run_backward = sharded, run_backward
        self._executable = executable
        self._inputs = inputs
        self.trained_inputs = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
        """Which of the inputs receive a gradient."""
        self._replan: Replan | None = replan
        self._saved: list[Any] | None = None
        self._param_version = 0
        self._generation = 0
        """Of the phases after forward: the arena has the buckets that forward keeps as long as that is the last one."""
        self._versions: list[int] = []
        """Of what backward reads and the user can reach."""
        self._rng_state: torch.Tensor | None = None
        self._before: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        """Inputs and buffers as forward found them."""

    @property
    def executable(self) -> Executable:
        return self._executable

    def forward(self, *, keep: bool) -> tuple[Any, ...]:
        """Run forward; with `keep`, keep what backward needs."""
        executable, sharded = self._executable, self._sharded
        buffers = self._buffers(executable)
        if not keep:
            return executable.forward(self._inputs, buffers)[0]
        self._param_version = sharded.version()
        if executable.draws_random:
            self._rng_state = rng_state(sharded.devices.compute)
        self._before = (
            _copy_some(self._inputs, executable.written_inputs),
            _copy_some(buffers, executable.written_buffers),
        )
        outputs, saved = executable.forward(self._inputs, buffers)
        self._saved, self._generation = saved, sharded.in_flight.generation
        self._versions = torch_internals.changes_of_each(saved, executable.reachable)
        for index in executable.saved_outputs:  # what is saved must not lead back to this call: that would be a cycle
            outputs = (*outputs[:index], outputs[index].detach(), *outputs[index + 1 :])
        return outputs

    def backward(self, arriving: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """Run backward for the gradients that arrive, one per output of the Function.

        Returns:
            The gradients of the inputs that require grad.
        """
        self._check()
        pattern = self._executable.pattern_of(arriving)
        if pattern != self._executable.plan.captured.differentiated:
            self._run_again_for(pattern)
        saved = self._saved
        assert saved is not None
        self._drop()
        tangents = [grad for grad in arriving if grad is not None]
        self._executable.restore_kept(self._generation)
        input_grads = self._run_backward(self._executable, saved, tangents)
        return [input_grads[index] for index in self.trained_inputs]

    def _check(self) -> None:
        """Refuse a backward that would be wrong.

        Raises:
            StaleBackwardError: says why.
        """
        if torch.is_grad_enabled():
            raise StaleBackwardError(
                "create_graph=True: gradients of gradients are not in the schedule. Call backward without create_graph."
            )
        if self._saved is None:
            raise StaleBackwardError(
                "A second backward through one forward: its saved values are freed as they are used (retain_graph has "
                "no effect). Call the module again before each backward."
            )
        if self._param_version != self._sharded.version():
            self._drop()
            raise StaleBackwardError(
                "The parameters changed between this forward and its backward (an optimizer step or a load). Call the "
                "module again before backward."
            )
        if self._versions != torch_internals.changes_of_each(self._saved, self._executable.reachable):
            self._drop()
            raise StaleBackwardError(
                "An input, an output or a buffer that backward needs was changed in place after this forward. Change a "
                "copy of it instead, and call the module again before backward."
            )

    def _buffers(self, executable: Executable) -> list[torch.Tensor]:
        return self._sharded.buffers(executable.buffers, executable.buffer_geometry)

    def _drop(self) -> None:
        self._saved, self._inputs, self._before, self._replan = None, [], ([], []), None

    def _run_again_for(self, pattern: Pattern) -> None:
        """Repeat forward under the plan for these arriving gradients: same random draws, same inputs and buffers."""
        before = self._executable
        assert self._replan is not None
        self._executable = executable = self._replan(pattern)
        inputs, buffers = list(self._inputs), self._buffers(executable)
        for index, old in zip(before.written_inputs, self._before[0], strict=True):
            inputs[index] = old
        for index, old in zip(before.written_buffers, self._before[1], strict=True):
            buffers[index] = old
        device = self._sharded.devices.compute
        now = rng_state(device)
        if self._rng_state is not None:
            set_rng_state(self._rng_state, device)
        try:
            _, self._saved = executable.forward(inputs, buffers)
            self._generation = self._sharded.in_flight.generation
        finally:
            set_rng_state(now, device)


def _copy_some(tensors: Sequence[torch.Tensor], indices: Sequence[int]) -> list[torch.Tensor]:
    return [tensors[index].clone() for index in indices]


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
        if not torch_internals.runs_in_this_backward(ctx.next_functions[0][0]):
            raise StaleBackwardError(
                "torch.autograd.grad, or backward(inputs=...), asks for some gradients only; a compiled backward "
                "computes those of all parameters. Call loss.backward() and read .grad, also that of the inputs."
            )
        return (None, None, *ctx.call.backward(arriving))

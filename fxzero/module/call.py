"""One call of a compiled module as a torch.autograd.Function, whose backward writes gradients into the shards."""

import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias

import torch

from fxzero import torch_internals
from fxzero.capture.draws import drawing_from, rng_state
from fxzero.capture.hooks.observer import no_hooks
from fxzero.errors import FxzeroError, StaleBackwardError
from fxzero.module.call_kind import Pattern
from fxzero.module.replaced_data import Replaced, in_shards
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.executable import Executable

Settle: TypeAlias = Callable[[Executable, Pattern], tuple[Executable, Executable, bool, list[Any]]]
"""Given the executable that ran forward, and the outputs that receive a gradient: the executables of forward and of
backward, whether forward must run again, and the inputs that are Python state then."""


class RunsBackward(Protocol):
    """Runs the backward of an executable on its saved values and the arriving gradients; gives those of the inputs."""

    def backward(self, executable: Executable, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """With the gradients of parameters in `.grad`."""
        ...

    def backward_aside(self, executable: Executable, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """With the gradients of parameters for who asks for them."""
        ...

    def after_backward(self, executable: Executable) -> None:
        """The phase of a backward that updated `.grad` is over."""
        ...

    def gradients_are_asked_for(self, anchor: Any) -> bool:
        """True in a backward that leaves `.grad` alone."""
        ...


class Call:
    """One call of the module, from its forward to its backward, which frees all that the call holds.

    event     legal              what it does
    forward   once               runs the plan's forward; holds the inputs, and the values saved for backward
    backward  once, afterwards   runs forward again if it saved nothing for some output that receives a gradient, on any
                                 rank; then runs the plan's backward; refused if a value that it reads has changed
    """

    def __init__(
        self,
        sharded: ShardedModel,
        runs: RunsBackward,
        executable: Executable,
        inputs: list[torch.Tensor],
        settle: Settle,
        replaced: Replaced,
        called: str = "",
    ) -> None:
        self._sharded, self._runs = sharded, runs
        self._is_aside = False
        """True for a backward that leaves `.grad` alone."""
        self._word = f"backward of {called}()" if called else "backward"
        self.executable = executable
        self._inputs = inputs
        self.trained_inputs = [index for index, x in enumerate(inputs[: executable.num_inputs]) if x.requires_grad]
        """Indices of the inputs that receive a gradient."""
        self._settle: Settle | None = settle
        self._replaced = replaced
        """The tensors that were in the place of shards in forward, which backward uses too."""
        self._outputs: list[weakref.ref[torch.Tensor]] = []
        self._saved: list[Any] | None = None
        self._param_version = self._num_writes = self._num_refreshes = 0
        self._generation = 0
        """`InFlight.generation` after forward: until it changes, the arena has the buckets that forward keeps."""
        self._versions: list[int] = []
        """Version counters of the saved values that the user can reach."""
        self._rng_state: torch.Tensor | None = None
        self._before: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        """Copies of the inputs and of the buffers that forward writes, made before it."""
        self._late_values: list[Any] | None = None
        """What the Python state held after forward that code in backward reads; None if it reads none."""
        self._params_before: list[torch.Tensor] = []
        """Copies of this rank's slices of the parameters that forward writes, made before it."""

    def forward(self) -> tuple[Any, ...]:
        """Run forward, and return the flat outputs."""
        executable, sharded = self.executable, self._sharded
        buffers = sharded.buffers(executable)
        self._param_version = sharded.version()
        if executable.draws_random:
            self._rng_state = rng_state(sharded.devices.compute)
        if executable.written_inputs or executable.written_buffers:
            self._before = (
                _copy_some(self._inputs, executable.written_inputs),
                _copy_some(buffers, executable.written_buffers),
            )
        if executable.written:
            self._params_before = [data.clone() for data in executable.written_params]
        outputs, saved = executable.forward(self._inputs, buffers)
        self._saved, self._generation = saved, sharded.in_flight.generation
        self._num_writes = sharded.in_flight.num_writes
        self._num_refreshes = sharded.in_flight.num_refreshes
        self._versions = torch_internals.changes_of_each(saved, executable.reachable)
        for index in executable.outputs_to_detach:
            outputs = (*outputs[:index], outputs[index].detach(), *outputs[index + 1 :])
        return outputs

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        """Note the tensors that forward returned, in whose gradients a user may take an interest."""
        self._outputs = [weakref.ref(output) for output in outputs]

    def note_state(self) -> None:
        """Note the Python state that code in backward reads, once forward has left behind what it sets."""
        self._late_values = self.executable.plan.captured.state.late_values()

    def backward(self, arriving: tuple[torch.Tensor | None, ...], anchor: Any) -> list[torch.Tensor | None]:
        """Run backward.

        Args:
            arriving: the gradient of each output of the Function; None where there is none.
            anchor: the node of the anchor.

        Returns:
            The gradients of the inputs that require grad.
        """
        synchronize = self.executable.step.synchronize
        phases, self._is_aside = self._sharded.phases, self._runs.gradients_are_asked_for(anchor)
        if self._is_aside:
            with phases.phase(f"{self._word} by torch.autograd.grad"):
                return self._run(arriving)
        with phases.phase(self._word if synchronize else f"{self._word} {self._sharded.how_held}"):
            input_grads = self._run(arriving)
        phases.after_backward()
        self._runs.after_backward(self.executable)
        return input_grads

    def _run(self, arriving: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        self._check()
        if not self._replaced:
            return self._run_checked(arriving)
        with in_shards(self._replaced):
            return self._run_checked(arriving)

    def _run_checked(self, arriving: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        before, pattern = self.executable, self.executable.pattern_of(arriving)
        self._check_hooked(pattern)
        running = before
        if pattern != before.plan.captured.differentiated or not before.is_settled:
            assert self._settle is not None
            self.executable, running, again, state = self._settle(before, pattern)
            if again:
                self._run_again(before, state)
        saved = self._saved
        assert saved is not None
        self._drop()
        tangents = [grad for grad in arriving if grad is not None]
        self._sharded.in_flight.restore_copies(self._num_refreshes)
        self.executable.restore_kept(self._generation)
        run = self._runs.backward_aside if self._is_aside else self._runs.backward
        input_grads = run(running, saved, tangents)
        return [input_grads[index] for index in self.trained_inputs]

    def _check(self) -> None:
        """Raise StaleBackwardError if backward would give wrong gradients."""
        if torch.is_grad_enabled():
            raise StaleBackwardError(
                "create_graph=True: gradients of gradients are not in the schedule. Take the penalty inside forward: "
                "torch.autograd.grad(output, input, create_graph=True) there, and return what you make of it."
            )
        if self._saved is None:
            raise StaleBackwardError(
                "A second backward through one forward: its saved values are freed as they are used (retain_graph has "
                "no effect). Call the module again before each backward, or add the losses up and call backward once."
            )
        if self._param_version != self._sharded.version():
            self._drop()
            raise StaleBackwardError(
                "The parameters changed between this forward and its backward (an optimizer step or a load). Call the "
                "module again before backward."
            )
        if self.executable.reads_written and self._num_writes != self._sharded.in_flight.num_writes:
            self._drop()
            raise StaleBackwardError(
                f"A later forward has written {', '.join(self.executable.step.written)}, which this backward reads. "
                "Call backward before the next forward."
            )
        if self._late_values is not None:
            changed = self.executable.plan.captured.state.changed_since(self._late_values)
            if changed is not None:
                self._drop()
                raise StaleBackwardError(
                    f"{changed} has changed between this forward and its backward, which reads it (in a hook that "
                    "returns a value, or an autograd.Function). A compiled step reads Python state at its forward. "
                    "Change it before the forward, or behind the backward."
                )
        if self._versions != torch_internals.changes_of_each(self._saved, self.executable.reachable):
            self._drop()
            raise StaleBackwardError(
                "An input, an output or a buffer that backward needs was changed in place after this forward. Change a "
                "copy of it instead, and call the module again before backward."
            )

    def _check_hooked(self, pattern: Pattern) -> None:
        """Refuse to leave out the gradient that an output gets from other outputs, if somebody wants to see it.

        Args:
            pattern: the outputs that receive a gradient.
        """
        for index, reference in zip(self.executable.tensor_outputs, self._outputs, strict=True):
            output = reference()
            if output is not None and torch_internals.is_gradient_wanted(output):
                self._check_computed_outside(index, pattern, "has a hook or retain_grad()")

    def check_asked(self, number: int, numbers: Collection[int]) -> None:
        """Refuse to give a part of the gradient of an output that torch.autograd.grad asks for.

        Args:
            number: of the output, among the tensors that forward returned.
            numbers: those that what is differentiated was computed from, outside of the model.
        """
        indices = self.executable.tensor_outputs
        self._check_computed_outside(
            indices[number], {indices[each] for each in numbers}, "is one by which torch.autograd.grad differentiates"
        )

    def _check_computed_outside(self, index: int, pattern: Collection[int], what: str) -> None:
        if not self.executable.outputs_computed_from(index).isdisjoint(pattern):
            raise FxzeroError(
                f"An output of the model {what}, and the loss was computed from it inside of the model: a compiled "
                "step does not return its gradient. Register a hook on it inside of forward (tensor.register_hook), or "
                "compute the loss from the output outside of the model."
            )

    def _drop(self) -> None:
        self._saved, self._inputs, self._before, self._settle = None, [], ([], []), None
        self._replaced, self._params_before, self._late_values = [], [], None

    def _run_again(self, before: Executable, state: list[Any]) -> None:
        """Repeat forward under another plan than before, with equal draws, inputs and buffers.

        Args:
            state: the inputs that are Python state.
        """
        executable = self.executable
        inputs, buffers = [*self._inputs[: executable.num_inputs], *state], self._sharded.buffers(executable)
        for index, old in zip(before.written_inputs, self._before[0], strict=True):
            inputs[index] = old
        for index, old in zip(before.written_buffers, self._before[1], strict=True):
            buffers[index] = old
        draws, device = self._rng_state, self._sharded.devices.compute
        with (
            nullcontext() if draws is None else drawing_from(draws, device),
            self._written_params_put_back(before),
            no_hooks(),
        ):
            _, self._saved = executable.forward(inputs, buffers)
        self._generation = self._sharded.in_flight.generation
        self._num_refreshes = self._sharded.in_flight.num_refreshes

    @contextmanager
    def _written_params_put_back(self, before: Executable) -> Generator[None]:
        """Let parameters that forward writes be what they were before it, inside of the block."""
        names = before.step.written
        now = [data.clone() for data in before.written_params]
        self._sharded.set_shards(dict(zip(names, self._params_before, strict=True)))
        try:
            yield
        finally:
            self._sharded.set_shards(dict(zip(names, now, strict=True)))


def _copy_some(tensors: Sequence[torch.Tensor], indices: Sequence[int]) -> list[torch.Tensor]:
    return [tensors[index].clone() for index in indices]


class StepFunction(torch.autograd.Function):
    """Forward and backward of one call. Its tensor arguments are an anchor and the inputs that require grad.

    The anchor requires grad, so that autograd calls backward also where no input does.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        outputs = call.forward()
        executable = call.executable
        tensors = [outputs[index] for index in executable.tensor_outputs]
        fixed = [outputs[index] for index in executable.tensor_outputs if index not in executable.differentiable]
        ctx.mark_non_differentiable(*fixed)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *arriving: torch.Tensor | None) -> tuple[Any, ...]:
        return (None, None, *ctx.call.backward(arriving, ctx.next_functions[0][0]))

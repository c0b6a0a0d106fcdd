"""Each call of a compiled module: find or make the plan for its kind, run forward, and run backward when that comes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fxzero.capture.call import CallSpec, flatten_call
from fxzero.errors import InputMismatchError
from fxzero.graph.variant import Stash
from fxzero.host.memory_in_use import MemoryInUse
from fxzero.module.call import Call, StepFunction
from fxzero.module.call_kind import Arguments, Pattern, Signature
from fxzero.module.plan_cache import PlanCache
from fxzero.module.plan_maker import PlanMaker
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.clip import clip_grad_norm_
from fxzero.runtime.executable import BoundPlan, Executable


class Engine:
    """Runs the calls of one compiled module.

    Args:
        sharded: the model and this rank's shards.
        maker: makes the plans of the model.
        clip_grad_norm: a function like `clip_grad_norm_` of `fxzero.runtime.clip`.
    """

    def __init__(
        self, sharded: ShardedModel, maker: PlanMaker, clip_grad_norm: Callable[..., torch.Tensor] = clip_grad_norm_
    ) -> None:
        self.sharded, self.maker, self.clip_grad_norm = sharded, maker, clip_grad_norm
        self.plans = PlanCache()
        self.synchronize = True
        """False inside no_sync()."""
        self.last: Executable | None = None
        """The executable that ran last, which `zero.schedule` shows."""
        self.memory_in_use = MemoryInUse(sharded.devices.compute)
        self._anchor = torch.empty(0, requires_grad=True)

    def prepare(self, arguments: Arguments) -> tuple[list[torch.Tensor], Signature, Executable]:
        """The tensors, the signature and the executable of a call, which is planned if its kind is new."""
        inputs, spec = flatten_call(*arguments)
        signature = self._signature(spec)
        pattern = self.plans.pattern_of(signature)
        bound = self.plans.find(signature, pattern)
        if bound is None:
            bound = self._make(signature, pattern, arguments)
        executable = bound.executable(synchronize=self.synchronize or not signature.grad)
        self.last = executable
        return inputs, signature, executable

    def __call__(self, arguments: Arguments) -> Any:
        with self.sharded.phases.phase("forward" if torch.is_grad_enabled() else "evaluation"):
            return self._call(arguments)

    def _call(self, arguments: Arguments) -> Any:
        sharded, tuning = self.sharded, self.maker.tuning
        sharded.adopt_replaced_data()
        if tuning.is_due and torch.is_grad_enabled() and self.synchronize and self.maker.tune_again():
            self.plans.clear()
        inputs, signature, executable = self.prepare(arguments)
        if executable.example_only:
            raise InputMismatchError("An input is on the meta device: it can be an example, not a batch to run on.")
        executable.stopwatch = tuning.stopwatch_for(executable)
        device_type = sharded.devices.compute.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                tensors = self._run(executable, inputs, signature, arguments)
        else:
            tensors = self._run(executable, inputs, signature, arguments)
        return executable.plan.captured.output.rebuild(tensors)

    def _run(
        self, executable: Executable, inputs: list[torch.Tensor], signature: Signature, arguments: Arguments
    ) -> Sequence[Any]:
        if executable.step.has_backward:
            replan = partial(self._replan, signature, arguments, executable.step.synchronize)
            call = Call(self.sharded, self.backward, executable, inputs, replan)
            return StepFunction.apply(call, self._anchor, *[x for x in inputs if x.requires_grad])  # type: ignore[no-any-return]
        with torch.no_grad():
            outputs, _ = executable.forward(inputs, self.sharded.buffers(executable))
        return [outputs[index] for index in executable.tensor_outputs]

    def backward(self, executable: Executable, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run a backward, and update `.grad` of each parameter that it reaches.

        Returns:
            The gradients of the inputs.
        """
        gradients, in_flight = self.sharded.gradients, self.sharded.in_flight
        assert gradients is not None
        if executable.leaves_buckets:
            in_flight.before_backward()
        synchronize = executable.step.synchronize
        variant = gradients.variant(synchronize=synchronize)
        if variant.stash is Stash.FLUSH:
            gradients.check_flush(executable.reduced)
        input_grads = executable.backward(variant, saved, tangents)
        if synchronize:
            self.maker.tuning.after_backward(executable)
            gradients.publish(executable.reached, variant)
        else:
            gradients.hold(executable.reached, variant)
        if executable.leaves_buckets:
            in_flight.after_backward()
        return input_grads

    def after_optimizer(self, seconds: float) -> None:
        """Note that a step of an optimizer is over, of any in this process."""
        self.sharded.in_flight.after_step()
        self.maker.tuning.after_optimizer(seconds)

    def _signature(self, spec: CallSpec) -> Signature:
        sharded = self.sharded
        device_type = sharded.devices.compute.type
        autocast = torch.is_autocast_enabled(device_type)
        return Signature(
            spec,
            tuple([module.training for module in sharded.modules]),
            tuple([param.requires_grad for param in sharded.param_list]),
            torch.is_grad_enabled(),
            (autocast, torch.get_autocast_dtype(device_type) if autocast else None),
        )

    def _make(self, signature: Signature, pattern: Pattern | None, arguments: Arguments) -> BoundPlan:
        bound, pattern, drops_others = self.maker.make(signature, pattern, arguments)
        if drops_others:
            self.plans.clear()
        self.plans.keep(signature, pattern, bound)
        return bound

    def _replan(self, signature: Signature, arguments: Arguments, synchronize: bool, pattern: Pattern) -> Executable:
        """The executable of a call for another pattern of arriving gradients, which later calls of its kind assume."""
        bound = self.plans.find(signature, pattern)
        if bound is None:
            with self.maker.as_in(signature):
                bound = self._make(signature, pattern, arguments)
        self.plans.prefer(signature, pattern)
        self.last = executable = bound.executable(synchronize=synchronize)
        return executable

"""A call of a trained module: the plan for its kind, its forward, and its backward when that comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from fxzero.capture.call import CallSpec, flatten_call
from fxzero.comm.base import Comm
from fxzero.errors import InputMismatchError
from fxzero.graph.variant import Stash
from fxzero.host.memory_in_use import MemoryInUse
from fxzero.module.call import Call, StepFunction
from fxzero.module.call_kind import Pattern, Signature
from fxzero.module.plan_cache import PlanCache
from fxzero.module.plan_maker import PlanMaker
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.clip import clip_grad_norm_
from fxzero.runtime.executable import BoundPlan, Executable
from fxzero.runtime.gradients import Gradients

Clip: TypeAlias = Callable[[Gradients | None, Comm, float, float, bool], torch.Tensor]


class Engine:
    """What stands behind a trained module.

    Args:
        sharded: the model and this rank's shards.
        maker: makes its plans.
        clip_grad_norm: clips gradients by their norm.
    """

    def __init__(self, sharded: ShardedModel, maker: PlanMaker, clip_grad_norm: Clip = clip_grad_norm_) -> None:
        self.sharded, self.maker, self.clip_grad_norm = sharded, maker, clip_grad_norm
        self.plans = PlanCache()
        self.synchronize = True
        """False inside no_sync()."""
        self.last: Executable | None = None
        """What ran last: `zero.schedule` shows it."""
        self.memory_in_use = MemoryInUse(sharded.devices.compute)
        self._anchor = torch.empty(0, requires_grad=True)

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor], Signature, Executable]:
        """The tensors of a call, what chooses its plan, and what it runs, planned if it is new."""
        inputs, spec = flatten_call(args, kwargs)
        signature = self._signature(spec)
        bound = self.plans.find(signature)
        if bound is None:
            bound = self._make(signature, self.plans.pattern_of(signature), args, kwargs)
        executable = bound.executable(synchronize=self.synchronize or not signature.grad)
        self.last = executable
        return inputs, signature, executable

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sharded, tuning = self.sharded, self.maker.tuning
        sharded.adopt_replaced_data()
        if tuning.is_due and torch.is_grad_enabled() and self.synchronize and self.maker.tune_again():
            self.plans.clear()
        inputs, signature, executable = self.prepare(args, kwargs)
        if executable.example_only:
            raise InputMismatchError("An input is on the meta device: it can be an example, not a batch to run on.")
        replan = lambda pattern: self._replan(signature, pattern, executable, args, kwargs)  # noqa: E731
        call = Call(sharded, self.backward, executable, inputs, replan)
        executable.stopwatch = tuning.stopwatch if tuning.measures(executable) else executable.lines_to_measure
        device_type = sharded.devices.compute.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                tensors = self._run(call, executable, inputs)
        else:
            tensors = self._run(call, executable, inputs)
        return executable.plan.captured.output.rebuild(tensors)

    def _run(self, call: Call, executable: Executable, inputs: list[torch.Tensor]) -> Sequence[Any]:
        if executable.step.has_backward:
            return StepFunction.apply(call, self._anchor, *[x for x in inputs if x.requires_grad])  # type: ignore[no-any-return]
        with torch.no_grad():
            outputs = call.forward(keep=False)
        return [outputs[index] for index in executable.tensor_outputs]

    def backward(self, executable: Executable, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run a backward and bring `.grad` of every parameter it reached up to date: the gradients of the inputs."""
        gradients, in_flight = self.sharded.gradients, self.sharded.in_flight
        assert gradients is not None
        stays = executable.leaves_buckets
        if stays:
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
        if stays:
            in_flight.after_backward()
        return input_grads

    def after_optimizer(self, seconds: float) -> None:
        """A step of an optimizer, any, is over."""
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

    def _make(
        self, signature: Signature, pattern: Pattern | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BoundPlan:
        bound, pattern, drops_others = self.maker.make(signature, pattern, args, kwargs)
        if drops_others:
            self.plans.clear()
        self.plans.keep(signature, pattern, bound)
        return bound

    def _replan(
        self,
        signature: Signature,
        pattern: Pattern,
        before: Executable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Executable:
        """What a call runs for another pattern of arriving gradients; later calls of this kind start with it."""
        bound = self.plans.get(signature, pattern)
        if bound is None:
            with self.maker.as_in(signature):
                bound = self._make(signature, pattern, args, kwargs)
        self.plans.prefer(signature, pattern)
        self.last = executable = bound.executable(synchronize=before.step.synchronize)
        return executable

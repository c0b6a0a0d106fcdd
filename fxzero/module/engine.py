"""Each call of a compiled module: find or make the plan for its kind, run forward, and run backward when that comes."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fxzero import torch_internals
from fxzero.capture.call import CallSpec, flatten_call, geometry_of
from fxzero.capture.numbers import PinnedNumberError
from fxzero.capture.state import Values
from fxzero.comm import agree
from fxzero.comm.tensor_parallel import Parts
from fxzero.errors import CaptureError, FxzeroError, InputMismatchError, PlanError
from fxzero.graph.variant import Stash
from fxzero.host.memory_in_use import MemoryInUse
from fxzero.module.call import Call, StepFunction
from fxzero.module.call_kind import Arguments, Method, Pattern, Signature, settings
from fxzero.module.gradients.heads import Heads
from fxzero.module.plan_cache import PlanCache
from fxzero.module.plan_maker import PlanMaker
from fxzero.module.ranks.captures import Captures
from fxzero.module.replaced_data import Replaced, in_shards
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
        self.heads = Heads(sharded.group, sharded.comm.rank, sharded.timeout, sharded.comm.is_alone)
        self.synchronize = True
        """False inside no_sync()."""
        self.last: Executable | None = None
        """The executable that ran last, which `zero.schedule` shows."""
        self.memory_in_use = MemoryInUse(sharded.devices.compute)
        self._signature_before: Signature | None = None
        """The kind of the call before."""
        self.anchor = torch.empty(0, requires_grad=True)
        """Stands for the parameters in the graph of autograd."""
        self.pending_save: Future[Path] | None = None
        """The checkpoint that a thread writes, or has written last; None if there was none."""
        self.captures: Captures | None = None
        """Makes CUDA graphs of plans, if the user asked for that."""
        self.asked: dict[str, torch.Tensor] | None = None
        """Receives the gradients of backwards while torch.autograd.grad asks for some; else None."""

    def prepare(
        self, arguments: Arguments, method: Method | None = None
    ) -> tuple[list[torch.Tensor], Signature, Executable]:
        """The tensors, the signature and the executable of a call, which is planned if its kind is new."""
        inputs, own = self._flatten(arguments)
        signature = self._signature(self.maker.numbers.arguments.generalized(own), method)
        pattern = self.plans.pattern_of(signature)
        bound = self.plans.find(signature, pattern, inputs)
        if bound is None:
            self.plans.note_changes(signature, pattern, self.maker.numbers)
            try:
                bound = self._make(signature, pattern, arguments)
            except PinnedNumberError:
                return self.prepare(arguments, method)
        executable = bound.executable(synchronize=not signature.grad or self._reduces_next)
        self.last = executable
        return inputs, signature, executable

    def _flatten(self, arguments: Arguments) -> tuple[list[torch.Tensor], CallSpec]:
        """The inputs of a step, ignored parameters last, and the spec of its call."""
        inputs, spec = flatten_call(*arguments)
        return [*inputs, *self.sharded.ignored.values()], spec

    @property
    def _reduces_next(self) -> bool:
        """True if the backward of a call that begins now must reduce gradients."""
        if not self.synchronize:
            return False
        recipe, gradients = self.sharded.recipe, self.sharded.gradients
        if not recipe.keeps_unsharded:
            return True
        return gradients is not None and gradients.num_held + 1 >= recipe.accumulate

    def __call__(self, arguments: Arguments, method: Method | None = None) -> Any:
        """Call the model.

        Args:
            method: the method to call; default: the model itself, with its hooks.
        """
        self.sharded.phases.note_trained()
        word = "forward" if torch.is_grad_enabled() else "evaluation"
        with self.sharded.phases.phase(word if method is None else f"{word} of {method.name}()"):
            if replaced := self.sharded.replaced():
                with in_shards(replaced):
                    return self._call(arguments, method, replaced)
            return self._call(arguments, method, replaced)

    def _call(self, arguments: Arguments, method: Method | None, replaced: Replaced) -> Any:
        sharded, tuning = self.sharded, self.maker.tuning
        sharded.check_params()
        _check_modes()
        if tuning.is_due and torch.is_grad_enabled() and self.synchronize and self.maker.tune_again():
            self.plans.clear()
        inputs, signature, executable = self.prepare(arguments, method)
        if executable.example_only:
            raise InputMismatchError("An input is on the meta device: it can be an example, not a batch to run on.")
        executable.stopwatch = tuning.stopwatch_for(executable)
        if self.captures is not None:
            self.captures.before_forward(executable, is_settled=tuning.is_settled)
        captured = executable.plan.captured
        values = captured.state.read()
        device_type = sharded.devices.compute.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                tensors = self._run(executable, inputs, values, signature, arguments, replaced)
        else:
            tensors = self._run(executable, inputs, values, signature, arguments, replaced)
        sharded.phases.note_writes(executable.writes(values.inputs))
        if captured.state.leaves_behind:
            captured.state.replay(tensors, values)
        return captured.output.rebuild(tensors)

    def _run(
        self,
        executable: Executable,
        inputs: list[torch.Tensor],
        values: Values,
        signature: Signature,
        arguments: Arguments,
        replaced: Replaced,
    ) -> Sequence[Any]:
        if executable.has_backward:
            settle = partial(self._settle, signature, arguments, values)
            call = Call(self.sharded, self, executable, [*inputs, *values.inputs], settle, replaced, signature.called)
            returned = StepFunction.apply(call, self.anchor, *[x for x in inputs if x.requires_grad])
            call.watch(returned)  # type: ignore[arg-type]
            return returned  # type: ignore[return-value]
        with torch.no_grad():
            outputs, _ = executable.forward([*inputs, *values.inputs], self.sharded.buffers(executable))
        return [outputs[index] for index in executable.tensor_outputs]

    def gradients_are_asked_for(self, anchor: Any) -> bool:
        """True in a backward that leaves `.grad` alone, as torch.autograd.grad asks for some gradients.

        Args:
            anchor: the node of the anchor.
        """
        return self.asked is not None or not torch_internals.runs_in_this_backward(anchor)

    def backward_aside(self, executable: Executable, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run a backward that leaves `.grad` alone, and hand its gradients to who asks for them.

        Returns:
            The gradients of the inputs.
        """
        gradients = self.sharded.gradients
        assert gradients is not None
        synchronize = executable.step.synchronize
        if gradients.num_held or not (synchronize or self.sharded.recipe.keeps_unsharded):
            raise PlanError(
                "torch.autograd.grad, or backward(inputs=...), while no_sync() or accumulate= holds gradients that "
                "ranks have not averaged. Call it before such an accumulation begins, or behind its last backward."
            )
        with gradients.set_aside():
            variant = gradients.variant(synchronize=synchronize)
            input_grads = executable.backward(variant, saved, tangents)
            reached, unreached = executable.reached, executable.unreached
            if not synchronize:
                gradients.hold(reached, variant, executable.uncertain, executable.reduced_outside)
                variant, unreached = self.sharded.reduce_held_unpublished()
                reached = ()
            arrived = gradients.arrived(reached, variant, unreached)
            gradients.drop_held()
            if self.asked is not None:
                gradients.check_hooks(arrived)
                for fqn in arrived:
                    value, before = gradients.view(fqn).clone(), self.asked.get(fqn)
                    self.asked[fqn] = value if before is None else before + value
        self.sharded.in_flight.after_step()
        return input_grads

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
            gradients.publish(executable.reached, variant, executable.unreached, executable.reduced)
        else:
            gradients.hold(executable.reached, variant, executable.uncertain, executable.reduced_outside)
        if executable.leaves_buckets:
            in_flight.after_backward()
        return input_grads

    def after_backward(self, executable: Executable) -> None:
        """Reduce what `accumulate` backwards have held, where the last of them has not reduced all of it.

        Its forward may have begun before others had their backward, or it uses other parameters than they.
        """
        accumulate, gradients = self.sharded.recipe.accumulate, self.sharded.gradients
        if accumulate == 1 or not self.synchronize or gradients is None or not gradients.num_held:
            return
        if executable.step.synchronize or gradients.num_held >= accumulate:
            self.sharded.reduce_held()

    def compare_optimizer_state(self, state: str) -> None:
        """Refuse to step where ranks have other kinds of optimizer state, before any of them does; a collective.

        Raises:
            RankMismatchError: names who has what.
        """
        sharded = self.sharded
        with sharded.phases.phase_of_step("first step of an optimizer"):
            agree.agree(sharded.group, "optimizer state", [state], timeout=sharded.timeout)

    def agree_on_found(self, found: Sequence[torch.Tensor]) -> None:
        """Let what a gradient scaler has found on any rank be what it has found here; a collective, without the host.

        Args:
            found: tensors of one element, not 0 where a gradient is not finite.
        """
        sharded = self.sharded
        if sharded.comm.is_alone and sharded.cut_by is None:
            return
        largest = torch.zeros((), device=sharded.devices.shards)
        for each in found:
            torch.maximum(largest, each.view(()).to(largest), out=largest)
        with sharded.phases.phase("unscaling of gradients"):
            sharded.comm.all_reduce(largest, "max")
            if sharded.cut_by is not None:
                Parts(sharded.cut_by).all_reduce(largest, "max")
        for each in found:
            each.fill_(0).add_(largest.to(each))

    def before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Reduce the gradients of an optimizer that are held, before it takes them.

        Raises:
            PlanError: no_sync() holds them.
            FxzeroError: its parameters are gathered for a block, or a method.
        """
        if self.sharded.whole:
            self._check_no_member(optimizer, self.sharded.whole)
        self.sharded.is_stepping = True
        gradients = self.sharded.gradients
        if gradients is not None and gradients.num_held:
            gradients.check_reduced({id(param) for group in optimizer.param_groups for param in group["params"]})

    def _check_no_member(self, optimizer: torch.optim.Optimizer, fqns: Collection[str]) -> None:
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        fqn = next((fqn for fqn in fqns if id(self.sharded.params[fqn]) in held), None)
        if fqn is not None and self.sharded.shards is not None:
            raise FxzeroError(
                f"{type(optimizer).__name__} steps {fqn}, which is gathered here; its gradient and its state are those "
                f"of a shard. Step outside of {self.sharded.phases.block or 'the method that gathers it'}."
            )

    def after_optimizer(self, seconds: float) -> None:
        """Note that a step of an optimizer is over, of any in this process."""
        self.sharded.is_stepping = False
        self.sharded.in_flight.after_step()
        self.maker.tuning.after_optimizer(seconds)

    def _signature(self, spec: CallSpec, method: Method | None) -> Signature:
        sharded = self.sharded
        device_type = sharded.devices.compute.type
        autocast = torch.is_autocast_enabled(device_type)
        signature = Signature(
            method,
            spec,
            sharded.training(),
            sharded.phases.trained,
            torch.is_grad_enabled(),
            (autocast, torch.get_autocast_dtype(device_type) if autocast else None),
            settings(),
            tuple([geometry_of(param) for param in sharded.ignored.values()]),
        )
        before = self._signature_before
        if before is not None and before == signature:
            return before  # the object that lookups know: it has its hash, and is equal to itself at once
        self._signature_before = signature
        return signature

    def _make(self, signature: Signature, pattern: Pattern | None, arguments: Arguments) -> BoundPlan:
        bound, pattern, drops_others = self.maker.make(signature, pattern, arguments)
        if drops_others:
            self.plans.clear()
        self.plans.keep(signature, pattern, bound)
        return bound

    def _settle(
        self,
        signature: Signature,
        arguments: Arguments,
        values: Values,
        executable: Executable,
        pattern: Pattern,
    ) -> tuple[Executable, Executable, bool, list[Any]]:
        """What runs forward and backward of a call whose backward begins.

        Args:
            values: of the Python state at the call.
            executable: the one whose forward has run.
            pattern: the outputs that receive a gradient.

        Returns:
            The executables of forward and backward, whether forward must run again, as then on all ranks, and the
            inputs that are Python state then.
        """
        wanted, again = self.heads.settle(signature, executable, pattern, self.maker.meet)
        state, synchronize = values.inputs, executable.step.synchronize
        if again:
            if not self.sharded.comm.is_alone:
                self.plans.clear()
            with executable.plan.captured.state.as_before(values):
                bound = self.plans.find(signature, wanted, self._flatten(arguments)[0])
                if bound is None:
                    with self.maker.as_in(signature):
                        bound = self._make(signature, wanted, arguments)
                state = bound.plan.captured.state.read().inputs
            self.plans.prefer(signature, wanted)
            self.last = executable = bound.executable(synchronize=synchronize)
        running = executable if pattern == wanted else executable.narrowed(pattern)
        return executable, running, again, state


def _check_modes() -> None:
    """Refuse to run where torch would have the operators do more than they say.

    Raises:
        CaptureError: names the mode.
    """
    if torch_internals.in_forward_ad():
        raise CaptureError(
            "A compiled step runs inside of forward-mode AD (torch.func.jvp or jacfwd, forward_ad.dual_level), whose "
            "tangents it would lose. Use torch.func.jvp inside of forward, where it is traced."
        )
    if torch_internals.in_function_transform():
        raise CaptureError("A compiled module cannot be called inside torch.func transforms. Use loss.backward().")
    if (mode := torch_internals.function_mode_of_user()) is not None:
        raise CaptureError(
            f"A compiled step runs inside of {mode}, a TorchFunctionMode, which sees none of its operators. Leave "
            "the mode before the call, or enter it inside of forward."
        )

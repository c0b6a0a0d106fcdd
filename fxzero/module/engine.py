"""The state behind a trained module: its layout once it is fixed, its shards, and one plan per kind of call."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Generator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxzero import torch_internals
from fxzero.capture import Captured, capture
from fxzero.capture.call import CallSpec, flatten_call
from fxzero.comm import agree
from fxzero.comm.base import Comm
from fxzero.comm.groups import Group, Hierarchy
from fxzero.comm.make import make_comm
from fxzero.comm.without_ranks import PlanningComm
from fxzero.errors import CaptureError, FxzeroError, InputMismatchError
from fxzero.graph.layout import Layout, ParamSpec
from fxzero.graph.variant import Stash
from fxzero.graph.verify import collectives
from fxzero.host.allocator import give_back_freed_memory
from fxzero.host.memory_in_use import MemoryInUse
from fxzero.module import weights
from fxzero.module.budget_round import Fitting
from fxzero.module.call import Call, StepFunction
from fxzero.module.call_kind import Signature
from fxzero.module.collective_orders import Mode, Orders
from fxzero.module.initialize import check_meta_model
from fxzero.module.optimizer_state import ParamShard
from fxzero.module.plan_cache import Pattern, PlanCache
from fxzero.module.tuning_rounds import Tuner
from fxzero.options import Options
from fxzero.planning.agreed_text import describe_layout
from fxzero.planning.fix_layout import in_layout, layout_in_registration_order, layout_of, warn_if_out_of_order
from fxzero.planning.plan import make_plan
from fxzero.reference import ablation
from fxzero.runtime.executable import Executable
from fxzero.runtime.gradients import Gradients
from fxzero.runtime.residency import Residency
from fxzero.runtime.shards import Shards, check_storage, spec_of
from fxzero.runtime.storage import Arena

logger = logging.getLogger(__name__)


@dataclass
class Engine:
    """See the module docstring. `model` is the user's; its Parameter objects become the shards."""

    model: nn.Module
    forward: Callable[..., Any]
    options: Options
    group: Group | None
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    synchronize: bool = True
    """False inside no_sync()."""
    last: Executable | None = None
    """The plan that ran last: the one that `zero.schedule` shows."""
    plans: PlanCache = field(default_factory=PlanCache)

    def __post_init__(self) -> None:
        self.params: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.specs: dict[str, ParamSpec] = {fqn: spec_of(fqn, param) for fqn, param in self.params.items()}
        check_storage(self.params)
        comm = make_comm(self.group, self.options.device, short_gloo_slices=self.options.short_gloo_slices)
        self.comm: Comm = ablation.comm_without(self.options.without, comm)
        self.clip_grad_norm = ablation.clip_without(self.options.without)
        if isinstance(self.comm, PlanningComm):  # nobody is there to send rank 0's values
            self.options = dataclasses.replace(self.options, sync_init=False)
        self.shards: Shards | None = None
        self.gradients: Gradients | None = None
        self.arena = Arena(self.options.device)
        self.gauge = MemoryInUse(self.options.device)
        this = weakref.proxy(self)  # no cycle: shards are freed with the last name of the module
        self.residency = Residency(
            lambda: this.gradients is not None and this.gradients.are_added_to,
            lambda: (this.version(), 0 if this.gradients is None else this.gradients.version),
        )
        self.fitting = Fitting()
        self.tuner = Tuner(self.options.tunes, self.options.keeps_free, self.options.cluster)
        self._orders = Orders(self.group, self.comm.rank, self.options.timeout)
        self._param_list = list(self.params.values())
        self._addresses: list[int] = []
        """Where the shard of each parameter lies; empty before the layout is fixed."""
        self._anchor = torch.empty(0, requires_grad=True)
        self._look_at_modules()
        check_meta_model(self.model, self.options.init_fn, set(self.model.state_dict()))

    def _look_at_modules(self) -> None:
        """Note the modules and who owns which buffer.

        Raises:
            FxzeroError: the parameters are not those that were there at compile.
        """
        now = dict(self.model.named_parameters())
        changed = sorted(fqn for fqn in {*now, *self.params} if now.get(fqn) is not self.params.get(fqn))
        if changed:
            raise FxzeroError(
                f"{changed[0]} was added, removed or replaced after fxzero.compile, which fixes the parameters of a "
                "model. Change the model before compile."
            )
        self._modules = list(self.model.modules())
        self._buffer_owners = {
            f"{prefix}.{name}" if prefix else name: (module, name)
            for prefix, module in self.model.named_modules()
            for name in torch_internals.buffers_of(module)
        }

    # -- a call --------------------------------------------------------------------------------------------------

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor], Signature, Executable]:
        """The tensors of a call, what chooses its plan, and the plan, made if it is new."""
        inputs, spec = flatten_call(args, kwargs)
        signature = self._signature(spec)
        executable = self.plans.find(signature)
        if executable is None:
            executable = self._make(signature, self.plans.pattern_of(signature), args, kwargs)
        self.last = executable
        return inputs, signature, executable

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if [param.data_ptr() for param in self._param_list] != self._addresses and self._addresses:
            self.adopt_replaced_data()
        if self.tuner.is_due and torch.is_grad_enabled() and self.synchronize:
            self._tune_again()
        inputs, signature, executable = self.prepare(args, kwargs)
        if executable.example_only:
            raise InputMismatchError("An input is on the meta device: it can be an example, not a batch to run on.")
        call = Call(self, executable, inputs, lambda pattern: self._replan(signature, pattern, args, kwargs))
        executable.stopwatch = self.tuner.stopwatch if self.tuner.measures(executable) else None
        device_type = self.options.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                tensors = self._run(call, executable, inputs)
        else:
            tensors = self._run(call, executable, inputs)
        return executable.plan.captured.output.rebuild(tensors)

    def _tune_again(self) -> None:
        """Choose order and prefetching from measured costs, once; plans are made again if that changes them."""
        if self.tuner.choose_again(self):
            self.plans.clear()
            self._orders = Orders(self.group, self.comm.rank, self.options.timeout)

    def _run(self, call: Call, executable: Executable, inputs: list[torch.Tensor]) -> Sequence[Any]:
        if executable.step.has_backward:
            return StepFunction.apply(call, self._anchor, *[x for x in inputs if x.requires_grad])  # type: ignore[no-any-return]
        with torch.no_grad():
            outputs = call.forward(keep=False)
        return [outputs[index] for index in executable.tensor_outputs]

    def _signature(self, spec: CallSpec) -> Signature:
        device_type = self.options.device.type
        autocast, grad = torch.is_autocast_enabled(device_type), torch.is_grad_enabled()
        return Signature(
            spec,
            tuple([module.training for module in self._modules]),
            tuple([param.requires_grad for param in self._param_list]),
            grad,
            (autocast, torch.get_autocast_dtype(device_type) if autocast else None),
            self.synchronize or not grad,
        )

    def buffers(self, executable: Executable) -> list[torch.Tensor]:
        """The module's buffers of now, as the generated forward takes them."""
        owners = self._buffer_owners
        buffers = [
            torch_internals.buffers_of(module)[name] for fqn in executable.buffers for module, name in [owners[fqn]]
        ]
        if [(buffer.shape, buffer.dtype) for buffer in buffers] != executable.buffer_geometry:  # type: ignore[union-attr]
            raise InputMismatchError(
                f"A buffer among {', '.join(executable.buffers)} has another shape or dtype than when this kind of "
                "call was traced. Keep them, and write into the buffer."
            )
        return buffers  # type: ignore[return-value]

    def named_buffers(self) -> list[tuple[str, torch.Tensor]]:
        """The model's buffers of now by canonical name, each once."""
        return list(self.model.named_buffers())

    def set_buffer(self, fqn: str, buffer: torch.Tensor) -> None:
        """Put another tensor in the place of a buffer, wherever the model registers it."""
        old = dict(self.named_buffers())[fqn]
        for module in self._modules:
            for name, value in torch_internals.buffers_of(module).items():
                if value is old:
                    torch_internals.buffers_of(module)[name] = buffer

    def has_meta_params(self) -> bool:
        """True if some parameter has no values yet."""
        return any(param.is_meta for param in self._param_list)

    def held_shards(self) -> dict[int, ParamShard]:
        """What this rank holds of each parameter; empty before the layout is fixed."""
        return weights.param_shards(self, self.shards) if self.shards is not None else {}

    def after_optimizer(self, seconds: float) -> None:
        """A step of an optimizer, any, is over."""
        self.residency.expire()
        self.tuner.after_optimizer(seconds)

    def version(self) -> int:
        """A number that changes when a parameter is changed in place."""
        return torch_internals.num_changes(self._param_list)

    def backward(self, executable: Executable, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run a backward and bring `.grad` of every parameter it reached up to date."""
        gradients = self.gradients
        assert gradients is not None
        stays = executable.leaves_buckets
        if stays:
            self.residency.look()
        synchronize = executable.step.synchronize
        variant = gradients.variant(synchronize=synchronize)
        if variant.stash is Stash.FLUSH:
            gradients.check_flush(executable.reduced)
        input_grads = executable.backward(variant, saved, tangents)
        if synchronize:
            self.tuner.after_backward(executable)
            gradients.publish(executable.reached, variant)
        else:
            gradients.hold(executable.reached, variant)
        if stays:
            self.residency.end_backward()
        return input_grads

    # -- plans ---------------------------------------------------------------------------------------------------

    def _replan(
        self, signature: Signature, pattern: Pattern, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Executable:
        """The plan for another pattern of arriving gradients; later calls of this kind start with it."""
        executable = self.plans.get(signature, pattern)
        if executable is None:
            with self._as_in(signature):
                executable = self._make(signature, pattern, args, kwargs)
        self.plans.prefer(signature, pattern)
        self.last = executable
        return executable

    @contextmanager
    def _as_in(self, signature: Signature) -> Generator[None]:
        """Autocast and training flags as they were at the call, for a trace that comes later."""
        flags = [module.training for module in self._modules]
        enabled, dtype = signature.autocast
        try:
            for module, training in zip(self._modules, signature.training, strict=True):
                module.training = training
            with torch.autocast(self.options.device.type, dtype=dtype, enabled=enabled):
                yield
        finally:
            for module, training in zip(self._modules, flags, strict=True):
                module.training = training

    def _make(
        self, signature: Signature, pattern: Pattern | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Executable:
        """Trace, plan and bind; fix the layout if this is the first plan."""
        self._look_at_modules()
        if torch_internals.in_function_transform():
            raise CaptureError("A compiled module cannot be called inside torch.func transforms. Use loss.backward().")
        with torch.inference_mode(False), torch_internals.outside_of_autograd_modes():
            executable, pattern = self._plan(signature, pattern, args, kwargs)
        give_back_freed_memory()
        self.plans.keep(signature, pattern, executable)
        return executable

    def _plan(
        self, signature: Signature, pattern: Pattern | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Executable, Pattern]:
        needs_grad = any(signature.trained) or any(leaf[4] for leaf in signature.tensor_leaves)
        kind = (signature.grad and needs_grad, signature.trained, signature.synchronize)
        fixes_layout = self.shards is None
        others_wait = fixes_layout or self._orders.expects_agreement(*kind)
        topic = "layout" if fixes_layout else "mode"
        reporting = partial(agree.reporting_failure, self.group, topic)
        with reporting() if others_wait else nullcontext():
            captured = self._capture(signature, pattern, args, kwargs, with_backward=kind[0])
        if self.tuner.must_choose(self, captured.step):
            self.tuner.choose(self, captured.step, topic)
        with reporting() if others_wait else nullcontext():
            passes = self.tuner.passes(self.options.passes)
            passes = in_layout(captured.step, passes, self.shards.layout if self.shards else None)
            choice = self.fitting.choose(self, captured.step, passes)
        if choice is not None:
            self.fitting.agree(self, choice, topic)
            self.plans.clear()  # made before it, of evaluations: they know of no bucket that has a place of its own
        with reporting() if others_wait else nullcontext():
            plan = make_plan(captured, passes, self.fitting.choice)
            order = collectives(plan.step)
        if fixes_layout:
            self.fix_layout(layout_of(plan.step, self.options.passes), order)
        assert self.shards is not None and self.gradients is not None
        if self._orders.is_empty and not fixes_layout:
            warn_if_out_of_order(plan.step, self.shards.layout)
        mode = Mode(plan.step.has_backward, *kind[1:], captured.differentiated)
        self._orders.check(mode, signature.flags, order, agreed=fixes_layout)
        executable = Executable(plan, self.shards, self.gradients, self.comm, self.arena, self.residency)
        self.fitting.warn_if_over(self, executable.step)
        executable.example_only = any(leaf[3].type == "meta" for leaf in signature.tensor_leaves)
        return executable, captured.differentiated

    def _capture(
        self,
        signature: Signature,
        pattern: Pattern | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        with_backward: bool,
    ) -> Captured:
        specs = {
            fqn: dataclasses.replace(spec, requires_grad=trained)
            for (fqn, spec), trained in zip(self.specs.items(), signature.trained, strict=True)
        }
        captured = capture(
            self.model,
            self.forward,
            args,
            kwargs,
            specs,
            device=self.options.device,
            sharding=self.comm.sharding,
            with_backward=with_backward,
            differentiated=pattern,
        )
        captured.step.synchronize = signature.synchronize
        captured.step.layout = self.options.layout
        captured.step.without = self.options.without
        return captured

    def fix_layout(self, layout: Layout, order: Sequence[str] = (), loaded: AbstractSet[str] = frozenset()) -> None:
        """Decide which rank owns what, on all ranks alike, make the storage for it, and fill it."""
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise FxzeroError(
                "torch.distributed was initialised after fxzero.compile, which took this rank for the only one. Call "
                "init_process_group() first."
            )
        lines = describe_layout(layout, self.options.agreed()) + [f"collective {line}" for line in order]
        lines += [f"mesh: {self.group}"] if isinstance(self.group, Hierarchy) else []
        agree.agree(self.group, "layout", lines, timeout=self.options.timeout)
        with torch.inference_mode(False):  # shards made in it could not be trained
            shards = Shards(layout, self.comm.rank, self.options.device)
            weights.fill_shards(self, shards, loaded)
            self.shards, self.gradients = shards, Gradients(shards, self.params)
            self._addresses = [param.data_ptr() for param in self._param_list]

    def adopt_replaced_data(self) -> None:
        """Copy what the user put in the place of a shard (`param.data = ...`) into it.

        Raises:
            FxzeroError: it is no shard.
        """
        for fqn, param, address in zip(self.params, self._param_list, self._addresses, strict=False):
            if param.data_ptr() == address:
                continue
            assert self.shards is not None
            data, shard = param.data, self.shards.param_view(fqn)
            if (data.shape, data.dtype, data.device) != (shard.shape, shard.dtype, shard.device):
                raise FxzeroError(
                    f"The data of {fqn} was replaced by {data.dtype} {tuple(data.shape)} on {data.device}; its shard "
                    f"here is {shard.dtype} {tuple(shard.shape)}. Load full weights with load_state_dict()."
                )
            param.data = shard
            with torch.no_grad():
                param.copy_(data)

    def fix_layout_without_trace(self, loaded: AbstractSet[str] = frozenset()) -> None:
        """Fix the layout in registration order, if it is not fixed yet."""
        self.adopt_replaced_data()
        if self.shards is None:
            now = [dataclasses.replace(s, requires_grad=self.params[s.fqn].requires_grad) for s in self.specs.values()]
            passes, name = self.options.passes, self.options.layout
            layout = layout_in_registration_order(now, self.comm.shard_ranks, passes, name)
            self.fix_layout(layout, loaded=loaded)

"""The state behind a trained module: its layout once it is fixed, its shards, and one plan per kind of call."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxzero import agree, compat, state
from fxzero.autograd import Call, StepFunction
from fxzero.capture import Captured, capture
from fxzero.comm import Comm, PlanningComm, make_comm
from fxzero.errors import PlanError
from fxzero.gradients import Gradients
from fxzero.layout import Layout, ParamSpec
from fxzero.materialize import check_meta_model
from fxzero.memory import Arena
from fxzero.optim import ParamShard
from fxzero.passes import Pass
from fxzero.planner import describe_layout, layout_in_registration_order, layout_of, make_plan, warn_if_out_of_order
from fxzero.runtime import Executable
from fxzero.shards import Shards, spec_of
from fxzero.signature import CallSpec, flatten_call, is_tensor_leaf
from fxzero.verify import collectives

logger = logging.getLogger(__name__)

MAX_PLANS = 64
"""Plans kept; the least recently used is dropped beyond."""
MANY_SHAPES = 9
"""The number of different shapes at which a warning advises padding."""


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    passes: tuple[Pass, ...]
    device: torch.device
    sync_init: bool = True
    init_fn: Callable[[nn.Module], object] | None = None
    elementwise_optimizer: bool = False
    timeout: timedelta = timedelta(minutes=5)

    def agreed(self) -> dict[str, object]:
        """The options that must be the same on all ranks."""
        return {
            "passes": ", ".join(map(repr, self.passes)),
            "device": self.device.type,
            "sync_init": self.sync_init,
            "torch": torch.__version__.split("+")[0],
        }


@dataclass(frozen=True)
class Signature:
    """What chooses a plan."""

    call: CallSpec
    training: tuple[bool, ...]
    trained: tuple[bool, ...]
    grad: bool
    autocast: tuple[bool, Any]
    synchronize: bool


@dataclass
class Engine:
    """See the module docstring. `model` is the user's; its Parameter objects become the shards."""

    model: nn.Module
    forward: Callable[..., Any]
    options: Options
    group: dist.ProcessGroup | None
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    synchronize: bool = True
    """False inside no_sync()."""
    last: Executable | None = None
    """The plan that ran last: the one that `zero.schedule` shows."""
    _plans: OrderedDict[tuple[Signature, tuple[int, ...] | None], Executable] = field(default_factory=OrderedDict)
    _patterns: dict[Signature, tuple[int, ...]] = field(default_factory=dict[Signature, "tuple[int, ...]"])
    _orders: dict[tuple[Any, ...], list[str]] = field(default_factory=dict[Any, "list[str]"])
    _warned: bool = False

    def __post_init__(self) -> None:
        self.params: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.specs: dict[str, ParamSpec] = {fqn: spec_of(fqn, param) for fqn, param in self.params.items()}
        self.comm: Comm = make_comm(self.group, self.options.device)
        if isinstance(self.comm, PlanningComm):  # nobody is there to send rank 0's values
            self.options = dataclasses.replace(self.options, sync_init=False)
        self.shards: Shards | None = None
        self.gradients: Gradients | None = None
        self.arena = Arena(self.options.device)
        self._modules = list(self.model.modules())
        self._param_list = list(self.params.values())
        self._anchor = torch.empty(0, requires_grad=True)
        self._buffer_owners = {
            f"{prefix}.{name}" if prefix else name: (module, name)
            for prefix, module in self.model.named_modules()
            for name in compat.buffers_of(module)
        }
        check_meta_model(self.model, self.options.init_fn, set(self.model.state_dict()))

    # -- a call --------------------------------------------------------------------------------------------------

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor], Signature, Executable]:
        """The tensors of a call, what chooses its plan, and the plan, made if it is new."""
        inputs, spec = flatten_call(args, kwargs)
        signature = self._signature(spec)
        pattern = self._patterns.get(signature)
        executable = self._plans.get((signature, pattern)) or self._make(signature, pattern, args, kwargs)
        self.last = executable
        return inputs, signature, executable

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs, signature, executable = self.prepare(args, kwargs)
        call = Call(self, executable, inputs, lambda pattern: self._replan(signature, pattern, args, kwargs))
        device_type = self.options.device.type
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

    def _signature(self, spec: CallSpec) -> Signature:
        device_type = self.options.device.type
        autocast = torch.is_autocast_enabled(device_type)
        return Signature(
            spec,
            tuple([module.training for module in self._modules]),
            tuple([param.requires_grad for param in self._param_list]),
            torch.is_grad_enabled(),
            (autocast, torch.get_autocast_dtype(device_type) if autocast else None),
            self.synchronize,
        )

    def buffers(self, executable: Executable) -> list[torch.Tensor]:
        """The module's buffers of now, as the generated forward takes them."""
        owners = self._buffer_owners
        return [compat.buffers_of(module)[name] for fqn in executable.buffers for module, name in [owners[fqn]]]  # type: ignore[misc]

    def named_buffers(self) -> list[tuple[str, torch.Tensor]]:
        """The model's buffers of now by canonical name, each once."""
        return list(self.model.named_buffers())

    def set_buffer(self, fqn: str, buffer: torch.Tensor) -> None:
        """Put another tensor in the place of a buffer, wherever the model registers it."""
        old = dict(self.named_buffers())[fqn]
        for module in self._modules:
            for name, value in compat.buffers_of(module).items():
                if value is old:
                    compat.buffers_of(module)[name] = buffer

    def has_meta_params(self) -> bool:
        """True if some parameter has no values yet."""
        return any(param.is_meta for param in self._param_list)

    def held_shards(self) -> dict[int, ParamShard]:
        """What this rank holds of each parameter; empty before the layout is fixed."""
        return state.param_shards(self, self.shards) if self.shards is not None else {}

    def version(self) -> int:
        """A number that changes when a parameter is changed in place."""
        return sum([param._version for param in self._param_list])

    def backward(self, executable: Executable, saved: list[Any], tangents: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run a backward and bring `.grad` of every parameter it reached up to date."""
        gradients = self.gradients
        assert gradients is not None
        synchronize = executable.step.synchronize
        variant = gradients.variant(synchronize=synchronize)
        input_grads = executable.backward(variant, saved, tangents)
        if not synchronize:
            gradients.hold(executable.reached, variant)
            return input_grads
        gradients.publish(executable.reached, variant)
        return input_grads

    # -- plans ---------------------------------------------------------------------------------------------------

    def _replan(
        self, signature: Signature, pattern: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Executable:
        """The plan for another pattern of arriving gradients; later calls of this kind start with it."""
        self._patterns[signature] = pattern
        self.last = self._plans.get((signature, pattern)) or self._make(signature, pattern, args, kwargs)
        return self.last

    def _make(
        self,
        signature: Signature,
        pattern: tuple[int, ...] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Executable:
        """Trace, plan and bind; fix the layout if this is the first plan."""
        with agree.reporting_failure(self.group, "layout") if self.shards is None else nullcontext():
            captured = self._capture(signature, pattern, args, kwargs)
            plan = make_plan(captured, self.options.passes, self.shards.layout if self.shards else None)
            order = collectives(plan.step)
        if self.shards is None:
            self.fix_layout(layout_of(plan.step, self.options.passes), order)
        elif not self._orders:
            warn_if_out_of_order(plan.step, self.shards.layout)
        self._check_order(plan.step.has_backward, signature, captured.differentiated, order)
        assert self.shards is not None and self.gradients is not None
        executable = Executable(plan, self.shards, self.gradients, self.comm, self.arena)
        self._plans[signature, pattern] = executable
        if pattern is None:
            self._patterns.setdefault(signature, captured.differentiated)
            self._plans[signature, captured.differentiated] = executable
        self._bound_cache(signature)
        return executable

    def _capture(
        self, signature: Signature, pattern: tuple[int, ...] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Captured:
        specs = {
            fqn: ParamSpec(fqn, spec.shape, spec.dtype, self.params[fqn].requires_grad)
            for fqn, spec in self.specs.items()
        }
        needs_grad = any(signature.trained) or any(leaf[4] for leaf in signature.call.leaves if is_tensor_leaf(leaf))
        captured = capture(
            self.model,
            self.forward,
            args,
            kwargs,
            specs,
            device=self.options.device,
            world_size=self.comm.world_size,
            with_backward=signature.grad and needs_grad,
            differentiated=pattern,
        )
        captured.step.synchronize = signature.synchronize
        return captured

    def fix_layout(
        self, layout: Layout, order: Sequence[str] = (), loaded: AbstractSet[str] = frozenset()
    ) -> None:
        """Decide which rank owns what, on all ranks alike, make the storage for it, and fill it."""
        lines = describe_layout(layout, self.options.agreed()) + [f"collective {line}" for line in order]
        agree.agree(self.group, "layout", lines, timeout=self.options.timeout)
        self.shards = Shards(layout, self.comm.rank, self.options.device)
        self.gradients = Gradients(self.shards, self.params)
        state.fill_shards(self, self.shards, loaded)

    def fix_layout_without_trace(self, loaded: AbstractSet[str] = frozenset()) -> None:
        """Fix the layout in registration order, if it is not fixed yet."""
        if self.shards is None:
            layout = layout_in_registration_order(self.specs.values(), self.comm.world_size, self.options.passes)
            self.fix_layout(layout, loaded=loaded)

    def _check_order(
        self, has_backward: bool, signature: Signature, differentiated: tuple[int, ...], order: list[str]
    ) -> None:
        """A new plan must have the collectives of the first one of its mode; the first is agreed on by all ranks.

        Raises:
            PlanError: it has others, so running it would mismatch collectives with ranks that do not meet this shape.
        """
        mode = (has_backward, signature.trained, signature.synchronize, differentiated)
        first = self._orders.get(mode)
        if first is None:
            if self._orders:
                agree.agree(self.group, "mode", order, timeout=self.options.timeout)
            self._orders[mode] = order
        elif first != order:
            common = min(len(first), len(order))
            place = next((i for i in range(common) if first[i] != order[i]), common)
            there = first[place] if place < len(first) else "nothing more"
            here = order[place] if place < len(order) else "nothing more"
            raise PlanError(
                f"rank {self.comm.rank}: this call needs other collectives than the first one of its mode: number "
                f"{place} is '{here}' instead of '{there}'. Ranks that do not meet this shape would wait for other "
                "bytes. Make the model use the same parameters in the same order for every input."
            )

    def _bound_cache(self, signature: Signature) -> None:
        shapes = dict.fromkeys(
            tuple(tuple(leaf[0]) for leaf in key.call.leaves if is_tensor_leaf(leaf))
            for key, _ in self._plans
            if key.grad == signature.grad
        )
        if len(shapes) >= MANY_SHAPES and not self._warned:
            self._warned = True
            listed = ", ".join(str(shape) for shape in shapes)
            warnings.warn(
                f"{len(shapes)} different input shapes so far, each traced and planned for itself: {listed}. Pad the "
                "inputs to a multiple (of 64 tokens, say) so that few shapes remain.",
                stacklevel=4,
            )
        while len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)

"""Trace a model's forward and backward into one StepGraph without any communication.

    captured = capture(model, model.forward, args, kwargs, params, device=..., sharding=...)
    captured.step       the graph; captured.output.rebuild(tensors) makes the model's return value

joint.py traces; trace.py lets it try until all that cannot be traced is left as it is (islands/); draws.py makes random
draws equal to eager's; provenance.py labels nodes with their modules; fake_tensors.py swaps the module's tensors;
in_place/ removes in-place operators; kernels/ knows operators whose fake versions are wrong; values/ answers code that
looks at values; repeats/ traces repeated blocks once; assemble.py makes the StepGraph; failures.py
explains why a model cannot be traced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fxzero.capture.assemble import assemble
from fxzero.capture.call import flatten_call
from fxzero.capture.failures import check_arguments, explain
from fxzero.capture.islands.marks import Islands
from fxzero.capture.joint import Tracing, Watch
from fxzero.capture.numbers import NO_NUMBERS, NumberSlot, PinnedNumberError, StandIns, take_out
from fxzero.capture.outputs import OutputSpec
from fxzero.capture.repeats.capture import stamped
from fxzero.capture.state import PythonState, state_of
from fxzero.capture.trace import Tracer
from fxzero.capture.values.branches import Branch
from fxzero.graph.layout import ParamSpec
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph

__all__ = ["Captured", "OutputSpec", "capture"]


@dataclass(frozen=True)
class Captured:
    """A traced step."""

    step: StepGraph
    output: OutputSpec
    """Rebuilds the model's return value from the tensors of `step.model_outputs`."""
    differentiable: tuple[int, ...]
    """Indices into `step.model_outputs` of outputs that require grad in eager."""
    differentiated: tuple[int, ...]
    """Indices of differentiable outputs that have a tangent, in the order of the TANGENT placeholders."""
    state: PythonState
    """The Python state that the step was traced for."""
    branches: tuple[Branch, ...]
    """Branches of the forward on values that follow from its inputs."""

    def fits(self, inputs: Sequence[torch.Tensor]) -> bool:
        """True if a call of this kind, with these inputs, does now what was traced."""
        return self.state.holds() and all(branch.holds(inputs) for branch in self.branches)


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    params: Mapping[str, ParamSpec],
    *,
    device: torch.device,
    sharding: Sharding,
    with_backward: bool,
    differentiated: tuple[int, ...] | None = None,
    numbers: Sequence[NumberSlot] = (),
    islands: Islands | None = None,
    stamps: bool = True,
    is_method: bool = False,
    watch: Watch | None = None,
    ignored: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Captured:
    """Trace one call of a module.

    Args:
        module: the module whose hooks and submodules run; its parameters and buffers give names and shapes alone.
        forward: the module's original bound `forward`.
        args, kwargs: an example call; only the geometry of its tensors matters.
        params: every parameter by canonical name, in the order of `named_parameters()`.
        device: the device of parameters, and of tensors that are on the meta device.
        sharding: the mesh of ranks that the step is for.
        with_backward: False for a step under `torch.no_grad()`.
        differentiated: indices of the outputs that get a tangent. None: the output named `loss`, else the only scalar,
            else all.
        numbers: slots of the Python state whose numbers become inputs of the graph.
        islands: what is known of the parts that run as they are. Default: there are none.
        stamps: False to trace every block, also those that repeat.
        is_method: `forward` is another method, which runs without the hooks of the module.
        watch: sees the operators of each forward that is traced.
        ignored: parameters by canonical name that are inputs, after those of the call, and not among `params`.

    Raises:
        PinnedNumberError: the trace needs one of these numbers itself.
        CaptureError: the model cannot be traced; the message says where, and what to change.
        InputMismatchError: the arguments do not fit `forward`.
    """
    check_arguments(forward, args, kwargs)
    inputs, spec = flatten_call(args, kwargs)
    make = partial(
        Tracing, module, forward, args, kwargs, inputs, spec, params, device, with_backward, differentiated,
        is_method=is_method, ignored=ignored,
    )  # fmt: skip
    stand_ins = StandIns(numbers) if numbers else None
    parts = Islands(module) if islands is None else islands
    parts.without_grad = not with_backward
    may_stamp = stamps and not numbers and not parts.paths and not ignored
    repeated = stamped(partial(make, None), module, params, sharding, watch) if may_stamp else None
    if repeated is not None:
        joint = repeated.joint
        state = state_of(module, repeated.reads, (), (), NO_NUMBERS, joint.writes, ())
        return Captured(repeated.step, joint.output, joint.differentiable, joint.differentiated, state, joint.branches)
    try:
        tracer = Tracer(partial(make, watch=watch), stand_ins, parts, with_backward=with_backward)
        traced = tracer.trace()
        root, joint = traced.root, traced.tracing.joint
        computed = NO_NUMBERS if stand_ins is None else take_out(root, stand_ins, joint.num_numbers)
    except PinnedNumberError:
        raise
    except Exception as error:
        if numbers:
            raise PinnedNumberError(str(error)) from error
        explained = explain(error)
        if explained is None or explained is error:
            raise
        raise explained from error
    late = traced.tracing.reads.read_in_backward()
    state = state_of(module, traced.reads, late, traced.tensors, computed, joint.writes, joint.observers)
    step = assemble(root, joint, module, params, sharding)
    return Captured(step, joint.output, joint.differentiable, joint.differentiated, state, joint.branches)

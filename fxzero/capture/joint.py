"""Trace a module's forward and, in the same graph, its backward.

    placeholders: parameters, buffers, inputs, tangents | forward | end_forward | backward | output
    output: [model outputs, new values of rebound buffers, parameter gradients, input gradients]

Every tensor is fake and of full size; no memory is used, nothing is drawn, and the module is left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzero import torch_internals
from fxzero.capture.batch_norm import run_declared, writes_undeclared
from fxzero.capture.call import replace_tensors
from fxzero.capture.draws import Draws, no_draws_of_python, numbered_draws
from fxzero.capture.fake_tensors import FakeState, swapped_tensors, unchanged_attributes
from fxzero.capture.outputs import OutputSpec, flatten_output, loss_index
from fxzero.capture.provenance import Recorder, autograd_nodes
from fxzero.errors import CaptureError, InputMismatchError
from fxzero.graph import ops
from fxzero.graph.layout import ParamSpec
from fxzero.graph.nodes import META_KEY, NodeInfo, Role


@dataclass(frozen=True)
class Request:
    """What is to be traced."""

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Sequence[Tensor]
    input_paths: Sequence[str]
    params: Mapping[str, ParamSpec]
    device: torch.device
    with_backward: bool
    differentiated: tuple[int, ...] | None


@dataclass
class Joint:
    """What was traced; the lists are names of what the graph's output has after the model's outputs, in order."""

    output: OutputSpec
    num_outputs: int
    differentiable: tuple[int, ...]
    differentiated: tuple[int, ...]
    rebound: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    input_grads: tuple[int, ...] = ()
    root: fx.GraphModule | None = None

    @property
    def graph(self) -> fx.Graph:
        assert self.root is not None
        return self.root.graph


def trace_joint(request: Request) -> Joint:
    """Trace the request.

    Raises:
        CaptureError: the model keeps tensors where a compiled step would not update them.
        Exception: whatever tracing raised; `failures.explain` knows more about it.
    """
    fake = torch_internals.fake_tensor_mode()
    with fake:
        state = _fake_state(request)
        inputs = [
            _fake_like(path, tensor, request.device, tensor.requires_grad)
            for path, tensor in zip(request.input_paths, request.inputs, strict=True)
        ]
    tracing = _Tracing(request, state, inputs, torch.is_autocast_cache_enabled())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_own_autocast_cache())
        stack.enter_context(unchanged_attributes(request.module))
        stack.enter_context(no_draws_of_python())
        stack.enter_context(numbered_draws())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch_internals.eager_checkpoints())
        stack.enter_context(fake)
        root = torch_internals.trace_fx(tracing.run, list(state.params.values()), list(state.buffers.values()), inputs)
    joint = tracing.joint
    assert joint is not None
    joint.root = root
    _make_tangents_placeholders(root.graph)
    return joint


def _fake_state(request: Request) -> FakeState:
    """Stand-ins for parameters and buffers; call it under the fake mode."""
    params = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device=request.device, requires_grad=spec.requires_grad)
        for name, spec in request.params.items()
    }
    buffers = {name: _fake_like(name, buffer, request.device) for name, buffer in request.module.named_buffers()}
    return FakeState(params, buffers)


def _fake_like(name: str, tensor: Tensor, device: torch.device, requires_grad: bool = False) -> Tensor:
    """A leaf of the same geometry; what is on the meta device goes to `device`."""
    if tensor.layout is not torch.strided:
        raise InputMismatchError(f"{name} is a tensor of layout {tensor.layout}. Pass it dense (to_dense()).")
    where = device if tensor.device.type == "meta" else tensor.device
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where, requires_grad=requires_grad
    )


@contextlib.contextmanager
def _own_autocast_cache() -> Generator[None]:
    """Neither read casts of real parameters from autocast's cache, nor leave fake ones in it."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class _Interceptor(torch_internals.DispatchMode):
    """Sees every operator below autograd: random ones go through `Draws`, all get their source line."""

    def __init__(self, draws: Draws, recorder: Recorder) -> None:
        super().__init__()
        self._draws = draws
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if device := torch_internals.answer_device(func, args):
            return device
        run = run_declared if writes_undeclared(func) else self._draws.run
        result = run(func, args, kwargs or {})
        self._recorder.label_line()
        return result


class _Tracing:
    """The function that is traced, and what is learnt while it runs."""

    def __init__(self, request: Request, state: FakeState, inputs: Sequence[Tensor], caches_casts: bool) -> None:
        self.request = request
        self.state = state
        self.inputs = inputs
        self.caches_casts = caches_casts
        self.joint: Joint | None = None

    def run(self, params: list[Tensor], buffers: list[Tensor], inputs: list[Tensor]) -> list[Any]:
        """Forward, boundary, backward."""
        request, state = self.request, self.state
        graph = torch_internals.traced_graph()
        # make_fx switches autocast's cache off; but whether a weight is cast once or twice rounds its gradient.
        torch.set_autocast_cache_enabled(self.caches_casts)
        _label_placeholders(graph, request, state)
        recorder = Recorder(graph, request.module)
        draws = Draws()
        results: list[Any] = []
        with _Interceptor(draws, recorder), recorder.following():
            # A checkpoint runs modules in backward, so the stand-ins stay until its end.
            with swapped_tensors(request.module, state):
                with torch.set_grad_enabled(request.with_backward):
                    args, kwargs = replace_tensors(request.args, request.kwargs, inputs)
                    output = call_module(request.module, request.forward, args, kwargs)
                tensors, self.joint = self._outputs(output)
                if self.joint.differentiated:
                    recorder.label()
                    graph.call_function(ops.end_forward).meta[META_KEY] = NodeInfo(Role.END_FORWARD)
                    draws.in_backward = True
                    results = self._backward([tensors[index] for index in self.joint.differentiated], recorder)
            self.joint.rebound = tuple(state.rebound)
        recorder.label()
        return [*tensors, *state.rebound.values(), *results]

    def _outputs(self, output: Any) -> tuple[list[Tensor], Joint]:
        tensors, spec = flatten_output(output)
        differentiable = tuple(i for i, t in enumerate(tensors) if self.request.with_backward and t.requires_grad)
        chosen = _choose(self.request.differentiated, differentiable, tensors, loss_index(output, tensors))
        return tensors, Joint(spec, len(tensors), differentiable, chosen)

    def _backward(self, outputs: list[Tensor], recorder: Recorder) -> list[Tensor | None]:
        joint, state = self.joint, self.state
        assert joint is not None
        if any(node.name() == "CheckpointFunctionBackward" for node in autograd_nodes(outputs)):
            raise CaptureError(
                "The model uses the reentrant torch.utils.checkpoint, whose backward is a run of the autograd engine "
                "of its own and cannot be traced. Call checkpoint(..., use_reentrant=False)."
            )
        trained = {name: param for name, param in state.params.items() if param.requires_grad}
        leaves = {index: tensor for index, tensor in enumerate(self.inputs) if tensor.requires_grad}
        joint.grads, joint.input_grads = tuple(trained), tuple(leaves)
        recorder.label()
        tangents = [torch.empty_like(output, requires_grad=False) for output in outputs]
        recorder.label(Role.TANGENT, "")
        torch.clear_autocast_cache()
        with no_autocast(self.request.device), recorder.backward_from(outputs):
            return list(
                torch.autograd.grad(outputs, [*trained.values(), *leaves.values()], tangents, allow_unused=True)
            )


def call_module(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the module with its hooks, running `forward` even if the module's own is switched off."""
    attributes = vars(module)
    had_forward, before = "forward" in attributes, attributes.get("forward")
    attributes["forward"] = forward
    try:
        return nn.Module.__call__(module, *args, **kwargs)
    finally:
        if had_forward:
            attributes["forward"] = before
        else:
            del attributes["forward"]


def _label_placeholders(graph: fx.Graph, request: Request, state: FakeState) -> None:
    infos = [NodeInfo(Role.PARAM, name) for name in state.params]
    infos += [NodeInfo(Role.BUFFER, name) for name in state.buffers]
    infos += [NodeInfo(Role.INPUT, path) for path in request.input_paths]
    for node, info in zip(graph.nodes, infos, strict=True):
        node.meta[META_KEY] = info


def _choose(
    wanted: tuple[int, ...] | None, differentiable: tuple[int, ...], tensors: Sequence[Tensor], loss: int | None
) -> tuple[int, ...]:
    """The outputs that get a tangent: those asked for, else the loss, else the only scalar, else all that can."""
    if wanted is not None:
        return tuple(index for index in wanted if index in differentiable)
    if loss in differentiable:
        return (loss,)
    scalars = [index for index in differentiable if tensors[index].dim() == 0]
    return tuple(scalars) if len(scalars) == 1 else differentiable


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Generator[None]:
    """No autocast inside: backward runs without it, as eager's does outside the `with`."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _make_tangents_placeholders(graph: fx.Graph) -> None:
    """Tangents are made inside the trace, where the outputs' shapes are known; they are inputs all the same."""
    tangents = [node for node in graph.nodes if node.meta.get(META_KEY) == NodeInfo(Role.TANGENT)]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for index, node in enumerate(tangents):
        with graph.inserting_after(last[0]) if last else graph.inserting_before():
            placeholder = graph.placeholder(f"tangent_{index}")
        placeholder.meta = node.meta
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        last = [placeholder]

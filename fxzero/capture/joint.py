"""Trace a module's forward and, in the same graph, its backward.

    placeholders: parameters, buffers, inputs, tangents | forward | end_forward | backward | output
    output: [model outputs, new values of rebound buffers, parameter gradients, input gradients]

Every tensor is fake and of full size. A trace uses no memory, draws nothing, and leaves the module unchanged.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
class Joint:
    """The outputs of a traced graph: first those of the model, then a group for each of the last three fields."""

    output: OutputSpec
    num_outputs: int
    differentiable: tuple[int, ...]
    differentiated: tuple[int, ...]
    rebound: tuple[str, ...]
    """Names of buffers whose new values are outputs."""
    grads: tuple[str, ...]
    """Names of parameters whose gradients are outputs."""
    input_grads: tuple[int, ...]
    """Indices of inputs whose gradients are outputs."""


@dataclass
class Tracing:
    """One trace of a module: the arguments of `fxzero.capture.capture`, and the tensors of the call."""

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
    joint: Joint = field(init=False)
    """Outputs of the graph; set by `run`."""

    def run(self) -> fx.GraphModule:
        """Trace forward and backward into one graph.

        Raises:
            CaptureError: the model keeps tensors where a compiled step would not update them.
            Exception: any error of the trace; `failures.explain` makes a CaptureError of it.
        """
        fake = torch_internals.fake_tensor_mode()
        with fake:
            state = self._fake_state()
            inputs = [
                _fake_like(path, tensor, self.device, tensor.requires_grad)
                for path, tensor in zip(self.input_paths, self.inputs, strict=True)
            ]
        traced = partial(self._traced, state, torch.is_autocast_cache_enabled())
        with (
            torch.inference_mode(False),
            _own_autocast_cache(),
            unchanged_attributes(self.module),
            no_draws_of_python(),
            numbered_draws(),
            torch.autograd.set_multithreading_enabled(False),
            torch_internals.eager_checkpoints(),
            fake,
        ):
            root = torch_internals.trace_fx(traced, [*state.params.values()], [*state.buffers.values()], inputs)
        _make_tangents_placeholders(root.graph)
        return root

    def _fake_state(self) -> FakeState:
        """Fake parameters and buffers; to be called under the fake mode."""
        params = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device, requires_grad=spec.requires_grad)
            for name, spec in self.params.items()
        }
        buffers = {name: _fake_like(name, buffer, self.device) for name, buffer in self.module.named_buffers()}
        return FakeState(params, buffers)

    def _traced(
        self, state: FakeState, caches_casts: bool, params: list[Tensor], buffers: list[Tensor], inputs: list[Tensor]
    ) -> list[Any]:
        """The function that is traced: forward, boundary, backward."""
        graph = torch_internals.traced_graph()
        # make_fx switches autocast's cache off; but whether a weight is cast once or twice rounds its gradient.
        torch.set_autocast_cache_enabled(caches_casts)
        self._label_placeholders(graph, state)
        recorder, draws = Recorder(graph, self.module), Draws()
        leaves: dict[str | int, Tensor] = {}
        results: list[Any] = []
        # A checkpoint runs modules in backward, so the stand-ins stay until its end.
        with _Interceptor(draws, recorder), recorder.following(), swapped_tensors(self.module, state):
            with torch.set_grad_enabled(self.with_backward):
                args, kwargs = replace_tensors(self.args, self.kwargs, inputs)
                output = call_module(self.module, self.forward, args, kwargs)
            tensors, spec = flatten_output(output)
            differentiable = tuple(i for i, tensor in enumerate(tensors) if self.with_backward and tensor.requires_grad)
            chosen = _choose(self.differentiated, differentiable, tensors, loss_index(output, tensors))
            if chosen:
                recorder.label()
                graph.call_function(ops.end_forward).meta[META_KEY] = NodeInfo(Role.END_FORWARD)
                draws.in_backward = True
                leaves = {key: leaf for key, leaf in [*state.params.items(), *enumerate(inputs)] if leaf.requires_grad}
                results = self._backward([tensors[index] for index in chosen], [*leaves.values()], recorder)
        recorder.label()
        grads = tuple(key for key in leaves if isinstance(key, str))
        input_grads = tuple(key for key in leaves if isinstance(key, int))
        self.joint = Joint(spec, len(tensors), differentiable, chosen, tuple(state.rebound), grads, input_grads)
        return [*tensors, *state.rebound.values(), *results]

    def _label_placeholders(self, graph: fx.Graph, state: FakeState) -> None:
        infos = [NodeInfo(Role.PARAM, name) for name in state.params]
        infos += [NodeInfo(Role.BUFFER, name) for name in state.buffers]
        infos += [NodeInfo(Role.INPUT, path) for path in self.input_paths]
        for node, info in zip(graph.nodes, infos, strict=True):
            node.meta[META_KEY] = info

    def _backward(self, outputs: list[Tensor], leaves: list[Tensor], recorder: Recorder) -> list[Tensor | None]:
        if any(node.name() == "CheckpointFunctionBackward" for node in autograd_nodes(outputs)):
            raise CaptureError(
                "The model uses the reentrant torch.utils.checkpoint, whose backward is a run of the autograd engine "
                "of its own and cannot be traced. Call checkpoint(..., use_reentrant=False)."
            )
        recorder.label()
        tangents = [torch.empty_like(output, requires_grad=False) for output in outputs]
        recorder.label(Role.TANGENT, "")
        torch.clear_autocast_cache()
        with no_autocast(self.device), recorder.backward_from(outputs):
            return list(torch.autograd.grad(outputs, leaves, tangents, allow_unused=True))


def _fake_like(name: str, tensor: Tensor, device: torch.device, requires_grad: bool = False) -> Tensor:
    """A fake leaf of a tensor's geometry; for a tensor on the meta device, it is on `device`."""
    if tensor.layout is not torch.strided:
        raise InputMismatchError(f"{name} is a tensor of layout {tensor.layout}. Pass it dense (to_dense()).")
    where = device if tensor.device.type == "meta" else tensor.device
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where, requires_grad=requires_grad
    )


@contextlib.contextmanager
def _own_autocast_cache() -> Generator[None]:
    """Clear autocast's cache before and after: no cast of a real parameter gets in, no fake one gets out."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class _Interceptor(torch_internals.DispatchMode):
    """Runs every operator below autograd: draws go through `Draws`, and each node gets its source line."""

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


def call_module(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the module with its hooks, and run `forward` in the place of the module's own."""
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


def _choose(
    wanted: tuple[int, ...] | None, differentiable: tuple[int, ...], tensors: Sequence[Tensor], loss: int | None
) -> tuple[int, ...]:
    """The outputs that get a tangent: the wanted ones, else the loss, else the only scalar, else all differentiable."""
    if wanted is not None:
        return tuple(index for index in wanted if index in differentiable)
    if loss in differentiable:
        return (loss,)
    scalars = [index for index in differentiable if tensors[index].dim() == 0]
    return tuple(scalars) if len(scalars) == 1 else differentiable


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Generator[None]:
    """Switch autocast off inside the block, as it is off for a backward of eager."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _make_tangents_placeholders(graph: fx.Graph) -> None:
    """Turn tangents into placeholders; the trace made them as values, where the shapes of outputs were known."""
    tangents = [node for node in graph.nodes if node.meta.get(META_KEY) == NodeInfo(Role.TANGENT)]
    last = next(reversed(graph.find_nodes(op="placeholder")), None)
    for index, node in enumerate(tangents):
        with graph.inserting_before() if last is None else graph.inserting_after(last):
            last = graph.placeholder(f"tangent_{index}")
        last.meta = node.meta
        node.replace_all_uses_with(last)
        graph.erase_node(node)

"""Run a StepGraph on one rank, node by node, without communication. What each word of the schedule does here:

    all_gather, wait       the parameters, copied into the memory of their bucket, rounded as they would travel
    release                NaN into that memory: whoever reads it later, also through a view, reads NaN
    grad_slot              memory for a gradient, NaN until something is written there
    write_grad             copies the gradient into its memory, unless it was computed there; no gradient: zeros
    reduce_scatter, wait   the mean over ranks that all have this gradient, so the gradient itself, rounded as it would
                           travel; its memory is NaN from here on
    end_forward            nothing
    a collective of the    what this rank sends, repeated to the size of the result
    model's own

The world size of the graph does not matter: for the shard of a parameter the full parameter is fed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from fxzero import torch_internals
from fxzero.capture.joint import no_autocast
from fxzero.comm.wire_copies import pack, unpack
from fxzero.graph.names import describe
from fxzero.graph.nodes import (
    WAIT_OF_MODEL,
    Role,
    grad_fqn,
    info,
    is_gather,
    members,
    model_collective,
    role,
    slot_fqn,
    started_by,
    tensor_bytes,
    wire_format,
    written_in_place,
)
from fxzero.graph.step import StepGraph
from fxzero.graph.wire import SCALE_DTYPE, WireFormat

aten = torch.ops.aten

Results: TypeAlias = dict[str, dict[str, Any]]
"""The values that a step gives, by kind and name, which together read as "gradient of layers.0.weight"."""

Watch: TypeAlias = Callable[[fx.Node, Any], None]
"""Called with every node and its value, right after it ran."""

_UNINITIALIZED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_permuted.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
"""Operators whose result has no defined values; here it is NaN, so that two runs of one graph agree."""


def run_step(step: StepGraph, values: Mapping[str, Tensor], watch: Watch | None = None) -> Results:
    """Run a step once. Afterwards, also after an error, `values` and all random generators are as they were before.

    Args:
        values: a tensor for each placeholder, by the name of its node; a parameter in its full shape.
        watch: sees the value of every node.

    Raises:
        RuntimeError: an operator failed; the message names it.
    """
    fed = {
        node.name: values[node.name] if role(node) is Role.PARAM else copy_of_tensor(values[node.name])
        for node in step.graph.find_nodes(op="placeholder")
    }
    devices = sorted({tensor.device for tensor in fed.values()} - {torch.device("cpu")}, key=str)
    main = devices[0] if devices else torch.device("cpu")
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        no_autocast(main),
        torch.random.fork_rng([device.index for device in devices], device_type=main.type),
    ):
        runner = _Runner(step, fed, watch)
        outputs, grads, input_grads = runner.run(enable_io_processing=False)
        inputs, buffers = step.nodes(Role.INPUT), step.nodes(Role.BUFFER)
        paths = [info(node).fqn for node in inputs]
        return {
            "output": {str(index): output for index, output in enumerate(outputs)},
            "gradient of": {fqn: runner.gradient(fqn, grad) for fqn, grad in grads.items()},
            "gradient of input": dict(zip(paths, input_grads, strict=False)),
            "buffer": {info(node).fqn: fed[node.name] for node in buffers},
            "input": {path: fed[node.name] for path, node in zip(paths, inputs, strict=True)},
            "random state of": {str(each): _random_state(each) for each in (torch.device("cpu"), *devices)},
        }


def copy_of_tensor(tensor: Tensor) -> Tensor:
    """A copy with memory of its own and the same strides, also where elements of the tensor share memory."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return tensor.clone()
    span = tensor_bytes(tensor) // tensor.dtype.itemsize
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride(), 0)


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


@dataclass(frozen=True)
class _InFlight:
    """What an all_gather or a reduce_scatter gives: only its wait can use it."""

    tensors: tuple[Tensor, ...]


class _Runner(fx.Interpreter):
    """Runs the nodes of a step in order; see the module docstring."""

    def __init__(self, step: StepGraph, fed: Mapping[str, Tensor], watch: Watch | None) -> None:
        super().__init__(nn.Module(), graph=step.graph)
        self.extra_traceback = False
        self._step = step
        self._fed = fed
        self._watch = watch
        self._slots: dict[str, Tensor] = {}
        """The memory of each gradient, in the shape of its parameter."""
        self._means: dict[str, Tensor] = {}
        """The gradients that were reduced."""

    def gradient(self, fqn: str, returned: Any) -> Any:
        """The gradient of a parameter after the step: reduced, else in its slot, else what the graph returns."""
        grad = self._step.grads[fqn]
        if role(grad) is Role.WAIT:
            return self._means.get(fqn)
        return self._slots.get(fqn) if role(grad) is Role.WRITE_GRAD else returned

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = self._value(n)
        except Exception as error:
            raise RuntimeError(f"{describe_operator(n)} raises {type(error).__name__}: {error}") from error
        if self._watch is not None:
            self._watch(n, value)
        return value

    def _value(self, node: fx.Node) -> Any:
        kind = role(node)
        if node.op == "placeholder":
            return self._fed[node.name]
        if kind is Role.CONSTANT:
            return copy_of_tensor(self._step.constants[cast(str, node.target)])
        if kind is Role.GRAD_SLOT:
            return self._new_slot(slot_fqn(node)).view(cast("tuple[int, ...]", node.args[1]))
        if kind is Role.END_FORWARD:
            return None
        if kind in (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT, Role.RELEASE, Role.WRITE_GRAD):
            args, _ = self.fetch_args_kwargs_from_env(node)
            return self._communicate(kind, node, args)
        if name := model_collective(node):
            args, _ = self.fetch_args_kwargs_from_env(node)
            return args[0] if name == WAIT_OF_MODEL else _alone(args[0], node.meta["val"])
        value = super().run_node(node)
        return _with_nothing_in_it(value) if node.target in _UNINITIALIZED else value

    def _communicate(self, kind: Role, node: fx.Node, args: tuple[Any, ...]) -> Any:
        if kind is Role.ALL_GATHER:
            return _InFlight(self._gather(node, args))
        if kind is Role.REDUCE_SCATTER:
            return _InFlight(args)
        if kind is Role.WRITE_GRAD:
            return self._write_grad(node, args[0])
        if kind is Role.RELEASE:
            return _forget(args[0])
        (in_flight,) = args
        return in_flight.tensors if is_gather(node) else self._reduce(started_by(node), in_flight.tensors)

    def _gather(self, start: fx.Node, shards: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The parameters of a bucket, as views of its memory."""
        bucket = self._step.bucket_of(start)
        full = shards[0].new_zeros(bucket.numel)
        params = tuple(full[bucket.offsets[param.fqn] :][: param.numel].view(param.shape) for param in bucket.params)
        for param, shard in zip(params, shards, strict=True):
            param.copy_(shard)
        if format := wire_format(start):
            self._round(start, full, format)
        return params

    def _round(self, start: fx.Node, full: Tensor, format: WireFormat) -> None:
        """Write a bucket for the wire, shard by shard as its ranks would, and bring it back."""
        bucket, travels = self._step.bucket_of(start), self._step.travels(start)
        rows = full.new_empty(travels.numel, dtype=travels.dtype)
        work = full.new_empty(bucket.shard_numel, dtype=SCALE_DTYPE)
        for shard, row in zip(full.split(bucket.shard_numel), rows.split(travels.slice_numel), strict=True):
            pack(format, shard, row, work)()
        unpack(format, bucket, rows, full, work)()

    def _new_slot(self, fqn: str) -> Tensor:
        param = self._fed[self._step.param_nodes()[fqn].name]
        self._slots[fqn] = torch.full_like(param, float("nan"), memory_format=torch.contiguous_format)
        return self._slots[fqn]

    def _write_grad(self, node: fx.Node, grad: Tensor | None) -> Tensor:
        fqn = grad_fqn(node)
        if written_in_place(node):
            return self._slots[fqn]
        slot = self._new_slot(fqn)
        return slot.zero_() if grad is None else slot.copy_(grad)

    def _reduce(self, start: fx.Node, slots: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean of gradients over ranks on which they are equal; their memory is free from here on."""
        format = wire_format(start)
        means = [slot.clone() if format is None else slot.to(format.dtype).to(slot.dtype) for slot in slots]
        self._means |= dict(zip(members(start), means, strict=True))
        _forget(slots)
        return tuple(means)


def _alone(sent: Any, like: Any) -> Any:
    """What a collective of the model gives here, where no other rank takes part: what is sent, as often as it takes."""
    if isinstance(like, (list, tuple)):
        return [_alone(each, one) for each, one in zip(sent, cast("Sequence[Any]", like), strict=True)]
    flat = sent.reshape(-1)
    return flat.repeat(-(-like.numel() // max(flat.numel(), 1)))[: like.numel()].reshape(like.shape).clone()


def _forget(tensors: Iterable[Tensor]) -> None:
    """Let the memory of tensors hold nothing that anybody may read."""
    for tensor in tensors:
        tensor.fill_(float("nan"))


def _with_nothing_in_it(tensor: Tensor) -> Tensor:
    has_nan = tensor.is_floating_point() or tensor.is_complex()
    return tensor.fill_(float("nan") if has_nan else 0)


def describe_operator(node: fx.Node) -> str:
    """A node by its role and module, its operator, and its name in the graph."""
    target = node.target if torch_internals.is_overload(node.target) else getattr(node.target, "__name__", node.target)
    return f"{describe(node)} ({target}, node {node.name})"

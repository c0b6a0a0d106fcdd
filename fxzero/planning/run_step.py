"""Run a StepGraph on one rank, node by node, without communication. Each word of the schedule acts on local memory:

    all_gather, wait       copy the parameters into the memory of their bucket, rounded to the wire format
    release                fills the memory of the bucket with NaN, so that a later read, also through a view, gives NaN
    grad_slot              allocates memory for a gradient, filled with NaN
    write_grad             copies the gradient into its memory, unless it was computed there; no gradient: zeros
    reduce_scatter, wait   give the gradient itself, rounded to the wire format: the mean over ranks that all have this
                           gradient. Then they fill the gradient's memory with NaN
    end_forward            does nothing
    a collective of the    gives what this rank sends, repeated to the size of the result
    model's own

The world size of the graph does not matter: the placeholder of a parameter is fed the full parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from fxzero import torch_internals
from fxzero.capture.draws import same_draws_of_python
from fxzero.capture.hooks.observer import no_hooks
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
from fxzero.graph.wire import SCALE_DTYPE

Results: TypeAlias = dict[str, dict[str, Any]]
"""The results of a step by kind and name, which together read as "gradient of layers.0.weight"."""

Watch: TypeAlias = Callable[[fx.Node, Any], None]
"""A function that is called with every node and its value, right after the node ran."""

_UNINITIALIZED = ("aten.empty", "aten.new_empty")
"""Prefixes of operators whose result has undefined values. `run_step` fills it with NaN, so that two runs agree."""


def run_step(step: StepGraph, values: Mapping[str, Any], watch: Watch | None = None) -> Results:
    """Run a step once. It changes neither `values` nor any random generator, also when it fails.

    Args:
        values: a tensor or a number for each placeholder, by the name of its node; a parameter in its full shape.
        watch: called with each node and its value.

    Raises:
        RuntimeError: an operator failed; the message names it.
    """
    fed = {
        node.name: values[node.name] if role(node) is Role.PARAM else copy_of_tensor(values[node.name])
        for node in step.graph.find_nodes(op="placeholder")
    }
    devices = sorted(
        {value.device for value in fed.values() if isinstance(value, Tensor)} - {torch.device("cpu")}, key=str
    )
    main = devices[0] if devices else torch.device("cpu")
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        no_autocast(main),
        torch.random.fork_rng([device.index for device in devices], device_type=main.type),
        same_draws_of_python(),
        no_hooks(),
    ):
        runner = _Runner(step, fed, watch)
        outputs, grads, input_grads = runner.run(enable_io_processing=False)
        inputs = {info(node).fqn: fed[node.name] for node in step.nodes(Role.INPUT)}
        accelerators = {str(each): torch.get_device_module(each).get_rng_state(each) for each in devices}
        return {
            "output": {str(index): output for index, output in enumerate(outputs)},
            "gradient of": {fqn: runner.gradient(fqn, grad) for fqn, grad in grads.items()},
            "gradient of input": dict(zip(inputs, input_grads, strict=False)),
            "buffer": {info(node).fqn: fed[node.name] for node in step.nodes(Role.BUFFER)},
            "input": inputs,
            "random state of": {"cpu": torch.get_rng_state(), **accelerators},
        }


def copy_of_tensor(tensor: Any) -> Any:
    """A copy of a tensor in memory of its own, with equal strides, also where elements of the tensor share memory.

    A number is returned as it is.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return tensor.clone()
    span = tensor_bytes(tensor) // tensor.dtype.itemsize
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride(), 0)


@dataclass(frozen=True)
class _InFlight:
    """The value of an all_gather or a reduce_scatter, which only its wait can read."""

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
        """The reduced gradients."""

    def gradient(self, fqn: str, returned: Any) -> Any:
        """The gradient of a parameter after the step: the reduced one, else the one in its slot, else `returned`."""
        grad = self._step.grads[fqn]
        if role(grad) is Role.WAIT:
            return self._means.get(fqn)
        if role(grad) is Role.WRITE_GRAD:
            return self._slots.get(fqn)
        is_missing = returned is None  # of a parameter that an island did not reach
        return torch.zeros_like(self._fed[self._step.param_nodes()[fqn].name]) if is_missing else returned

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
        if kind in (Role.COMPUTE, Role.OUTPUT) and not model_collective(node):
            value = super().run_node(node)
            return _without_values(value) if str(node.target).startswith(_UNINITIALIZED) else value
        args, _ = self.fetch_args_kwargs_from_env(node)
        if name := model_collective(node):
            return args[0] if name == WAIT_OF_MODEL else _alone(args[0], node.meta["val"])
        if kind is Role.ALL_GATHER:
            return _InFlight(self._gather(node, args))
        if kind is Role.REDUCE_SCATTER:
            return _InFlight(args)
        if kind is Role.WAIT:
            tensors = args[0].tensors
            return tensors if is_gather(node) else self._reduce(started_by(node), tensors)
        if kind is Role.GRAD_SLOT:
            return self._new_slot(slot_fqn(node)).view(args[1])
        if kind is Role.WRITE_GRAD:
            return self._write_grad(node, args[0])
        return [_without_values(param) for param in args[0]] if kind is Role.RELEASE else None

    def _gather(self, start: fx.Node, shards: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The parameters of a bucket, as views of its memory, after a trip in the wire format of its all-gather."""
        bucket, travels, format = self._step.bucket_of(start), self._step.travels(start), wire_format(start)
        full = shards[0].new_zeros(bucket.numel)
        params = tuple(full[bucket.offsets[param.fqn] :][: param.numel].view(param.shape) for param in bucket.params)
        for param, shard in zip(params, shards, strict=True):
            param.copy_(shard)
        if format is not None:
            rows = full.new_empty(travels.numel, dtype=travels.dtype)
            work = full.new_empty(bucket.shard_numel, dtype=SCALE_DTYPE)
            for shard, row in zip(full.split(bucket.shard_numel), rows.split(travels.slice_numel), strict=True):
                pack(format, shard, row, work)()
            unpack(format, bucket, rows, full, work)()
        return params

    def _new_slot(self, fqn: str) -> Tensor:
        param = self._fed[self._step.param_nodes()[fqn].name]
        self._slots[fqn] = _without_values(torch.empty_like(param, memory_format=torch.contiguous_format))
        return self._slots[fqn]

    def _write_grad(self, node: fx.Node, grad: Tensor | None) -> Tensor:
        fqn = grad_fqn(node)
        if written_in_place(node):
            return self._slots[fqn]
        slot = self._new_slot(fqn)
        return slot.zero_() if grad is None else slot.copy_(grad)

    def _reduce(self, start: fx.Node, slots: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean of gradients over ranks on which they are equal; the memory of the slots is free afterwards."""
        format = wire_format(start)
        means = [slot.clone() if format is None else slot.to(format.dtype).to(slot.dtype) for slot in slots]
        self._means |= dict(zip(members(start), means, strict=True))
        for slot in slots:
            _without_values(slot)
        return tuple(means)


def _alone(sent: Any, like: Any) -> Any:
    """The result of a collective of the model when no other rank takes part: what is sent, repeated to its size."""
    if isinstance(like, (list, tuple)):
        return [_alone(each, one) for each, one in zip(sent, cast("Sequence[Any]", like), strict=True)]
    flat = sent.reshape(-1)
    return flat.repeat(-(-like.numel() // max(flat.numel(), 1)))[: like.numel()].reshape(like.shape).clone()


def _without_values(tensor: Tensor) -> Tensor:
    """The tensor itself, filled with NaN, or with zeros where its dtype has no NaN."""
    has_nan = tensor.is_floating_point() or tensor.is_complex()
    return tensor.fill_(float("nan") if has_nan else 0)


def describe_operator(node: fx.Node) -> str:
    """A node by its role and module, its operator, and its name in the graph."""
    target = node.target if torch_internals.is_overload(node.target) else getattr(node.target, "__name__", node.target)
    return f"{describe(node)} ({target}, node {node.name})"

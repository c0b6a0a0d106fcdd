"""The role of each node of a step, and the accessors through which passes read and write collectives."""

import enum
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph import ops
from fxzero.graph.wire import WireFormat

META_KEY = "fxzero"
WAIT_OF_MODEL = "wait_tensor"
"""The operator among them that waits for one that was started."""


class Role(enum.Enum):
    """The part that a node plays in the step."""

    PARAM = "param"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INPUT = "input"
    STATE = "state"
    TANGENT = "tangent"
    COMPUTE = "compute"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    WAIT = "wait"
    RELEASE = "release"
    GRAD_SLOT = "grad_slot"
    WRITE_GRAD = "write_grad"
    END_FORWARD = "end_forward"
    OUTPUT = "output"


@dataclass(frozen=True)
class NodeInfo:
    """Facts that passes know of a node, beside its operator and `node.meta["val"]`."""

    role: Role
    fqn: str = ""
    """Name of a PARAM or BUFFER, path of the argument of an INPUT, name of the module that runs COMPUTE; else empty."""


TARGET_OF_ROLE: dict[Role, Callable[..., Any]] = {
    Role.ALL_GATHER: ops.all_gather,
    Role.REDUCE_SCATTER: ops.reduce_scatter,
    Role.WAIT: ops.wait,
    Role.RELEASE: ops.release,
    Role.GRAD_SLOT: ops.grad_slot,
    Role.WRITE_GRAD: ops.write_grad,
    Role.END_FORWARD: ops.end_forward,
}
"""Maps each role of the schedule's vocabulary to its target: a node has the role if and only if it has the target."""
COLLECTIVES = (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT, Role.RELEASE)

_INFO_OF_TARGET: dict[Any, NodeInfo] = {target: NodeInfo(role) for role, target in TARGET_OF_ROLE.items()}
_INFO_OF_OP = {"output": NodeInfo(Role.OUTPUT), "get_attr": NodeInfo(Role.CONSTANT)}
_COMPUTE = NodeInfo(Role.COMPUTE)


def info(node: fx.Node) -> NodeInfo:
    """The NodeInfo of a node: the stored one, else the one that follows from its operator."""
    stored = node.meta.get(META_KEY)
    return stored or _INFO_OF_OP.get(node.op) or _INFO_OF_TARGET.get(node.target, _COMPUTE)


def role(node: fx.Node) -> Role:
    """Shorthand for `info(node).role`."""
    stored = node.meta.get(META_KEY)
    return stored.role if stored else info(node).role


def started_by(node: fx.Node) -> fx.Node:
    """The all_gather or reduce_scatter to which a wait or a release belongs; a start belongs to itself."""
    while node.target is ops.wait or node.target is ops.release:
        node = cast(fx.Node, node.args[0])
    return node


def operands(start: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs of a start: parameter placeholders of an all_gather, write_grads of a reduce_scatter."""
    return cast(tuple[fx.Node, ...], start.args)


def members(collective: fx.Node) -> tuple[str, ...]:
    """The names of the parameters of a collective (a start, wait or release), in bucket order."""
    start = started_by(collective)
    if start.target is ops.all_gather:
        return tuple([shard.meta[META_KEY].fqn for shard in operands(start)])
    return tuple([grad_fqn(slot) for slot in operands(start)])


def wire_format(collective: fx.Node) -> WireFormat | None:
    """The format in which a collective (a start, wait or release) travels; None for the dtype of its bucket."""
    return cast("WireFormat | None", started_by(collective).kwargs.get("format"))


def set_wire_format(start: fx.Node, format: WireFormat) -> None:
    """Let an all_gather or a reduce_scatter travel in a format of its own."""
    start.kwargs = {**start.kwargs, "format": cast(Any, format)}


def is_inside(gather: fx.Node) -> bool:
    """True for an all_gather of the secondary shards that an earlier gather of the step left in the node."""
    return bool(gather.kwargs.get("inside", False))


def set_inside(start: fx.Node) -> None:
    """Let an all_gather read secondary shards."""
    start.kwargs = {**start.kwargs, "inside": True}


def wait_of(start: fx.Node) -> fx.Node:
    """The one wait of a collective."""
    return next(user for user in start.users if user.target is ops.wait)


def release_of(wait: fx.Node) -> fx.Node | None:
    """The release of a gathered bucket, None if the graph has none yet."""
    return next((user for user in wait.users if user.target is ops.release), None)


def is_gather(node: fx.Node) -> bool:
    """True for the start, the wait and the release of an all-gather."""
    return started_by(node).target is ops.all_gather


def is_gathered_param(node: fx.Node) -> bool:
    """True for one unsharded parameter: an output of the wait of an all-gather."""
    if node.target is not operator.getitem:
        return False
    made = cast(fx.Node, node.args[0])
    return made.target is ops.wait and is_gather(made)


def gathered_params(wait: fx.Node) -> dict[str, fx.Node]:
    """Maps names of parameters to the outputs of an all-gather's wait, as far as the graph has these outputs."""
    names = members(wait)
    return {names[cast(int, user.args[1])]: user for user in wait.users if user.target is operator.getitem}


def grad_of(slot: fx.Node) -> fx.Node | None:
    """The gradient that a write_grad writes; None if it writes zeros."""
    return cast("fx.Node | None", slot.args[0])


def grad_fqn(slot: fx.Node) -> str:
    """The parameter whose gradient a write_grad writes."""
    return cast(str, slot.args[1])


def written_in_place(slot: fx.Node) -> fx.Node | None:
    """The grad_slot into which the gradient of a write_grad was computed; None if the gradient must be copied."""
    grad = grad_of(slot)
    if grad is None:
        return None
    if role(grad) is Role.GRAD_SLOT:  # a region was given it
        return grad
    memory = grad.args[0] if grad.args and "out" not in grad.kwargs else grad.kwargs.get("out")
    return memory if isinstance(memory, fx.Node) and role(memory) is Role.GRAD_SLOT else None


def slot_fqn(memory: fx.Node) -> str:
    """The parameter whose gradient a grad_slot holds."""
    return cast(str, memory.args[0])


def first_write(slot: fx.Node) -> fx.Node:
    """The first node that writes a gradient to its bucket: its grad_slot if it is computed in place, else `slot`."""
    return written_in_place(slot) or slot


def is_island(node: fx.Node) -> bool:
    """True for the forward, and for the backward, of a part of the model that runs as it is."""
    return node.target in (ops.island_forward, ops.island_backward)


def is_observer(node: fx.Node) -> bool:
    """True for a call of a hook that only looks at tensors."""
    return node.target is ops.observe


def may_be_missing(slot: fx.Node) -> bool:
    """True for a write_grad whose gradient may be None in a step: of a parameter that an island need not reach."""
    grad = grad_of(slot)
    if grad is None or grad.target is not operator.getitem:
        return False
    made, index = cast("tuple[fx.Node, int]", grad.args)
    return made.target is ops.island_backward and index in cast(Any, made.args[0]).uncertain


def is_random(node: fx.Node) -> bool:
    """True for an operator that draws from a random generator; attention without dropout does not. An island may."""
    if is_island(node):
        return True
    target = cast(Any, node.target)
    if not torch_internals.is_overload(target) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return torch_internals.argument(node, "dropout_p") != 0.0


def is_pointwise(node: fx.Node) -> bool:
    """True for an operator that computes each output element from one element of each input."""
    target = cast(Any, node.target)
    return torch_internals.is_overload(target) and torch.Tag.pointwise in target.tags


def model_collective(node: fx.Node) -> str:
    """The name of a functional collective that the model itself runs, or of a wait for one; empty for all else."""
    return collective_name(node.target)


@functools.cache
def collective_name(target: Any) -> str:
    """The same of an operator."""
    if not torch_internals.is_overload(target):
        return ""
    namespace, name = target.name().split(".")[0].split("::")
    return name if namespace in torch_internals.COLLECTIVE_NAMESPACES else ""


def read_until(node: fx.Node) -> list[fx.Node]:
    """The nodes up to which a node reads its inputs: itself, and for a collective of the model the waits for it."""
    until = [node]
    if model_collective(node) not in ("", WAIT_OF_MODEL):
        for started in until:
            if started is node or started.target is operator.getitem:
                until += started.users
    return until


def sent_until(wait: fx.Node) -> list[fx.Node]:
    """The inputs of the collective that a `wait_tensor` of the model waits for."""
    started = cast(fx.Node, wait.args[0])
    return (cast(fx.Node, started.args[0]) if started.target is operator.getitem else started).all_input_nodes


def add_placeholder(graph: fx.Graph, name: str, replaced: fx.Node, meta: dict[str, Any]) -> fx.Node:
    """A new last placeholder that is read instead of a node."""
    last = next(reversed(graph.find_nodes(op="placeholder")), None)
    with graph.inserting_before() if last is None else graph.inserting_after(last):
        placeholder = graph.placeholder(name)
    placeholder.meta = meta
    replaced.replace_all_uses_with(placeholder)
    return placeholder


def is_in_place(node: fx.Node) -> bool:
    """True for an operator that writes, or may write, into its arguments."""
    return may_write(node.target)


def may_write(target: Any) -> bool:
    """The same of the operator of a node."""
    return torch_internals.is_overload(target) and torch_internals.is_mutable(target)


def is_pure(node: fx.Node) -> bool:
    """True for compute that gives the same value when this rank runs it again by itself, and changes nothing."""
    if role(node) is not Role.COMPUTE or is_observer(node) or (node.target is ops.region and node.args[2]):
        return False
    return not (is_in_place(node) or is_random(node) or model_collective(node))


def tensor_bytes(value: Any) -> int:
    """Bytes from the first to the last element of a tensor in memory; 0 for other values."""
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.dtype.itemsize


def new_value(node: fx.Node, value: Any) -> fx.Node:
    """Set `meta["val"]` of a node, and return the node."""
    node.meta["val"] = value
    return node

"""The only IR: a torch.fx.Graph of the whole step, plus one frozen NodeInfo per node under one meta key.

placeholders (params, buffers, inputs, tangents) and constants | forward | end_forward | backward | output

The output is `(model outputs, parameter gradients by name, input gradients)`; a forward-only step has no end_forward
and no gradients. Passes read and write collectives through the accessors here, never through `node.args[i]`.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph import ops
from fxzero.graph.layout import Bucket, LayoutName, ParamSpec, make_bucket
from fxzero.graph.stages import stage_inside
from fxzero.graph.wire import WireFormat, on_wire

META_KEY = "fxzero"


class Role(enum.Enum):
    """What a node is in the step."""

    PARAM = "param"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INPUT = "input"
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


class Phase(enum.Enum):
    """The two halves of a step."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class NodeInfo:
    """What passes know of a node beside its operator and `node.meta["val"]`."""

    role: Role
    fqn: str = ""
    """PARAM, BUFFER: its name. INPUT: the path of the argument. COMPUTE: the module that runs it. Else empty."""


_TARGET_OF_ROLE: dict[Role, Callable[..., Any]] = {
    Role.ALL_GATHER: ops.all_gather,
    Role.REDUCE_SCATTER: ops.reduce_scatter,
    Role.WAIT: ops.wait,
    Role.RELEASE: ops.release,
    Role.GRAD_SLOT: ops.grad_slot,
    Role.WRITE_GRAD: ops.write_grad,
    Role.END_FORWARD: ops.end_forward,
}
"""The words of the schedule: a node has one of these roles if and only if it has the target."""
_INFO_OF_TARGET: dict[Any, NodeInfo] = {target: NodeInfo(role) for role, target in _TARGET_OF_ROLE.items()}
_INFO_OF_OP = {"output": NodeInfo(Role.OUTPUT), "get_attr": NodeInfo(Role.CONSTANT)}
_COMPUTE = NodeInfo(Role.COMPUTE)


def info(node: fx.Node) -> NodeInfo:
    """The NodeInfo of a node; words of the schedule and the output need none stored."""
    stored = node.meta.get(META_KEY)
    if stored is not None:
        return stored
    return _INFO_OF_OP.get(node.op) or _INFO_OF_TARGET.get(node.target, _COMPUTE)


def role(node: fx.Node) -> Role:
    """Shorthand for `info(node).role`."""
    return info(node).role


@dataclass
class StepGraph:
    """One step of a model: the graph and what must be known to read it."""

    graph: fx.Graph
    params: dict[str, ParamSpec]
    """Every parameter of the model by canonical name, in registration order; also those the step does not use."""
    world_size: int
    constants: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor], repr=False)
    """Tensors that the model's code made from Python values while it was traced: the targets of get_attr nodes."""
    synchronize: bool = True
    """False under no_sync(): gradients are written to unsharded buckets and not reduced."""
    kept: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    """Buckets that stay gathered from forward to backward, by their members."""
    resident: tuple[tuple[str, ...], ...] = ()
    """Buckets with a place of their own, in which they stay gathered until the shards change; in the order of places.
    Also those that this step does not gather."""
    layout: LayoutName = "contiguous"
    """How parameters are cut; no pass depends on it."""
    without: tuple[str, ...] = ()
    """Optimizations that are turned off, as of `ablation.py`."""
    num_nodes: int = 1
    """Of a 2-D mesh: of `world_size` ranks each, that hold the same shards, or all together if nodes share them."""
    shards_across: bool = False
    """Nodes share the shards: a gather crosses nodes, unless it is one from secondary shards (`is_inside`)."""
    _buckets: dict[tuple[str, ...], Bucket] = field(default_factory=dict[tuple[str, ...], Bucket], repr=False)
    _param_nodes: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node], repr=False)

    # -- phases --------------------------------------------------------------------------------------------------

    @property
    def end_forward(self) -> fx.Node | None:
        """The boundary node; None if the step is forward only."""
        return next(iter(self.graph.find_nodes(op="call_function", target=ops.end_forward)), None)

    @property
    def has_backward(self) -> bool:
        return self.end_forward is not None

    @property
    def is_persistent(self) -> bool:
        """False if buffers are allocated at each use, in place of one arena."""
        return "persistent_buffers" not in self.without

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.num_nodes if self.shards_across else self.world_size

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.ranks_per_node * self.num_nodes

    def phases(self) -> Iterator[tuple[Phase, list[fx.Node]]]:
        """The nodes between placeholders and output, phase by phase, without the boundary."""
        nodes: list[fx.Node] = []
        phase = Phase.FORWARD
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            if node.target is ops.end_forward:
                yield phase, nodes
                phase, nodes = Phase.BACKWARD, []
            else:
                nodes.append(node)
        yield phase, nodes

    def phase_of(self) -> dict[fx.Node, Phase]:
        """The phase of every node between placeholders and output."""
        return {node: phase for phase, nodes in self.phases() for node in nodes}

    def positions(self) -> dict[fx.Node, int]:
        """The index of every node in execution order."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    # -- nodes by role -------------------------------------------------------------------------------------------

    def nodes(self, *roles: Role) -> list[fx.Node]:
        """All nodes of the given roles, in order."""
        if all(each in _TARGET_OF_ROLE for each in roles):
            find = self.graph.find_nodes
            found = (find(op="call_function", target=_TARGET_OF_ROLE[each], sort=False) for each in set(roles))
            return sorted(itertools.chain.from_iterable(found))
        return [node for node in self.graph.nodes if role(node) in roles]

    def param_nodes(self) -> dict[str, fx.Node]:
        """The placeholder of each parameter that the graph has; no pass adds or removes one."""
        if not self._param_nodes:
            placeholders = self.graph.find_nodes(op="placeholder")
            self._param_nodes = {info(node).fqn: node for node in placeholders if role(node) is Role.PARAM}
        return self._param_nodes

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def model_outputs(self) -> Sequence[Any]:
        """The nodes (or plain values) that the model returns, flat."""
        return cast(Any, self.output.args[0])[0]

    @property
    def grads(self) -> dict[str, fx.Node]:
        """The gradient of each parameter the step reaches: its node, or the wait of its reduce-scatter."""
        return cast(Any, self.output.args[0])[1]

    @property
    def input_grads(self) -> Sequence[fx.Node | None]:
        """The gradient of each input, None where there is none, in the order of the input placeholders."""
        return cast(Any, self.output.args[0])[2]

    def set_output(self, outputs: Sequence[Any], grads: dict[str, fx.Node], input_grads: Sequence[Any]) -> None:
        self.output.args = ((tuple(outputs), dict(grads), tuple(input_grads)),)

    # -- collectives ---------------------------------------------------------------------------------------------

    def bucket(self, fqns: tuple[str, ...]) -> Bucket:
        """The bucket of these members, in this order."""
        if fqns not in self._buckets:
            self._buckets[fqns] = make_bucket((self.params[fqn] for fqn in fqns), self.world_size, self.layout)
        return self._buckets[fqns]

    def bucket_of(self, collective: fx.Node) -> Bucket:
        """The bucket that an all_gather, a reduce_scatter, or the wait or release of one, is about.

        Between the two bucketing passes a reduce_scatter may have but some members of the bucket of its gather; it is
        then a reduction of that whole bucket, of which only these are kept.
        """
        fqns = members(collective)
        if len(fqns) == 1 and not is_gather(collective):
            param = self.param_nodes()[fqns[0]]
            fqns = next((members(user) for user in param.users if role(user) is Role.ALL_GATHER), fqns)
        return self.bucket(fqns)

    def wire_bucket_of(self, collective: fx.Node) -> Bucket:
        """The same as it travels, in the collective's wire format."""
        return on_wire(self.bucket_of(collective), wire_format(collective))

    def secondaries(self) -> dict[tuple[str, ...], Bucket]:
        """The buckets of which a step keeps secondary shards, as they travel inside a node, by their members."""
        return {
            members(start): stage_inside(self.wire_bucket_of(start), self.num_nodes)
            for start in self.nodes(Role.ALL_GATHER)
            if is_inside(start)
        }

    def is_staged(self, collective: fx.Node) -> bool:
        """True if what travels is of another layout or type than the bucket, so that both need memory."""
        return self.bucket_of(collective).interleaved or wire_format(collective) is not None


def started_by(node: fx.Node) -> fx.Node:
    """The all_gather or reduce_scatter that a wait or a release belongs to; a start is its own."""
    while role(node) in (Role.WAIT, Role.RELEASE):
        node = cast(fx.Node, node.args[0])
    return node


def operands(start: fx.Node) -> tuple[fx.Node, ...]:
    """The shards of an all_gather (parameter placeholders), or the slots of a reduce_scatter."""
    return cast(tuple[fx.Node, ...], start.args)


def members(collective: fx.Node) -> tuple[str, ...]:
    """The names of the parameters of a collective (a start, wait or release), in bucket order."""
    start = started_by(collective)
    if role(start) is Role.ALL_GATHER:
        return tuple(info(shard).fqn for shard in operands(start))
    return tuple(grad_fqn(slot) for slot in operands(start))


def wire_format(collective: fx.Node) -> WireFormat | None:
    """The type in which a collective (a start, wait or release) travels; None: that of its bucket."""
    kwargs = started_by(collective).kwargs
    dtype = cast("torch.dtype | None", kwargs.get("dtype"))
    return None if dtype is None else WireFormat(dtype, cast("int | None", kwargs.get("block_numel")))


def set_wire_format(start: fx.Node, format: WireFormat) -> None:
    """Let an all_gather or a reduce_scatter travel in another type than its bucket's."""
    blocks = {} if format.block_numel is None else {"block_numel": format.block_numel}
    start.kwargs = {**start.kwargs, "dtype": format.dtype, **blocks}


def is_inside(gather: fx.Node) -> bool:
    """True for an all_gather from the secondary shards of a node, which its first gather in the step left there."""
    return bool(gather.kwargs.get("inside", False))


def set_inside(start: fx.Node) -> None:
    """Let an all_gather read secondary shards."""
    start.kwargs = {**start.kwargs, "inside": True}


def wait_of(start: fx.Node) -> fx.Node:
    """The one wait of a collective."""
    return next(user for user in start.users if role(user) is Role.WAIT)


def release_of(wait: fx.Node) -> fx.Node | None:
    """The release of a gathered bucket, None if it has none yet."""
    return next((user for user in wait.users if role(user) is Role.RELEASE), None)


def is_gather(node: fx.Node) -> bool:
    """True for the start, the wait and the release of an all-gather."""
    return role(started_by(node)) is Role.ALL_GATHER


def is_gathered_param(node: fx.Node) -> bool:
    """True for one unsharded parameter: an output of the wait of an all-gather."""
    return node.target is operator.getitem and role(arg := cast(fx.Node, node.args[0])) is Role.WAIT and is_gather(arg)


def gathered_params(wait: fx.Node) -> dict[str, fx.Node]:
    """The outputs of the wait of an all-gather that something reads, by parameter name."""
    names = members(wait)
    return {names[cast(int, user.args[1])]: user for user in wait.users if user.target is operator.getitem}


def grad_of(slot: fx.Node) -> fx.Node | None:
    """The gradient that a write_grad writes; None for a slot of zeros."""
    return cast("fx.Node | None", slot.args[0])


def grad_fqn(slot: fx.Node) -> str:
    """The parameter whose gradient a write_grad writes."""
    return cast(str, slot.args[1])


def written_in_place(slot: fx.Node) -> fx.Node | None:
    """The grad_slot that the gradient of a write_grad was computed into; None if it must be copied."""
    grad = grad_of(slot)
    if grad is None:
        return None
    memory = grad.args[0] if grad.args and "out" not in grad.kwargs else grad.kwargs.get("out")
    return memory if isinstance(memory, fx.Node) and role(memory) is Role.GRAD_SLOT else None


def slot_fqn(memory: fx.Node) -> str:
    """The parameter whose gradient lies in a grad_slot."""
    return cast(str, memory.args[0])


def first_write(slot: fx.Node) -> fx.Node:
    """Where the memory of a gradient must be there: at its grad_slot if it is computed in place, else at its copy."""
    return written_in_place(slot) or slot


def is_random(node: fx.Node) -> bool:
    """True for an operator that draws from a random generator; attention without dropout does not."""
    target = cast(Any, node.target)
    if not torch_internals.is_overload(target) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return torch_internals.argument(node, "dropout_p") != 0.0


def is_pointwise(node: fx.Node) -> bool:
    """True for an operator that computes each element of its output from one element of each input."""
    target = cast(Any, node.target)
    return torch_internals.is_overload(target) and torch.Tag.pointwise in target.tags


def is_pure(node: fx.Node) -> bool:
    """True for compute that gives the same value when it is run again, and changes nothing."""
    mutates = torch_internals.is_overload(node.target) and torch_internals.is_mutable(node.target)
    return role(node) is Role.COMPUTE and not mutates and not is_random(node)


def tensor_bytes(value: Any) -> int:
    """Bytes that a tensor's elements span; 0 for anything else."""
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.dtype.itemsize


def copy_of(step: StepGraph) -> StepGraph:
    """The same step with a graph of its own."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in step.graph.nodes:
        nodes[node] = graph.node_copy(node, lambda n: nodes[n])
    return dataclasses.replace(step, graph=graph, kept=set(step.kept), _buckets={}, _param_nodes={})


def new_value(node: fx.Node, value: Any) -> fx.Node:
    """Give a node its own `meta["val"]`, so that no two nodes seem to share storage by accident."""
    node.meta["val"] = value
    return node

"""The only IR: a torch.fx.Graph of the whole step, plus one frozen NodeInfo per node under one meta key.

placeholders (params, buffers, inputs, tangents) and constants | forward | end_forward | backward | output

The output is `(model outputs, parameter gradients by name, input gradients)`; a forward-only step has no end_forward
and no gradients. Passes read and write collectives through the accessors here, never through `node.args[i]`.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.errors import PassOrderError
from fxzero.graph import ops
from fxzero.graph.aliasing import in_memory_of
from fxzero.graph.layout import Bucket, LayoutName, ParamSpec, Payload, make_bucket
from fxzero.graph.nodes import TARGET_OF_ROLE, Role, info, is_gather, is_inside, members, role, wire_format
from fxzero.graph.recipe import Recipe
from fxzero.graph.sharding import Sharding
from fxzero.graph.stages import stage_inside
from fxzero.graph.wire import on_wire

_PLACEHOLDERS = frozenset({Role.PARAM, Role.BUFFER, Role.INPUT, Role.STATE, Role.TANGENT})


class Phase(enum.Enum):
    """The two halves of a step."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass
class StepGraph:
    """One step of a model: its graph, and the facts that give the graph its meaning."""

    graph: fx.Graph
    params: dict[str, ParamSpec]
    """Maps canonical names to parameters, in registration order; also parameters that the step does not use."""
    sharding: Sharding = field(default_factory=Sharding)
    """Mesh of the ranks that the step is planned for."""
    constants: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor], repr=False)
    """Maps targets of get_attr nodes to tensors that the model's code made from Python values in the trace."""
    written: tuple[str, ...] = ()
    """Names of the parameters whose new values are the last of the model's outputs, in this order."""
    synchronize: bool = True
    """False if gradients are written to unsharded buckets and not reduced: under no_sync(), or with `accumulate=`."""
    kept: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    """Members of each bucket that stays gathered from forward to backward."""
    resident: tuple[tuple[str, ...], ...] = ()
    """Members of each bucket that stays gathered, in memory of its own, until the shards change; in the order of this
    memory. Also buckets that this step does not gather."""
    layout: LayoutName = "contiguous"
    """Name of the layout by which parameters are cut; no pass depends on it."""
    fixed_buckets: tuple[tuple[str, ...], ...] | None = None
    """Members of each bucket, once the layout is fixed."""
    accumulate: int = 1
    """Micro-batches of one step of the optimizer, if all but the last need not reduce their gradients."""
    keeps_unsharded: bool = False
    """True if all but the last of them keep their gradients unsharded."""
    without: tuple[str, ...] = ()
    """Optimizations that are turned off; see `reference/ablation.py`."""
    _buckets: dict[tuple[str, ...], Bucket] = field(default_factory=dict[tuple[str, ...], Bucket], repr=False)
    _param_nodes: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node], repr=False)

    def under(self, recipe: Recipe, *, synchronize: bool = True) -> StepGraph:
        """A copy of a traced step, to be planned by a recipe.

        Args:
            synchronize: False for a step under no_sync().
        """
        step = copy_of(self)
        step.synchronize, step.layout, step.without = synchronize, recipe.layout, recipe.without
        step.fixed_buckets = recipe.buckets
        step.accumulate, step.keeps_unsharded = recipe.accumulate, recipe.keeps_unsharded
        return step

    @property
    def needs_unsharded(self) -> bool:
        """True if a rank holds unsharded gradients: in this step, or from the micro-batches before it."""
        return not self.synchronize or self.keeps_unsharded

    @property
    def arguments(self) -> list[fx.Node]:
        """The placeholders that each call gives values to: its own tensors, then values of the Python state."""
        return [*self.nodes(Role.INPUT), *self.nodes(Role.STATE)]

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
        """False if buffers are allocated at each use instead of in one arena."""
        return "persistent_buffers" not in self.without

    def phases(self) -> Iterator[tuple[Phase, list[fx.Node]]]:
        """The nodes between placeholders and output, phase by phase, without the boundary."""
        nodes = [node for node in self.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
        boundary = self.end_forward
        end = len(nodes) if boundary is None else nodes.index(boundary)
        yield Phase.FORWARD, nodes[:end]
        if boundary is not None:
            yield Phase.BACKWARD, nodes[end + 1 :]

    def phase_of(self) -> dict[fx.Node, Phase]:
        """The phase of every node between placeholders and output."""
        return {node: phase for phase, nodes in self.phases() for node in nodes}

    def positions(self) -> dict[fx.Node, int]:
        """The index of every node in execution order."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    # -- nodes by role -------------------------------------------------------------------------------------------

    def nodes(self, *roles: Role) -> list[fx.Node]:
        """All nodes of the given roles, in order."""
        if all(each in TARGET_OF_ROLE for each in roles):
            find = self.graph.find_nodes
            found = (find(op="call_function", target=TARGET_OF_ROLE[each], sort=False) for each in set(roles))
            return sorted(itertools.chain.from_iterable(found))
        if _PLACEHOLDERS.issuperset(roles):
            return [node for node in self.graph.find_nodes(op="placeholder") if role(node) in roles]
        return [node for node in self.graph.nodes if role(node) in roles]

    def param_nodes(self) -> dict[str, fx.Node]:
        """Maps names of parameters to their placeholders in the graph, which no pass adds or removes."""
        if not self._param_nodes:
            placeholders = self.graph.find_nodes(op="placeholder")
            self._param_nodes = {info(node).fqn: node for node in placeholders if role(node) is Role.PARAM}
        return self._param_nodes

    def all_gathers(self) -> list[fx.Node]:
        """The all-gathers, in order, for a pass that needs them.

        Raises:
            PassOrderError: parameters are read, and the graph has no all-gather.
        """
        starts = self.nodes(Role.ALL_GATHER)
        if not starts and any(param.users for param in self.param_nodes().values()):
            raise PassOrderError("no all_gather in the graph; run InsertAllGathers first")
        return starts

    def reduce_scatters(self) -> list[fx.Node]:
        """The reduce-scatters, in order, for a pass that needs them.

        Raises:
            PassOrderError: gradients are to be reduced, and the graph has no reduce-scatter.
        """
        starts = self.nodes(Role.REDUCE_SCATTER)
        if not starts and self.has_backward and self.synchronize and self.grads:
            raise PassOrderError("no reduce_scatter in the graph; run InsertReduceScatters first")
        return starts

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def model_outputs(self) -> Sequence[Any]:
        """The nodes (or plain values) that the model returns, flat; behind them the new values of parameters."""
        return cast(Any, self.output.args[0])[0]

    @property
    def observed(self) -> set[fx.Node]:
        """The tensors that hooks of the model look at."""
        calls = self.graph.find_nodes(op="call_function", target=ops.observe)
        return {tensor for call in calls for tensor in call.all_input_nodes}

    @property
    def new_values(self) -> dict[str, fx.Node]:
        """Maps names of parameters that forward writes to their new values, of full size."""
        outputs = self.model_outputs
        return dict(zip(self.written, outputs[len(outputs) - len(self.written) :], strict=True))

    @property
    def grads(self) -> dict[str, fx.Node]:
        """Maps names of parameters that the step reaches to gradients, or to the waits of their reduce-scatters."""
        return cast(Any, self.output.args[0])[1]

    @property
    def input_grads(self) -> Sequence[fx.Node | None]:
        """The gradients of inputs in the order of their placeholders, None for an input without a gradient."""
        return cast(Any, self.output.args[0])[2]

    def set_output(self, outputs: Sequence[Any], grads: dict[str, fx.Node], input_grads: Sequence[Any]) -> None:
        self.output.args = ((tuple(outputs), dict(grads), tuple(input_grads)),)

    # -- collectives ---------------------------------------------------------------------------------------------

    def bucket(self, fqns: tuple[str, ...]) -> Bucket:
        """The bucket with these members, in this order."""
        if fqns not in self._buckets:
            params = (self.params[fqn] for fqn in fqns)
            self._buckets[fqns] = make_bucket(params, self.sharding.shard_ranks, self.layout)
        return self._buckets[fqns]

    def bucket_of(self, collective: fx.Node) -> Bucket:
        """The bucket of a collective (a start, wait or release).

        Before BucketReduceScatters, a reduce_scatter has one member of a bucket that is gathered as a whole. It then
        counts as a reduction of the whole bucket.
        """
        fqns = members(collective)
        if len(fqns) == 1 and not is_gather(collective):
            param = self.param_nodes()[fqns[0]]
            fqns = next((members(user) for user in param.users if role(user) is Role.ALL_GATHER), fqns)
        return self.bucket(fqns)

    def payload_of(self, collective: fx.Node) -> Payload:
        """The bucket of a collective in the dtype that compute reads (gathered parameters) or writes (gradients)."""
        bucket = self.bucket_of(collective)
        return bucket.gathered if is_gather(collective) else bucket.gradients

    def travels(self, collective: fx.Node) -> Payload:
        """The payload of a collective in its wire format."""
        return on_wire(self.payload_of(collective), wire_format(collective))

    def secondaries(self) -> dict[tuple[str, ...], Payload]:
        """Maps the members of each bucket with secondary shards to its payload inside a node."""
        return {
            members(start): stage_inside(self.travels(start), self.sharding.num_nodes)
            for start in self.nodes(Role.ALL_GATHER)
            if is_inside(start)
        }

    def is_staged(self, collective: fx.Node) -> bool:
        """True if the payload has another layout or dtype than the bucket, so that both need memory."""
        return self.bucket_of(collective).interleaved or wire_format(collective) is not None


Pass: TypeAlias = Callable[[StepGraph], None]
"""A compiler pass: a callable that edits a step in place. A pass that changes numbers has a property `tolerance`: the
largest change of outputs and gradients, relative to the largest magnitude among them."""


def is_read_in_backward(step: StepGraph, value: fx.Node) -> bool:
    """True if backward reads a value of forward, or another value in its memory."""
    boundary, output = step.end_forward, step.output
    if boundary is None:
        return False
    return any(boundary < user < output for alias in in_memory_of(value) for user in alias.users)


def copy_of(step: StepGraph) -> StepGraph:
    """A copy of a step, with a graph of its own."""
    graph, nodes = torch_internals.PlainGraph(), dict[fx.Node, fx.Node]()
    copied = nodes.__getitem__
    for node in step.graph.nodes:
        args, kwargs = fx.map_arg(node.args, copied), node.kwargs and fx.map_arg(node.kwargs, copied)
        copy = nodes[node] = graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        copy.meta.update(node.meta)
    return dataclasses.replace(step, graph=graph, kept=set(step.kept), _buckets={}, _param_nodes={})

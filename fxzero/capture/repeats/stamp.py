"""Stamps the nodes of traced blocks in the places of equal ones that were left out of a trace.

traced:   block 0 | block 1 | block 22 | block 23               the same in backward, the other way round
stamped:  block 0 | block 1 | copies of 1 as 2 .. 21 | block 22 | block 23

Blocks 1 and 22 must be equal node by node, in both phases: what they read of themselves, of the block before and of
the block behind has equal places there, and all else that they read are the same nodes. That is why a copy is what a
trace of the whole model has in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, fx
from torch.fx.node import map_arg

from fxzero.capture.repeats.find import Run
from fxzero.capture.repeats.record import NotRepeatedError
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, info, role
from fxzero.graph.step import Phase, StepGraph

_At: TypeAlias = tuple[Phase, int, int]
"""The phase, the index of the block's segment in the whole model, and the index among its nodes."""


def stamp(step: StepGraph, runs: Sequence[Run], paths: Sequence[str | None]) -> None:
    """Add the blocks that were left out, in place.

    Args:
        runs: the equal blocks, in order.
        paths: of the block of each segment of the whole model.

    Raises:
        NotRepeatedError: the traced blocks do not repeat.
    """
    traced = _Traced(step, runs, paths)
    for run in runs:
        traced.check(run)
    grads = dict(step.grads)
    for run in runs:
        grads |= _Stamp(traced, run).apply()
    step.set_output(step.model_outputs, {name: grads[name] for name in step.params if name in grads}, step.input_grads)


class _Traced:
    """The nodes of a traced step by block."""

    def __init__(self, step: StepGraph, runs: Sequence[Run], paths: Sequence[str | None]) -> None:
        self.step, self.paths = step, paths
        skipped = {index for run in runs for index in run.skipped}
        self.order = {index: at for at, index in enumerate(i for i in range(len(paths)) if i not in skipped)}
        """Maps the segments that were traced to their order."""
        self.at: dict[fx.Node, _At] = {}
        self.nodes: dict[tuple[Phase, int], list[fx.Node]] = {}
        self.placeholders = {(role(n), info(n).fqn): n for n in step.graph.find_nodes(op="placeholder")}
        self._indices = {path: index for index, path in enumerate(paths) if path is not None}
        self._known: dict[str, int | None] = {"": None}
        self._by_block: dict[int, list[tuple[str, fx.Node]]] = {}
        run_of = {index: run for run in runs for index in range(run.first, run.end)}
        for phase, nodes in step.phases():
            self._place(phase, nodes, run_of)
        self.constants: dict[int, list[fx.Node]] = {}
        """The constants that one block of a run alone reads, in order."""
        self.owner_of: dict[fx.Node, tuple[int, int]] = {}
        """The block that alone reads a constant, and the index among the block's."""
        for node in step.graph.find_nodes(op="get_attr"):
            readers = {self.at[user][1] if user in self.at else None for user in node.users}
            block = readers.pop() if len(readers) == 1 else None
            if block in run_of:
                found = self.constants.setdefault(block, [])
                self.owner_of[node] = block, len(found)
                found.append(node)

    def _place(self, phase: Phase, nodes: Sequence[fx.Node], run_of: Mapping[int, Run]) -> None:
        """Place the nodes of a phase. What no block made belongs, in backward, to the block before it in its run."""
        blocks = [self._block_of(info(node).fqn) for node in nodes]
        following: int | None = None
        behind: list[int | None] = []
        for block in reversed(blocks):
            following = following if block is None else block
            behind.append(following)
        now: int | None = None
        ran: list[int] = []
        for node, block, then in zip(nodes, blocks, reversed(behind), strict=True):
            if block is None and now is not None and then is not None and now in run_of:
                block = now if run_of[now] is run_of.get(then) else None
            if block is None:
                now = None
                continue
            if block != now:
                ran.append(block)
            now = block
            found = self.nodes.setdefault((phase, block), [])
            self.at[node] = phase, block, len(found)
            found.append(node)
        wanted = [block for block in self.order if block in run_of and (phase, block) in self.nodes]
        if [block for block in ran if block in run_of] != (wanted if phase is Phase.FORWARD else wanted[::-1]):
            raise NotRepeatedError("the nodes of equal blocks do not lie together")

    def _block_of(self, fqn: str) -> int | None:
        if fqn not in self._known:
            index = self._indices.get(fqn)
            self._known[fqn] = self._block_of(fqn.rpartition(".")[0]) if index is None else index
        return self._known[fqn]

    def distance(self, node: fx.Node, block: int, period: int) -> int | None:
        """How many traced blocks a node lies behind one; None if it is no part of a block so near."""
        at = self.at.get(node)
        if at is None:
            return None
        distance = self.order[at[1]] - self.order[block]
        return distance if abs(distance) <= period else None

    def check(self, run: Run) -> None:
        """Prove that the first group of a run and the first one behind the gap are equal.

        Raises:
            NotRepeatedError: they are not.
        """
        for block in range(run.first, run.first + run.period):
            other = block + run.after_gap - run.first
            for phase in Phase:
                if self._described(phase, block, run.period) != self._described(phase, other, run.period):
                    raise NotRepeatedError(f"{phase.value} of {self.paths[block]} and {self.paths[other]} differ")
            if self._grads(block) != self._grads(other):
                raise NotRepeatedError(f"{self.paths[block]} and {self.paths[other]} have other gradients")
        for block in run.skipped:
            for name, placeholder in self._own_placeholders(block):
                if placeholder.users:
                    raise NotRepeatedError(f"{name} is read outside of {self.paths[block]}")
        others = {*self.step.model_outputs, *self.step.input_grads}
        for block in range(run.after_gap, run.end):
            for node in self.nodes.get((Phase.BACKWARD, block), ()):
                users = [user for user in node.users if user.op != "output"]
                if node in others or not all(self._is_in(user, run) for user in users):
                    raise NotRepeatedError(
                        f"backward of {self.paths[block]} makes what is read outside of equal blocks"
                    )

    def _own_placeholders(self, block: int) -> list[tuple[str, fx.Node]]:
        if not self._by_block:
            for (_, name), node in self.placeholders.items():
                of = self._block_of(name) if role(node) in (Role.PARAM, Role.BUFFER) else None
                if of is not None:
                    self._by_block.setdefault(of, []).append((name, node))
        return self._by_block.get(block, [])

    def _is_in(self, node: fx.Node, run: Run) -> bool:
        at = self.at.get(node)
        return at is not None and run.first <= at[1] < run.end

    def _grads(self, block: int) -> dict[str, Any]:
        """The places of the gradients of a block's parameters."""
        prefix = f"{self.paths[block]}."
        grads = {name[len(prefix) :]: grad for name, grad in self.step.grads.items() if name.startswith(prefix)}
        places = {name: self.at.get(grad) for name, grad in grads.items()}
        if any(place is None or place[:2] != (Phase.BACKWARD, block) for place in places.values()):
            raise NotRepeatedError(f"gradients of {self.paths[block]} are made elsewhere")
        return {name: place and place[2] for name, place in places.items()}

    def _described(self, phase: Phase, block: int, period: int) -> list[Any]:
        path = str(self.paths[block])
        found: list[Any] = []
        for node in self.nodes.get((phase, block), ()):
            reads: list[Any] = []

            def read(argument: fx.Node, reads: list[Any] = reads) -> str:
                reads.append(self._seen_from(argument, block, path, period))
                return "node"

            arguments = repr(map_arg((node.args, node.kwargs), read))
            fqn = info(node).fqn
            label = fqn[len(path) :] if fqn == path or fqn.startswith(f"{path}.") else (fqn,)
            geometry = _geometry(node.meta.get("val"))
            found.append((node.target, arguments, reads, role(node), label, geometry, node.meta.get("stack_trace")))
        return found

    def _seen_from(self, node: fx.Node, block: int, path: str, period: int) -> Any:
        if node in self.owner_of:
            value = self.step.constants[str(node.target)]
            return "constant", self.owner_of[node][1], _geometry(value), repr(value.tolist())
        distance = self.distance(node, block, period)
        if distance is not None:
            phase, _, index = self.at[node]
            return phase, distance, index
        name = info(node).fqn
        if role(node) in (Role.PARAM, Role.BUFFER) and name.startswith(f"{path}."):
            return role(node), name[len(path) :]
        return node


class _Stamp:
    """The copies of one run."""

    def __init__(self, traced: _Traced, run: Run) -> None:
        self._traced, self._run = traced, run
        self._made: dict[_At, fx.Node] = {}
        self._constants: dict[tuple[int, int], fx.Node] = {}
        """The constants of copies, by segment and index."""

    def apply(self) -> dict[str, fx.Node]:
        """Add the copies.

        Returns:
            The gradients of their parameters by name.
        """
        traced, run = self._traced, self._run
        groups = range(run.first + run.period, run.after_gap, run.period)
        self._copy_constants(groups)
        first_behind = next(n for b in range(run.after_gap, run.end) for n in traced.nodes.get((Phase.FORWARD, b), ()))
        self._copy(Phase.FORWARD, groups, first_behind)
        template = range(run.first, run.first + run.period)
        of_backward = [n for b in reversed(template) for n in traced.nodes.get((Phase.BACKWARD, b), ())]
        if of_backward:
            self._copy(Phase.BACKWARD, reversed(groups), of_backward[0])
        for block in (*template, *range(run.after_gap, run.after_gap + run.period)):
            for phase in Phase:
                for node in traced.nodes.get((phase, block), ()):
                    self._read_copies(node, block)
        return self._grads(groups)

    def _copy_constants(self, groups: range) -> None:
        """Let each copy have constants of its own, as it would have in a trace."""
        traced, run, step = self._traced, self._run, self._traced.step
        blocks = range(run.first, run.first + run.period)
        behind = range(run.after_gap, run.after_gap + run.period)
        first_behind = next((node for block in behind for node in traced.constants.get(block, ())), None)
        if first_behind is None:
            return
        with step.graph.inserting_before(first_behind):
            for group in groups:
                for block in blocks:
                    for index, original in enumerate(traced.constants.get(block, ())):
                        copy = block + group - run.first
                        target = f"{original.target}_{copy}"
                        step.constants[target] = step.constants[str(original.target)]
                        node = self._constants[copy, index] = step.graph.create_node("get_attr", target)
                        node.meta.update(original.meta)

    def _copy(self, phase: Phase, groups: Any, before: fx.Node) -> None:
        """Copy the nodes of a phase for groups that begin at these segments, in this order."""
        traced, run = self._traced, self._run
        template = range(run.first, run.first + run.period)
        blocks = template if phase is Phase.FORWARD else reversed(template)
        nodes = [(block, traced.nodes.get((phase, block), [])) for block in blocks]
        with traced.step.graph.inserting_before(before):
            for group in groups:
                for block, originals in nodes:
                    self._copy_block(phase, block, block + group - run.first, originals)

    def _copy_block(self, phase: Phase, block: int, copy: int, originals: Sequence[fx.Node]) -> None:
        traced, period = self._traced, self._run.period
        old, new = str(traced.paths[block]), str(traced.paths[copy])
        graph = traced.step.graph

        def argument(node: fx.Node) -> fx.Node:
            distance = traced.distance(node, block, period)
            if distance is not None:
                of, _, index = traced.at[node]
                return self._node(of, copy + distance, index)
            if node in traced.owner_of:
                return self._constants[copy, traced.owner_of[node][1]]
            stored = info(node)
            if stored.role in (Role.PARAM, Role.BUFFER) and stored.fqn.startswith(f"{old}."):
                return traced.placeholders[stored.role, new + stored.fqn[len(old) :]]
            return node

        for index, original in enumerate(originals):
            node = graph.create_node(
                original.op, original.target, map_arg(original.args, argument), map_arg(original.kwargs, argument)
            )
            node.meta.update(original.meta)
            stored = info(original)
            if stored.fqn == old or stored.fqn.startswith(f"{old}."):
                node.meta[META_KEY] = NodeInfo(stored.role, new + stored.fqn[len(old) :])
            self._made[phase, copy, index] = node

    def _node(self, phase: Phase, block: int, index: int) -> fx.Node:
        """The node of a block, traced or copied."""
        made = self._made.get((phase, block, index))
        return self._traced.nodes[phase, block][index] if made is None else made

    def _read_copies(self, node: fx.Node, block: int) -> None:
        """Let a traced node read the copies next to its block, where it read the traced nodes next to it."""
        traced = self._traced

        def argument(read: fx.Node) -> fx.Node:
            distance = traced.distance(read, block, self._run.period)
            if not distance or block + distance not in self._run.skipped:
                return read
            phase, _, index = traced.at[read]
            return self._made[phase, block + distance, index]

        node.args, node.kwargs = map_arg(node.args, argument), map_arg(node.kwargs, argument)

    def _grads(self, groups: range) -> dict[str, fx.Node]:
        traced, run = self._traced, self._run
        found: dict[str, fx.Node] = {}
        for block in range(run.first, run.first + run.period):
            prefix = f"{traced.paths[block]}."
            for name, grad in traced.step.grads.items():
                if name.startswith(prefix):
                    index = traced.at[grad][2]
                    for group in groups:
                        copy = block + group - run.first
                        new = f"{traced.paths[copy]}.{name[len(prefix) :]}"
                        found[new] = self._made[Phase.BACKWARD, copy, index]
        return found


def _geometry(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return [_geometry(each) for each in value] if isinstance(value, (list, tuple)) else repr(value)

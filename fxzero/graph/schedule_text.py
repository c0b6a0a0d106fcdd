"""The schedule of a step as text, for people, golden files and diffs.

It has one line per collective, wait and release, one per region of fused compute, and one per run of other compute of a
block; no times, no addresses.
"""

import difflib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tabulate import tabulate
from torch import fx

from fxzero.graph.liveness import bucket_bytes_live
from fxzero.graph.names import block_depth, block_of, bucket_label, format_bytes, format_ops, printable
from fxzero.graph.nodes import (
    COLLECTIVES,
    WAIT_OF_MODEL,
    Role,
    grad_fqn,
    grad_of,
    info,
    is_gather,
    is_inside,
    is_island,
    members,
    model_collective,
    role,
    started_by,
    tensor_bytes,
    wire_format,
    written_in_place,
)
from fxzero.graph.regions import is_region, region_of
from fxzero.graph.step import Phase, StepGraph
from fxzero.graph.traffic import sent_in

ROOT = "(model)"
"""Name of the block of compute outside of all submodules."""


@dataclass(frozen=True)
class Row:
    """One line of a schedule."""

    phase: Phase
    action: str
    """One of all_gather, wait, release, reduce_scatter, wait_reduce, compute and island; or a collective of the model's
    own."""
    name: str
    """Label of the bucket, or name of the block that computes."""
    nbytes: int = 0
    """Bytes of the whole bucket in its wire format at a start; 0 elsewhere."""
    num_ops: int = 0
    """Number of operators in a run of compute; 0 elsewhere."""
    live_bytes: int = 0
    """Bytes of gathered and gradient buckets that are live after this line."""
    wire: str = ""
    """Wire format at a start that has one; else empty."""
    reach: str = ""
    """"across" at the start of a collective across nodes that share shards; else empty."""
    nodes: tuple[fx.Node, ...] = field(default=(), repr=False, compare=False)
    """The nodes that run in this line, in order."""


@dataclass(frozen=True)
class Totals:
    """Communication of a step, per rank."""

    num_all_gathers: int
    num_reduce_scatters: int
    gathered_bytes: int
    """Bytes received by all-gathers, padding and scales included."""
    reduced_bytes: int
    """Bytes sent by reduce-scatters, inside and across nodes."""
    gathered_peak_bytes: int
    """Largest sum of the bytes of gathered buckets. A bucket counts from its start to its release, and with the bytes
    that travel until its wait."""
    copied_grad_bytes: int
    """Bytes of gradients that are copied to their bucket, because they could not be computed in it."""
    interleaved_copy_bytes: int
    """Bytes copied between buckets and the buffers that travel; 0 except in the interleaved layout."""
    across_bytes: int = 0
    """Bytes sent to other nodes, by all collectives."""
    gathered_across_bytes: int = 0
    """Bytes sent to other nodes by all-gathers, which is also what they receive from them."""


def totals(step: StepGraph) -> Totals:
    """The collectives of a step and their bytes."""
    gathers, reduces = step.nodes(Role.ALL_GATHER), step.nodes(Role.REDUCE_SCATTER)
    gathered = [sent_in(step, start) for start in gathers]
    reduced = [sent_in(step, start) for start in reduces]
    gathered_across, reduced_across = (sum(sent.across for sent in each) for each in (gathered, reduced))
    return Totals(
        num_all_gathers=len(gathers),
        num_reduce_scatters=len(reduces),
        gathered_bytes=sum(sent.total for sent in gathered),
        reduced_bytes=sum(sent.total for sent in reduced),
        gathered_peak_bytes=max(bucket_bytes_live(step, Role.ALL_GATHER).values(), default=0),
        copied_grad_bytes=sum(
            step.params[grad_fqn(slot)].grad_nbytes
            for slot in step.nodes(Role.WRITE_GRAD)
            if grad_of(slot) is not None and not written_in_place(slot)
        ),
        interleaved_copy_bytes=sum(
            step.payload_of(start).nbytes for start in (*gathers, *reduces) if step.bucket_of(start).interleaved
        ),
        across_bytes=gathered_across + reduced_across,
        gathered_across_bytes=gathered_across,
    )


def rows(step: StepGraph) -> Iterator[Row]:
    """The lines of a schedule, in order."""
    live = bucket_bytes_live(step, Role.ALL_GATHER, Role.REDUCE_SCATTER)
    depth = block_depth(step.params)
    for phase, nodes in step.phases():
        block, num_ops = "", 0
        run: list[fx.Node] = []
        for node in nodes:
            is_line = role(node) in COLLECTIVES or bool(model_collective(node)) or is_island(node) or is_region(node)
            computes = role(node) is Role.COMPUTE and node.target is not operator.getitem and not is_line
            # Gradient sums and the like belong to no module: they continue the run they stand in.
            name = (block_of(info(node).fqn, depth) or block) if computes else block
            if num_ops and (is_line or name != block):
                yield _run(phase, block, num_ops, live, run)
                num_ops, run = 0, []
            run.append(node)
            if is_line:
                yield _line(step, phase, live, run)
                run = []
            block, num_ops = "" if is_line else name, num_ops + computes
        if num_ops:
            yield _run(phase, block, num_ops, live, run)


def _run(phase: Phase, block: str, num_ops: int, live: Mapping[fx.Node, int], nodes: Sequence[fx.Node]) -> Row:
    """The line of operators of one block."""
    return Row(
        phase, "compute", printable(block) or ROOT, num_ops=num_ops, live_bytes=live[nodes[-1]], nodes=tuple(nodes)
    )


def _line(step: StepGraph, phase: Phase, live: Mapping[fx.Node, int], nodes: Sequence[fx.Node]) -> Row:
    """The line of a start, wait or release, of a collective of the model, an island or a region: the last of nodes."""
    node, every = nodes[-1], tuple(nodes)
    if is_region(node):
        name = (printable(block_of(info(node).fqn, block_depth(step.params))) or ROOT) + " fused"
        return Row(phase, "compute", name, num_ops=region_of(node).num_ops, live_bytes=live[node], nodes=every)
    if is_island(node):
        name = printable(cast(Any, node.args[0]).fqn) or ROOT
        return Row(phase, "island", name, live_bytes=live[node], nodes=every)
    if action := model_collective(node):
        sent = cast(Any, node.args[0])
        tensors = [] if action == WAIT_OF_MODEL else [sent] if isinstance(sent, fx.Node) else sent
        nbytes = sum(tensor_bytes(each.meta["val"]) for each in tensors)
        name = printable(block_of(info(node).fqn, block_depth(step.params))) or ROOT
        return Row(phase, action, name, nbytes, live_bytes=live[node], nodes=every)
    is_start = started_by(node) is node
    action = role(node).value if is_start or is_gather(node) else "wait_reduce"
    nbytes = step.travels(node).nbytes if is_start else 0
    wire = str(wire_format(node) or "") if is_start else ""
    reach = "across" if is_start and step.sharding.shards_across and not is_inside(node) else ""
    label = bucket_label(members(node))
    return Row(phase, action, label, nbytes, live_bytes=live[node], wire=wire, reach=reach, nodes=every)


def header(step: StepGraph) -> str:
    """The first line: the totals of the step, per rank."""
    t = totals(step)
    sharding = step.sharding
    ranks, received, sent = f"world_size={sharding.world_size}", "received", f"{format_bytes(t.reduced_bytes)} sent"
    gathered = t.gathered_bytes - t.gathered_across_bytes
    if sharding.num_nodes > 1:
        sharing = ", sharded across" if sharding.shards_across else ""
        ranks += f" ({sharding.num_nodes} nodes of {sharding.node_ranks}{sharing})"
        received = "received inside"
        if sharding.shards_across:
            received += f", {format_bytes(t.gathered_across_bytes)} across"
        across = t.across_bytes - t.gathered_across_bytes
        sent = f"{format_bytes(t.reduced_bytes - across)} sent inside, {format_bytes(across)} across"
    parts = [
        ranks,
        f"{_count(t.num_all_gathers, 'all_gather')}, {format_bytes(gathered)} {received}"
        + _as_types(step, Role.ALL_GATHER),
        f"{_count(t.num_reduce_scatters, 'reduce_scatter')}, {sent}" + _as_types(step, Role.REDUCE_SCATTER),
        f"gathered peak {format_bytes(t.gathered_peak_bytes)}",
    ]
    for kept, until in ((step.kept, "kept"), (step.resident, "until the shards change")):
        if kept:
            parts.append(f"{until} {format_bytes(sum(step.bucket(fqns).gathered.nbytes for fqns in kept))}")
    if t.copied_grad_bytes and step.synchronize and step.nodes(Role.RELEASE, Role.GRAD_SLOT):
        parts.append(f"gradients: {format_bytes(t.copied_grad_bytes)} copied")
    if t.interleaved_copy_bytes:
        parts.append(f"interleaved: {format_bytes(t.interleaved_copy_bytes)} copied")
    if step.without:
        parts.append(f"without {', '.join(step.without)}")
    if not step.has_backward or (not step.synchronize and step.keeps_unsharded):
        del parts[2]
    elif not step.synchronize:
        parts[2] = f"no_sync: {_unsharded(step)}"
    if step.accumulate > 1 and step.has_backward:
        parts.append(_accumulation(step))
    return "  ".join(parts)


def _unsharded(step: StepGraph) -> str:
    gathered_buckets = {step.bucket_of(start) for start in step.nodes(Role.ALL_GATHER)}
    held = sum(bucket.sums.nbytes for bucket in gathered_buckets if bucket.requires_grad)
    return f"unsharded gradients {format_bytes(held)}"


def _accumulation(step: StepGraph) -> str:
    """Which backwards of a gradient accumulation reduce gradients."""
    if not step.keeps_unsharded:
        return f"accumulate={step.accumulate}: each backward reduces into the shards"
    return f"accumulate={step.accumulate}: {_unsharded(step)}, 1 of {step.accumulate} backwards reduces"


def _as_types(step: StepGraph, which: Role) -> str:
    """The dtypes that travel (" as bfloat16"), or "" if no collective of this role has a wire format."""
    starts = step.nodes(which)
    if all(wire_format(start) is None for start in starts):
        return ""
    types = {str(wire_format(start) or step.payload_of(start).dtype).removeprefix("torch.") for start in starts}
    return f" as {', '.join(sorted(types))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_schedule(
    step: StepGraph, *, memory: bool = False, columns: Mapping[str, Sequence[str]] | None = None
) -> str:
    """A schedule as text.

    Args:
        memory: add a column with the bytes of gathered and gradient buckets that are live after each line.
        columns: further columns by title, with a cell for each line.
    """
    all_rows = list(rows(step))
    actions = max((len(row.action) for row in all_rows), default=0)
    width = max((len(row.name) for row in all_rows), default=0)
    lines = [header(step)]
    widths = {title: max(map(len, (title, *cells))) for title, cells in (columns or {}).items()}
    if columns:
        indent = actions + width + 13 + 11 * memory
        lines.append(" " * indent + "".join(f"  {title:>{widths[title]}}" for title in columns))
    for index, row in enumerate(all_rows):
        if row.phase is Phase.BACKWARD and (index == 0 or all_rows[index - 1].phase is Phase.FORWARD):
            lines.append("--- end of forward ---")
        amount = format_bytes(row.nbytes) if row.nbytes else format_ops(row.num_ops) if row.num_ops else ""
        line = f"{row.action:<{actions}}  {row.name:<{width}}  {amount:>9}"
        if memory:
            line += f"  {format_bytes(row.live_bytes):>9}"
        line += "".join(f"  {cells[index]:>{widths[title]}}" for title, cells in (columns or {}).items())
        lines.append("  ".join(filter(None, (line, row.wire, row.reach))).rstrip())
    return "\n".join(lines)


def format_table(step: StepGraph) -> str:
    """A schedule as a table with phases, bytes and live bytes."""
    cells = [
        (
            row.phase.value,
            row.action,
            row.name,
            " ".join(filter(None, (format_bytes(row.nbytes), row.wire, row.reach))) if row.nbytes else "",
            row.num_ops or "",
            format_bytes(row.live_bytes),
        )
        for row in rows(step)
    ]
    columns = ("phase", "action", "bucket or block", "bytes", "ops", "live")
    return header(step) + "\n" + tabulate(cells, headers=columns, colalign=("left",) * 3 + ("right",) * 3)


def format_diff(before: str, after: str) -> str:
    """A unified diff of two schedules."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=2))

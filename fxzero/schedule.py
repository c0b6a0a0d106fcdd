"""The schedule of a step as text: what a person reads, a golden file holds and a diff compares.

One line per collective, wait and release, one per run of compute of the same block; no times, no addresses.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator
from dataclasses import dataclass

from tabulate import tabulate
from torch import fx

from fxzero.ir import Phase, Role, StepGraph, info, is_gather, members, release_of, role, started_by, wait_of
from fxzero.text import block_of, bucket_label, format_bytes

ROOT = "(model)"
"""The block of what the model itself computes, outside of its submodules."""
_LINES = (Role.ALL_GATHER, Role.REDUCE_SCATTER, Role.WAIT, Role.RELEASE)


@dataclass(frozen=True)
class Row:
    """One line of a schedule."""

    phase: Phase
    action: str
    """all_gather, wait, release, reduce_scatter or compute."""
    name: str
    """The bucket, or the block that computes."""
    nbytes: int = 0
    """Bytes of the whole bucket at a start; 0 elsewhere."""
    num_ops: int = 0
    """Operators of a run of compute; 0 elsewhere."""
    live_bytes: int = 0
    """Bytes of gathered and gradient buckets that are live after this line."""


@dataclass(frozen=True)
class Totals:
    """What a step costs in communication, per rank."""

    num_all_gathers: int
    num_reduce_scatters: int
    gathered_bytes: int
    """Bytes received by all-gathers."""
    reduced_bytes: int
    """Bytes sent by reduce-scatters."""
    gathered_peak_bytes: int
    """Largest sum of the bytes of gathered buckets, from a start to its release."""


def live_until(step: StepGraph, start: fx.Node) -> fx.Node:
    """The node at which the memory of a collective's bucket is free again."""
    wait = wait_of(start)
    if not is_gather(start):
        return wait
    if release := release_of(wait):
        return release
    return end_of_phase(step, start)


def end_of_phase(step: StepGraph, node: fx.Node) -> fx.Node:
    """The boundary or the output, whichever ends the phase of `node`."""
    boundary = step.end_forward
    if boundary is not None and node < boundary:
        return boundary
    return step.output


def totals(step: StepGraph) -> Totals:
    """Count the collectives of a step and their bytes."""
    gathers, reduces = step.nodes(Role.ALL_GATHER), step.nodes(Role.REDUCE_SCATTER)
    deltas: dict[fx.Node, int] = {}
    for start in gathers:
        nbytes = step.bucket_of(start).nbytes
        deltas[start] = deltas.get(start, 0) + nbytes
        end = live_until(step, start)
        deltas[end] = deltas.get(end, 0) - nbytes
    live = peak = 0
    for node in step.graph.nodes:
        live += deltas.get(node, 0)
        peak = max(peak, live)
    others = step.world_size - 1
    return Totals(
        num_all_gathers=len(gathers),
        num_reduce_scatters=len(reduces),
        gathered_bytes=sum(step.bucket_of(start).shard_nbytes * others for start in gathers),
        reduced_bytes=sum(step.bucket_of(start).shard_nbytes * others for start in reduces),
        gathered_peak_bytes=peak,
    )


def rows(step: StepGraph) -> Iterator[Row]:
    """The lines of a schedule, in order."""
    frees: dict[fx.Node, int] = {}
    for start in step.nodes(Role.ALL_GATHER, Role.REDUCE_SCATTER):
        end = live_until(step, start)
        frees[end] = frees.get(end, 0) + step.bucket_of(start).nbytes
    live = 0
    for phase, nodes in step.phases():
        block, num_ops = "", 0
        for node in nodes:
            live -= frees.get(node, 0)
            if role(node) in _LINES:
                if num_ops:
                    yield Row(phase, "compute", block or ROOT, num_ops=num_ops, live_bytes=live)
                block, num_ops = "", 0
                is_start = started_by(node) is node
                nbytes = step.bucket_of(node).nbytes if is_start else 0
                live += nbytes
                action = role(node).value if is_start or is_gather(node) else "wait_reduce"
                yield Row(phase, action, bucket_label(members(node)), nbytes, live_bytes=live)
            elif role(node) is Role.COMPUTE and node.target is not operator.getitem:
                # Gradient sums and the like belong to no module: they continue the run they stand in.
                name = block_of(info(node).fqn) or block
                if num_ops and name != block:
                    yield Row(phase, "compute", block or ROOT, num_ops=num_ops, live_bytes=live)
                    num_ops = 0
                block, num_ops = name, num_ops + 1
        if num_ops:
            yield Row(phase, "compute", block or ROOT, num_ops=num_ops, live_bytes=live)


def header(step: StepGraph) -> str:
    """The first line: the totals of the step."""
    t = totals(step)
    text = (
        f"world_size={step.world_size}  all_gather x{t.num_all_gathers} {format_bytes(t.gathered_bytes)}"
        f"  reduce_scatter x{t.num_reduce_scatters} {format_bytes(t.reduced_bytes)}"
        f"  gathered peak {format_bytes(t.gathered_peak_bytes)}"
    )
    if step.has_backward and not step.synchronize:
        held = sum(step.bucket_of(start).nbytes for start in _trained_gathers(step))
        text += f"  no_sync: unsharded gradients {format_bytes(held)}"
    return text


def _trained_gathers(step: StepGraph) -> list[fx.Node]:
    by_bucket = {step.bucket_of(start): start for start in step.nodes(Role.ALL_GATHER)}
    return [start for bucket, start in by_bucket.items() if bucket.requires_grad]


def format_schedule(step: StepGraph, *, memory: bool = False) -> str:
    """A schedule as text.

    Args:
        memory: add a column with the bytes of gathered and gradient buckets that are live after each line.
    """
    all_rows = list(rows(step))
    actions = max((len(row.action) for row in all_rows), default=0)
    width = max((len(row.name) for row in all_rows), default=0)
    lines = [header(step)]
    for index, row in enumerate(all_rows):
        if row.phase is Phase.BACKWARD and (index == 0 or all_rows[index - 1].phase is Phase.FORWARD):
            lines.append("--- end of forward ---")
        amount = format_bytes(row.nbytes) if row.nbytes else f"{row.num_ops} ops" if row.num_ops else ""
        line = f"{row.action:<{actions}}  {row.name:<{width}}  {amount:>9}"
        if memory:
            line += f"  {format_bytes(row.live_bytes):>9}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def format_table(step: StepGraph) -> str:
    """A schedule as a table with phases, bytes and live bytes."""
    cells = [
        (
            row.phase.value,
            row.action,
            row.name,
            format_bytes(row.nbytes) if row.nbytes else "",
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

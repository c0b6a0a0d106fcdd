"""`zero.schedule.memory`: what a rank's memory is for, planned and measured, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from fxzero.graph.names import format_bytes
from fxzero.graph.step import StepGraph
from fxzero.host.extras import require
from fxzero.memory.footprint import Footprint, live_at
from fxzero.memory.lifetimes import live_bytes

GATHERED = ("gather",)
GRADIENTS = ("gradient", "scratch", "partial")
STAGING = ("staging", "quantize")


@dataclass(frozen=True)
class MemoryReport:
    """The memory of one rank for one plan, in bytes; print it.

    Gathered buckets, gradient buckets and large temporaries share one arena, and take its bytes in turn; the
    optimizer's state is that of the optimizer given to compile, or as of AdamW, until it is there.
    """

    footprint: Footprint
    step: StepGraph
    variant_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes of the arena that each variant of the plan needs, by what it does with gradients."""
    measured_bytes: int | None = None
    """The most that was in use since compile, over what was before it: of the allocator on CUDA, else of the whole
    process (resident set); None before a step, or where the process was larger before."""

    @property
    def planned_peak_bytes(self) -> int:
        """All that is held, the arena, and activations at their peak."""
        return self.footprint.planned_peak_bytes

    @property
    def lower_bound_bytes(self) -> int:
        """The largest sum of live bytes at any point of the step."""
        return self.footprint.lower_bound_bytes

    @property
    def gather_arena_bytes(self) -> int:
        """Gathered buckets, at most."""
        return max(self.footprint.live(*GATHERED), default=0)

    @property
    def gradient_arena_bytes(self) -> int:
        """Gradient buckets and what their reductions work in, at most."""
        return max(self.footprint.live(*GRADIENTS), default=0)

    @property
    def temporary_arena_bytes(self) -> int:
        """Temporary activations that have a place in the arena, at most."""
        placed = [buffer for buffer in self.footprint.arena.buffers if buffer.kind == "temporary"]
        return max(live_bytes(placed), default=0)

    @property
    def saved_bytes_at_peak(self) -> int:
        """Activations saved for backward, where they and others of the allocator's are the most together."""
        return self._activations_at_peak()[0]

    @property
    def other_bytes_at_peak(self) -> int:
        """Other activations of the allocator's at that point."""
        return self._activations_at_peak()[1]

    def _activations_at_peak(self) -> tuple[int, int]:
        pairs = zip(*map(self._activations, ("saved", "temporary")), strict=True)
        return max(pairs, key=sum, default=(0, 0))

    def _activations(self, kind: str) -> list[int]:
        """Live bytes of activations of one kind at each position, but for those that have a place in the arena."""
        buffers = [buffer for buffer in self.footprint.activations if buffer.kind == kind]
        return live_at(buffers, self.footprint.num_positions)

    def rows(self) -> list[tuple[str, int | None]]:
        """What it is for, and the bytes."""
        held, arena = self.footprint.held, self.footprint.arena
        rows: list[tuple[str, int | None]] = [
            ("parameters (shards)", held.parameters),
            ("gradients (shards)", held.gradients),
            ("optimizer state (shards)", held.optimizer_state),
            ("buffers", held.buffers),
        ]
        if held.secondaries:
            rows.insert(1, ("parameters (secondary shards)", held.secondaries))
        if held.unsharded_gradients:
            rows.append(("unsharded gradients, no_sync()", held.unsharded_gradients))
        rows += [
            ("arena" if self.step.is_persistent else "allocated at each use", self.footprint.arena_bytes),
            ("  this plan", arena.peak_bytes),
            ("  this plan, lower bound", arena.lower_bound_bytes),
            *((f"  {variant}", nbytes) for variant, nbytes in self.variant_bytes.items()),
            ("  gathered buckets, at most", self.gather_arena_bytes),
            ("  gradient buckets, at most", self.gradient_arena_bytes),
            ("  temporary activations, at most", self.temporary_arena_bytes),
        ]
        if any(buffer.kind in STAGING for buffer in arena.buffers):
            rows.append(("  staging, at most", max(self.footprint.live(*STAGING))))
        return [
            *rows,
            ("saved activations at the peak", self.saved_bytes_at_peak),
            ("other activations at the peak", self.other_bytes_at_peak),
            ("planned peak", self.planned_peak_bytes),
            ("lower bound", self.lower_bound_bytes),
            ("measured", self.measured_bytes),
        ]

    def __str__(self) -> str:
        cells = [(name, "-" if nbytes is None else format_bytes(nbytes)) for name, nbytes in self.rows()]
        return tabulate(
            cells, headers=("memory of a rank", "bytes"), colalign=("left", "right"), preserve_whitespace=True
        )

    __repr__ = __str__

    def plot_memory(self, path: str | Path) -> None:
        """Draw live bytes over the step, by kind, as a stacked area with the peak marked.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        require("plot_memory", "train", "matplotlib")
        from matplotlib.figure import Figure  # takes a second to import

        held, footprint = self.footprint.held, self.footprint
        areas = {
            "parameters": [held.parameters + held.secondaries] * footprint.num_positions,
            "gradients": [held.gradients + held.unsharded_gradients] * footprint.num_positions,
            "optimizer state": [held.optimizer_state] * footprint.num_positions,
            "buffers": [held.buffers] * footprint.num_positions,
            "gathered buckets": footprint.live(*GATHERED),
            "gradient buckets": footprint.live(*GRADIENTS),
            "staging": footprint.live(*STAGING),
            "saved activations": footprint.live("saved"),
            "temporary activations": footprint.live("temporary"),
        }
        shown = {name: [nbytes / 2**20 for nbytes in live] for name, live in areas.items() if any(live)}
        figure = Figure(figsize=(10, 5), layout="constrained")
        axes = figure.subplots()
        axes.stackplot(range(footprint.num_positions), *shown.values(), labels=list(shown), step="post", linewidth=0)
        peak, height = footprint.peak_position, footprint.lower_bound_bytes
        axes.plot([peak], [height / 2**20], "kv", clip_on=False)
        axes.annotate(
            f"peak {format_bytes(height)}",
            (peak, height / 2**20),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
        )
        axes.axhline(self.planned_peak_bytes / 2**20, color="black", linestyle=":", linewidth=1)
        axes.annotate(
            f"planned {format_bytes(self.planned_peak_bytes)}", (0, self.planned_peak_bytes / 2**20), va="bottom"
        )
        boundary = self.step.end_forward
        if boundary is not None:
            axes.axvline(self.step.positions()[boundary], color="black", linewidth=1)
        axes.set(
            xlabel="operator (the line: end of forward)", ylabel="MiB on a rank", xlim=(0, footprint.num_positions)
        )
        axes.set_ylim(0, self.planned_peak_bytes / 2**20 * 1.1)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.savefig(Path(path), dpi=150)

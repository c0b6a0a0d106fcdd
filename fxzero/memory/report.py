"""`zero.schedule.memory`: what a rank's memory is for, planned and measured, as a table and as a picture."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from fxzero.graph.names import format_bytes
from fxzero.graph.step import StepGraph
from fxzero.host.extras import require
from fxzero.memory.footprint import Footprint
from fxzero.memory.lifetimes import Kind, live_at, peak_of

GRADIENTS = (Kind.GRADIENT, Kind.SCRATCH, Kind.PARTIAL)
STAGING = (Kind.STAGING, Kind.QUANTIZE)


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
        return max(self.footprint.live(Kind.GATHER), default=0)

    @property
    def gradient_arena_bytes(self) -> int:
        """Gradient buckets and what their reductions work in, at most."""
        return max(self.footprint.live(*GRADIENTS), default=0)

    @property
    def temporary_arena_bytes(self) -> int:
        """Temporary activations that have a place in the arena, at most."""
        return peak_of([buffer for buffer in self.footprint.arena.buffers if buffer.kind is Kind.TEMPORARY])

    @property
    def saved_bytes_at_peak(self) -> int:
        """Activations saved for backward, where they and others of the allocator's are the most together."""
        return self._activations_at_peak()[0]

    @property
    def other_bytes_at_peak(self) -> int:
        """Other activations of the allocator's at that point."""
        return self._activations_at_peak()[1]

    def _activations_at_peak(self) -> tuple[int, int]:
        saved, other = (
            live_at([b for b in self.footprint.activations if b.kind is kind], self.footprint.num_positions)
            for kind in (Kind.SAVED, Kind.TEMPORARY)
        )
        return max(zip(saved, other, strict=True), key=sum, default=(0, 0))

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
        if held.copies:
            rows.insert(1, ("parameters (copies that compute reads)", held.copies))
        if held.unsharded_gradients:
            why = f"accumulate={self.step.accumulate}" if self.step.keeps_unsharded else "no_sync()"
            rows.append((f"unsharded gradients, {why}", held.unsharded_gradients))
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
        held_bytes = {
            "parameters": held.parameters + held.copies + held.secondaries,
            "gradients": held.gradients + held.unsharded_gradients,
            "optimizer state": held.optimizer_state,
            "buffers": held.buffers,
        }
        areas = {name: [nbytes] * footprint.num_positions for name, nbytes in held_bytes.items()} | {
            "gathered buckets": footprint.live(Kind.GATHER),
            "gradient buckets": footprint.live(*GRADIENTS),
            "staging": footprint.live(*STAGING),
            "saved activations": footprint.live(Kind.SAVED),
            "temporary activations": footprint.live(Kind.TEMPORARY),
        }
        shown = {name: [nbytes / 2**20 for nbytes in live] for name, live in areas.items() if any(live)}
        figure = Figure(figsize=(10, 5), layout="constrained")
        axes = figure.subplots()
        axes.stackplot(range(footprint.num_positions), *shown.values(), labels=list(shown), step="post", linewidth=0)
        peak, planned_mib = (footprint.peak_position, self.lower_bound_bytes / 2**20), self.planned_peak_bytes / 2**20
        axes.plot(*peak, "kv", clip_on=False)
        text = f"peak {format_bytes(self.lower_bound_bytes)}"
        axes.annotate(text, peak, textcoords="offset points", xytext=(0, 8), ha="center")
        axes.axhline(planned_mib, color="black", linestyle=":", linewidth=1)
        axes.annotate(f"planned {format_bytes(self.planned_peak_bytes)}", (0, planned_mib), va="bottom")
        if self.step.end_forward is not None:
            axes.axvline(self.step.positions()[self.step.end_forward], color="black", linewidth=1)
        axes.set(xlabel="operator (the line: end of forward)", ylabel="MiB on a rank")
        axes.set(xlim=(0, footprint.num_positions), ylim=(0, planned_mib * 1.1))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.savefig(Path(path), dpi=150)

"""The reports of a run: metrics as JSON lines, a picture of the loss, and a summary on the screen."""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

import torch

from fxzero.graph.names import format_bytes

METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "loss.png"
SCHEDULE_FILE = "schedule.txt"
_MAX_SCHEDULE_LINES = 40


@dataclass(frozen=True)
class StepMetrics:
    """One logged step. `gathered_bytes` is that of one rank; all other numbers are those of all ranks."""

    step: int
    """Finished optimizer steps."""
    loss: float
    """Mean over the ranks and over the steps since the last logged one."""
    lr: float
    grad_norm: float
    tokens: int
    """Tokens trained on since the start."""
    tokens_per_s: float
    """Tokens per second since the last logged step."""
    gathered_bytes: int
    """Bytes received by all-gathers of training since the start."""
    elapsed: float
    """Seconds since the start of training."""


@dataclass(frozen=True)
class HeldOutMetrics:
    """One evaluation."""

    step: int
    held_out_loss: float


@dataclass
class Metrics:
    """The metrics of a run, each written as a line when it comes, on the rank that has a file."""

    file: TextIO | None = None
    failure: OSError | None = None
    """Why no further line is written: a full disk must not end a training."""
    steps: list[StepMetrics] = field(default_factory=list[StepMetrics])
    held_out: list[HeldOutMetrics] = field(default_factory=list[HeldOutMetrics])
    board: Any = None
    """A SummaryWriter of TensorBoard that gets all numbers too, on the rank that has one."""

    def add(self, entry: StepMetrics | HeldOutMetrics) -> None:
        """Keep an entry, and write it."""
        if isinstance(entry, StepMetrics):
            self.steps.append(entry)
        else:
            self.held_out.append(entry)
        numbers = asdict(entry)
        if self.board is not None:
            for name, value in numbers.items():
                if name != "step":
                    self.board.add_scalar(name, value, entry.step)
        if self.file is None or self.failure is not None:
            return
        try:
            self.file.write(json.dumps(numbers) + "\n")
            self.file.flush()
        except OSError as error:
            self.failure = error

    def close(self) -> None:
        """Close the file; what it could not take stays unwritten."""
        if self.board is not None:
            self.board.close()
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()


def read_metrics(path: Path, last_step: int) -> list[StepMetrics | HeldOutMetrics]:
    """The entries in the file of a run up to a step; none where there is no file."""
    entries: list[StepMetrics | HeldOutMetrics] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a crash left unfinished
            numbers = json.loads(line)
            if numbers["step"] <= last_step:
                entries.append(HeldOutMetrics(**numbers) if "held_out_loss" in numbers else StepMetrics(**numbers))
    return entries


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """An exponential moving average, corrected for its start at zero."""
    averages = accumulate(values, lambda average, value: weight * average + (1 - weight) * value, initial=0.0)
    return [average / (1 - weight**count) for count, average in enumerate(averages) if count]


def draw_loss(metrics: Metrics, title: str, path: Path) -> None:
    """Write a picture of the training loss, as it was and smoothed, and of the held-out loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [each.step for each in metrics.steps], [each.loss for each in metrics.steps]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training")
    axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    steps, losses = [each.step for each in metrics.held_out], [each.held_out_loss for each in metrics.held_out]
    axes.plot(steps, losses, "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per predicted token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes of the most memory that this process has had: "host", and "gpu" if it trains on one."""
    peak = {"host": _peak_resident_bytes()}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_summary(metrics: Metrics, peaks: list[dict[str, int]], schedule: str, out: Path) -> str:
    """The summary of a run: the schedule of a step, the losses, the memory, and the files."""
    lines = ["", "The schedule of a step:", shorten(schedule, out / SCHEDULE_FILE), ""]
    if metrics.steps:
        last = metrics.steps[-1]
        speed = last.tokens / last.elapsed
        lines.append(
            f"{last.step} steps, {last.tokens} tokens in {last.elapsed:.0f} s ({speed:.0f} tokens/s), "
            f"{format_bytes(last.gathered_bytes)} gathered per rank"
        )
    if metrics.held_out:
        first, final = metrics.held_out[0], metrics.held_out[-1]
        lines.append(f"held-out loss    {first.held_out_loss:.3f} at the start, {final.held_out_loss:.3f} at the end")
    for rank, peak in enumerate(peaks):
        parts = ", ".join(f"{format_bytes(nbytes)} {kind}" for kind, nbytes in peak.items())
        lines.append(f"peak memory      rank {rank}: {parts}")
    lines.append(f"written to       {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return "\n".join(lines)


def shorten(text: str, full: Path) -> str:
    """A text of many lines without its middle; the whole text is in the file `full`."""
    lines = text.splitlines()
    if len(lines) <= _MAX_SCHEDULE_LINES:
        return text
    half = _MAX_SCHEDULE_LINES // 2
    left_out = len(lines) - 2 * half
    return "\n".join([*lines[:half], f"... {left_out} more lines, all in {full} ...", *lines[-half:]])

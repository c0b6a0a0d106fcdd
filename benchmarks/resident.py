"""Resident memory of this process, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def resident_mib(*fields: str) -> list[float]:
    """Fields of /proc/self/status in MiB: VmRSS is what is resident now, VmHWM the most since the mark was reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[field].split()[0]) / 1024 for field in fields]


def reset_peak() -> None:
    """Let the mark of the peak be what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")

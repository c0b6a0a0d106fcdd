"""Raw results: read, checked, and put together by group, rate and system."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.network.bound import Costs
from benchmarks.network.systems import SYSTEMS

QUIET = 0.1
"""A sample is quiet if others (processes, or guests of the same host) took less than this share of a core."""
ENOUGH = 3
"""Medians are of quiet samples if there are as many, else of all."""
LOSS_TOLERANCE = 1e-3
"""Relative difference of a step's loss from that of the other systems."""
MIXED_TOLERANCE = 2e-2
"""The same where systems compute in bf16."""
MIXED_SYSTEMS = {name for name, system in SYSTEMS.items() if system.is_mixed}


@dataclass(frozen=True)
class Sample:
    """One step: of each number the largest over the ranks."""

    seconds: float
    forward_s: float
    main_cpu_s: float
    other_cpu_s: float
    sent_bytes: int
    faults: int
    foreign: float
    """Share of a core that others took."""


@dataclass
class Cell:
    """The samples of one system of one group at one rate."""

    samples: list[Sample] = field(default_factory=list[Sample])

    @property
    def quiet(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.foreign < QUIET]

    @property
    def disturbed(self) -> bool:
        """True if too few samples are quiet."""
        return len(self.quiet) < min(ENOUGH, len(self.samples))

    def median(self, name: str) -> float:
        """Of a field of the samples."""
        return statistics.median(getattr(sample, name) for sample in (self.samples if self.disturbed else self.quiet))

    @property
    def least_s(self) -> float:
        return min(sample.seconds for sample in self.samples)


@dataclass
class Results:
    """All that one or more files hold."""

    runs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    cells: dict[tuple[str, float, str], Cell] = field(default_factory=lambda: defaultdict(Cell))
    """By group, rate and system."""
    peak_mib: dict[str, float] = field(default_factory=dict[str, float])
    facts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    failures: dict[str, str] = field(default_factory=dict[str, str])
    losses: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """By system and step: the mean over the ranks."""
    param_bytes: int = 0

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(group for group, _, _ in self.cells))

    @property
    def rates(self) -> list[float]:
        return sorted({rate for _, rate, _ in self.cells}, reverse=True)

    @property
    def world_size(self) -> int:
        return self.runs[0]["turns"]["world_size"]

    def systems(self, group: str) -> list[str]:
        """Those of a group that were measured, in its order."""
        return [name for name in group.split(",") if any(key[0] == group and key[2] == name for key in self.cells)]

    def of(self, system: str, rate: float | None = None) -> Cell:
        """The samples of a system in all groups, at one rate or at all."""
        return Cell(
            [
                sample
                for (_, at, name), cell in self.cells.items()
                if name == system and rate in (None, at)
                for sample in cell.samples
            ]
        )

    def sent_param_bytes(self, system: str) -> float:
        """Bytes of the parameters in the dtype in which a system computes."""
        return self.param_bytes / 2 if SYSTEMS[system].is_mixed else self.param_bytes

    def costs(self, rate: float, *, mixed: bool = False) -> Costs | None:
        """What a lower bound at a rate is made of; None where the run lacks a system that tells it.

        The compute is that of fxzero's generated code, or eager's where it was not run. The link's speed is that of the
        fastest step of the bare loop.

        Args:
            mixed: for steps in bf16, whose compute is that of fxzero's code alone.
        """
        wire, compute = self.of("wire", rate), self.of("fxzero_bf16_stubbed" if mixed else "fxzero_stubbed")
        compute = compute if compute.samples or mixed else self.of("compute")
        if not wire.samples or not compute.samples or "wire" not in self.facts:
            return None
        sent = self.facts["wire"]["sent_bytes"]
        return Costs(
            compute_s=compute.median("seconds"),
            forward_s=compute.median("forward_s"),
            bytes_per_s=sent / wire.least_s,
            cpu_s_per_byte=(wire.median("main_cpu_s") + wire.median("other_cpu_s")) / sent,
        )


def read(paths: Iterable[Path]) -> Results:
    """Put together the lines of files that `run` wrote."""
    results = Results()
    for path in paths:
        for line in path.read_text().splitlines():
            _add(results, json.loads(line))
    return results


def _add(results: Results, entry: Mapping[str, Any]) -> None:
    kind = entry["kind"]
    if kind == "run":
        results.runs.append(dict(entry))
        return
    system = entry["system"]
    if kind == "failed":
        results.failures[system] = entry["why"]
        return
    if kind == "end":
        results.peak_mib[system] = max(report["peak_mib"] for report in entry["reports"])
        results.facts[system] = entry["reports"][0]["facts"]
        return
    steps = list(zip(*entry["samples"], strict=True))
    if SYSTEMS[system].policy.trains:
        for ranks in steps:
            results.losses[system][ranks[0]["step"]] = statistics.fmean(rank["loss"] for rank in ranks)
    if kind == "warmup":
        results.param_bytes = entry["ready"][0]["param_bytes"]
        return
    cell = results.cells[entry["group"], entry["rate"], system]
    for ranks in steps[1:]:  # the first step of a turn pays for cold caches
        names = ("seconds", "forward_s", "main_cpu_s", "other_cpu_s", "sent_bytes", "faults")
        most = {name: max(rank[name] for rank in ranks) for name in names}
        cell.samples.append(Sample(**most, foreign=entry["foreign"]))


def wrong_losses(losses: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """The systems whose loss differs from the others', by how much at most, relative to it.

    All systems have the same seed and data; a step's right loss is taken to be the median over the systems of the same
    precision.
    """
    worst: dict[str, float] = {}
    for mixed in (False, True):
        alike = {system: of for system, of in losses.items() if (system in MIXED_SYSTEMS) == mixed}
        for step in {step for of_system in alike.values() for step in of_system}:
            there = {system: of_system[step] for system, of_system in alike.items() if step in of_system}
            right = statistics.median(there.values())
            for system, loss in there.items():
                difference = abs(loss - right) / abs(right) if loss == loss else float("inf")
                if not difference <= (MIXED_TOLERANCE if mixed else LOSS_TOLERANCE):
                    worst[system] = max(worst.get(system, 0.0), difference)
    return worst

"""Drive the measurement: groups of systems that stay alive together and take turns, at one rate after the other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.about import about
from benchmarks.network.systems import GROUPS, SYSTEMS, Shape
from benchmarks.network.testbed import Network
from benchmarks.network.world import World
from benchmarks.ranks import RankDied

FIRST_PORT = 29500


@dataclass(frozen=True)
class Turns:
    """What to measure, and how often."""

    groups: Sequence[Sequence[str]] = GROUPS
    rates: Sequence[float] = (8, 4, 2, 1, 0.5)
    """Gbit/s."""
    rounds: Sequence[int] = (2, 2, 2, 2, 1)
    """Turns of each system at each rate; the last number holds for all further rates."""
    k: int = 3
    """Consecutive steps of a turn; the first is not counted."""
    warmup: int = 13
    """Steps of each system before any is counted; fxzero plans again from measured costs in the last of them."""
    start_rate: float = 2
    """Gbit/s while systems start: what fxzero calibrates, whatever the rate later is."""
    shape: Shape = field(default_factory=Shape)
    world_size: int = 2
    rank_options: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k is {self.k}; it must be at least 2, as the first step of a turn is not counted.")
        if unknown := sorted({name for group in self.groups for name in group} - SYSTEMS.keys()):
            raise ValueError(f"There is no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}.")
        for group in self.groups:
            if len({*group}) != len(group):
                raise ValueError(f"A group has a system twice: {','.join(group)}.")

    def rounds_at(self, rate: float) -> int:
        """How many turns each system takes at a rate."""
        return self.rounds[min(self.rates.index(rate), len(self.rounds) - 1)]


def with_compute(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The groups, each with the compute-only system that its ratios are based on."""
    return [list(group) if "compute" in group else ["compute", *group] for group in groups]


def chosen(systems: Collection[str] | None) -> list[list[str]]:
    """The default groups, with only the systems that were asked for; those in no group make one more."""
    if systems is None:
        return [list(group) for group in GROUPS]
    groups = [[name for name in group if name in systems] for group in GROUPS]
    grouped = {name for group in groups for name in group}
    groups.append([name for name in systems if name not in grouped])
    return with_compute([group for group in groups if {*group} - {"compute"}] or [["compute"]])


def run(turns: Turns, out: Path) -> None:
    """Measure, and append to a file of JSON lines; its first line says what was run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file, Network(turns.world_size) as network:
        _write(file, "run", **about("python -m benchmarks.network"), turns=asdict(turns))
        for group in turns.groups:
            _run_group(turns, group, network, file, out.parent)


def _run_group(turns: Turns, group: Sequence[str], network: Network, file: TextIO, logs: Path) -> None:
    name = ",".join(group)
    network.set_rate(turns.start_rate)
    alive: list[World] = []
    try:
        for index, system in enumerate(group):
            begin = time.perf_counter()
            world = World(system, network, FIRST_PORT + index, logs, turns.shape, turns.rank_options)
            alive.append(world)
            with _Losing(world, alive, file, name):
                ready = world.wait_until_ready()
                samples = world.ask("steps", count=turns.warmup)
                world.ask("reset_peak")
                _write(file, "warmup", group=name, system=system, ready=ready, samples=samples)
                _say(f"{system}: ready after {time.perf_counter() - begin:.0f} s")
        for rate in turns.rates:
            network.set_rate(rate)
            for round_ in range(turns.rounds_at(rate)):
                for world in list(alive):
                    with _Losing(world, alive, file, name):
                        samples, foreign = _take_turn(world, alive, turns.k)
                        _write(
                            file, "turn", group=name, system=world.system, rate=rate, round=round_, samples=samples,
                            foreign=foreign,
                        )  # fmt: skip
            _say(f"{rate:g} Gbit/s: done")
        for world in list(alive):
            with _Losing(world, alive, file, name):
                _write(file, "end", group=name, system=world.system, reports=world.ask("report"))
    finally:
        for world in alive:
            world.close()


def _take_turn(world: World, alive: Sequence[World], k: int) -> tuple[list[Any], float]:
    own = {session for other in alive for session in other.sessions}
    begin, taken = time.perf_counter(), foreign_cpu_s(own) + stolen_cpu_s()
    samples = world.ask("steps", count=k)
    return samples, (foreign_cpu_s(own) + stolen_cpu_s() - taken) / (time.perf_counter() - begin)


class _Losing:
    """Go on without a system whose rank died, and write down why."""

    def __init__(self, world: World, alive: list[World], file: TextIO, group: str) -> None:
        self._world, self._alive, self._file, self._group = world, alive, file, group

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, RankDied):
            return False
        _say(str(error))
        _write(self._file, "failed", group=self._group, system=self._world.system, why=str(error))
        self._alive.remove(self._world)
        self._world.close()
        return True


def foreign_cpu_s(own_sessions: Collection[int]) -> float:
    """CPU seconds so far of all processes but this one, those of these sessions, and the kernel's."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        session, virtual_bytes = int(fields[3]), int(fields[20])
        if session not in own_sessions and virtual_bytes and stat.parent.name != str(os.getpid()):
            ticks += sum(map(int, fields[11:15]))  # with those of its children that ended
    return ticks / os.sysconf("SC_CLK_TCK")


def stolen_cpu_s() -> float:
    """CPU seconds so far that a hypervisor gave to others while a process here was ready to run."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(first[8]) / os.sysconf("SC_CLK_TCK")


def _write(file: TextIO, kind: str, **values: Any) -> None:
    file.write(json.dumps({"kind": kind, **values}) + "\n")
    file.flush()


def _say(text: str) -> None:
    print(f"{time.strftime('%T')} {text}", flush=True)

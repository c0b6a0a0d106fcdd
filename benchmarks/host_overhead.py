"""Host work of a step of tiny layers: seconds, main-thread CPU seconds and Python calls, of fxzero and its peers.

    python -m benchmarks.host_overhead --simple-fsdp .../simple_fsdp.py

Two ranks over the loopback interface, each system in processes of its own, in turns. Layers this small compute next to
nothing, so that what a system does on the host around each operator and collective is what a step takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.about import about, one_line
from benchmarks.network.place import Loopback, free_port
from benchmarks.network.systems import SYSTEMS, Shape
from benchmarks.network.world import World
from benchmarks.ranks import RankDied

SHAPE = Shape(layers=12, hidden=64, heads=4, vocab=128, seq=16, batch=2)
MEASURED = ("compute", "fxzero", "fxzero_keep", "ddp", "fsdp2", "ds", "ds_tuned", "simple_fsdp")
RESULTS = Path(__file__).parent / "results" / "host_overhead.md"


@dataclass(frozen=True)
class HostWork:
    """Medians over the steps of a system, of rank 0."""

    ms: float
    least_ms: float
    main_cpu_ms: float
    step_calls: float
    """Of forward and backward."""
    update_calls: float
    num_params: int


def measure(systems: list[str], rounds: int, k: int, options: list[str], logs: Path) -> dict[str, HostWork]:
    """A system whose rank dies is left out; why is printed."""
    alive: dict[str, World] = {}
    num_params: dict[str, int] = {}
    samples: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    try:
        for system in systems:
            world = World(system, Loopback(), free_port(), logs, SHAPE, options)
            try:
                num_params[system] = world.wait_until_ready()[0]["num_params"]
                world.ask("steps", count=10)
                alive[system] = world
            except RankDied as error:
                print(error)
                world.close()
        for _ in range(rounds):
            for system, world in alive.items():
                samples[system] += world.ask("steps", count=k)[0][1:]
        return {
            system: _put_together(samples[system], [world.ask("calls")[0] for _ in range(3)], num_params[system])
            for system, world in alive.items()
        }
    finally:
        for world in alive.values():
            world.close()


def _put_together(samples: list[dict[str, Any]], calls: list[list[int]], num_params: int) -> HostWork:
    seconds = [sample["seconds"] for sample in samples]
    main_cpu_s = statistics.median(sample["main_cpu_s"] for sample in samples)
    step_calls, update_calls = map(statistics.median, zip(*calls, strict=True))
    return HostWork(
        statistics.median(seconds) * 1e3, min(seconds) * 1e3, main_cpu_s * 1e3, step_calls, update_calls, num_params
    )


def markdown(results: dict[str, HostWork], described: dict[str, Any]) -> str:
    """The report."""
    rows = [
        [
            SYSTEMS[system].label,
            f"{work.ms:.1f}",
            f"{work.least_ms:.1f}",
            f"{work.main_cpu_ms:.1f}",
            f"{work.step_calls:,.0f}",
            f"{work.update_calls:,.0f}",
        ]
        for system, work in results.items()
    ]
    heads = ["system", "ms", "least ms", "main-thread CPU ms", "calls, forward and backward", "calls, optimizer"]
    table = tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True, colalign=["left", *["right"] * 5])
    num_params = next(iter(results.values())).num_params
    return f"""# Host work of a step

    {described["command"]}

{one_line(described)}
Two ranks over the loopback interface, a core and a thread each.
{SHAPE.layers} layers of {SHAPE.hidden}, {num_params} parameters, batch {SHAPE.batch} x {SHAPE.seq}, fused AdamW.
Forward, backward and optimizer; medians of rank 0; calls as cProfile counts them, builtins included.
"Compute only" exchanges nothing and steps half of every parameter, which it cuts out in Python.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(MEASURED))
    parser.add_argument("--rounds", type=int, default=10, help="turns of each system (%(default)s)")
    parser.add_argument("--k", type=int, default=21, help="steps of a turn; the first is not counted (%(default)s)")
    parser.add_argument("--simple-fsdp", type=Path, help="simple_fsdp.py of torchtitan 0.3.0; or set SIMPLE_FSDP")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    arguments = parser.parse_args()
    options = ["--simple-fsdp", str(arguments.simple_fsdp.resolve())] if arguments.simple_fsdp else []
    with tempfile.TemporaryDirectory() as logs:
        results = measure(arguments.systems, arguments.rounds, arguments.k, options, Path(logs))
    text = markdown(results, about("python -m benchmarks.host_overhead"))
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""Static memory planning: peak over the lower bound, and seconds, on random buffers and on the MiniMalloc instances.

OMP_NUM_THREADS=1 python benchmarks/memory_planner.py
"""

from __future__ import annotations

import csv
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tabulate import tabulate

from fxzero.memory.packing import pack

MINIMALLOC = Path(__file__).parent.parent / "tests" / "data" / "minimalloc"
CAPACITY = 1 << 20
NUM_BUFFERS = 10_000

Lives = tuple[list[int], list[int], list[int]]
"""Sizes, starts, ends (included)."""


def random_instances(num_buffers: int) -> Iterator[tuple[str, Lives]]:
    """Sets of random buffers by name: how sizes are drawn, and how long the buffers live on a line of positions."""
    numbers = random.Random(0)

    def uniform_size() -> int:
        return numbers.randint(1, 4096)

    def log_uniform_size() -> int:
        return int(math.exp(numbers.uniform(0, 12)))

    def power_of_two() -> int:
        return 1 << numbers.randrange(13)

    def log_uniform_life() -> int:
        return int(math.exp(numbers.uniform(0, 8)))

    def draw(size: Callable[[], int], life: Callable[[], int], positions: int) -> Lives:
        starts = [numbers.randrange(positions) for _ in range(num_buffers)]
        return [size() for _ in starts], starts, [start + life() for start in starts]

    yield "uniform sizes, lives 1-20", draw(uniform_size, lambda: numbers.randrange(20), num_buffers)
    yield "uniform sizes, lives 1-300", draw(uniform_size, lambda: numbers.randrange(300), num_buffers)
    yield "uniform sizes, lives 1-5000", draw(uniform_size, lambda: numbers.randrange(5000), num_buffers)
    yield "uniform sizes, lives 1-50, dense", draw(uniform_size, lambda: numbers.randrange(50), num_buffers // 10)
    yield "log-uniform sizes, lives 1-1000", draw(log_uniform_size, lambda: numbers.randrange(1000), num_buffers)
    yield "log-uniform sizes and lives", draw(log_uniform_size, log_uniform_life, num_buffers)
    yield "powers of two, lives 1-100", draw(power_of_two, lambda: numbers.randrange(100), num_buffers)
    yield "powers of two, log-uniform lives", draw(power_of_two, log_uniform_life, num_buffers)


def minimalloc_instances() -> Iterator[tuple[str, Lives]]:
    for path in sorted(MINIMALLOC.glob("*.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        sizes, starts = [int(row["size"]) for row in rows], [int(row["lower"]) for row in rows]
        yield f"MiniMalloc {path.name[0]}", (sizes, starts, [int(row["upper"]) - 1 for row in rows])


def lower_bound(sizes: list[int], starts: list[int], ends: list[int]) -> int:
    """The largest sum of live sizes."""
    events: dict[int, int] = {}
    for size, start, end in zip(sizes, starts, ends, strict=True):
        events[start] = events.get(start, 0) + size
        events[end + 1] = events.get(end + 1, 0) - size
    live, largest = 0, 0
    for position in sorted(events):
        live += events[position]
        largest = max(largest, live)
    return largest


def measure(name: str, buffers: Lives, capacity: int) -> list[object]:
    """A row of the table; `capacity` 0 where the instance has none."""
    began = time.perf_counter()
    offsets = pack(*buffers)
    seconds = time.perf_counter() - began
    peak = max(offset + size for offset, size in zip(offsets, buffers[0], strict=True))
    share = f"{peak / capacity:.4f}" if capacity else ""
    return [name, len(offsets), f"{peak / lower_bound(*buffers):.4f}", share, f"{seconds:.2f}"]


def main() -> None:
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}\n")
    rows = [measure(name, buffers, 0) for name, buffers in random_instances(NUM_BUFFERS)]
    rows += [measure(name, buffers, CAPACITY) for name, buffers in minimalloc_instances()]
    headers = ["instance", "buffers", "peak / bound", "peak / capacity", "seconds"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 4)))


if __name__ == "__main__":
    main()

"""What can be measured. The worker of each is the file of its name in `workers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.host_overhead import SHAPE as TINY_LAYERS
from benchmarks.network.systems import Shape
from benchmarks.network.turns import Turns

WITH_FIRST_STEPS = "compile and what first steps add, processor s"
FIXED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""glibc moves its own by what is freed when: with them peaks of the same code differ by 10 %, with these by 1 %."""


@dataclass(frozen=True)
class Scenario:
    """What is measured of both trees, and how often."""

    question: str
    numbers: Mapping[str, int]
    """Options of the worker, and their defaults."""
    world_size: int = 1
    starts: int = 3
    rounds: int = 4
    systems: Sequence[str] = ()
    """Names of `benchmarks.network`, of which each has workers of its own."""
    rates: Sequence[float] = ()
    """Gbit/s of the link between ranks; none: there is only the machine's own."""
    beside: str = ""
    """With what the names of quantities end that are shown without a verdict."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables of its workers."""
    has_limit: bool = False
    more: str = "slower"
    """The word for a ratio above one."""


def shape_of(options: Mapping[str, Any]) -> Shape:
    """Sizes of the model from the options of a worker."""
    return Shape(**{name: options[name] for name in Shape.__dataclass_fields__})


SCENARIOS: Mapping[str, Scenario] = {
    "single_rank": Scenario(
        "Seconds of a step at world size 1: RoBERTa, fused AdamW, freed memory kept.",
        {"k": 3, "warmup": 2, **asdict(Shape())},
    ),
    "host_overhead": Scenario(
        "Processor seconds of the training thread, and Python calls, of a step of tiny layers on two ranks, clipped.",
        {"k": 21, "warmup": Turns.warmup, **asdict(TINY_LAYERS)},
        world_size=2,
        starts=4,
        rounds=10,
    ),
    "peak_memory": Scenario(
        "Peak resident memory of a rank of two during steps, in new processes each time.",
        {"warmup": 5, "steps": 5, **asdict(Shape())},
        world_size=2,
        starts=6,
        rounds=1,
        environment=FIXED_THRESHOLDS,
        more="larger",
    ),
    "network": Scenario(
        "Seconds of a step over a throttled link. Needs root, Linux, iproute2 and a core for each of two ranks.",
        {"k": 3, "warmup": Turns.warmup, **asdict(Shape())},
        world_size=2,
        starts=2,
        systems=("fxzero", "fxzero_keep"),
        rates=(2.0, 1.0),
    ),
    "planning_time": Scenario(
        "Processor seconds of compile at world size 1, of a plan for 8 ranks, and of first steps.",
        {"layers": 12},
        beside=WITH_FIRST_STEPS,
        has_limit=True,
    ),
}

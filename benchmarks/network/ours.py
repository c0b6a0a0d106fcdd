"""fxzero as a system: as users get it, and with a naive schedule."""

from __future__ import annotations

from typing import Any

from torch import nn

import fxzero
from benchmarks.network.model import make_batch
from benchmarks.network.systems import Job, Training, adamw, mixed_precision, plain

GBIT = 1e9 / 8
"""Bytes a second."""
RATES = (8.0, 4.0, 2.0, 1.0, 0.5)
"""Gbit/s for which steps are predicted."""
PAYLOAD = 0.94
"""Of a link's rate, what TCP leaves to gloo's messages: 0.93 to 0.95 of the bare loop at 2 and 1 Gbit/s."""


def train(model: nn.Module, job: Job, *, mixed: bool = False, **options: Any) -> Training:
    """`fxzero.compile` with the options given."""
    optimizer = adamw(model.parameters())
    if mixed:
        options["mp_policy"] = mixed_precision(mixed=True)
    zero = fxzero.compile(model, optimizer=optimizer, example=make_batch(job.shape, 0, job.rank), **options)
    return plain(zero, optimizer, facts=lambda: facts(zero))


def naive(model: nn.Module, job: Job) -> Training:
    """Everything turned off that fxzero does against the network."""
    return train(model, job, without="all")


def facts(zero: Any) -> dict[str, Any]:
    """What the plan says of a step: its bytes, and how long it would take at each rate of the link, all else equal."""
    totals = zero.schedule.totals
    try:
        timing = zero.schedule.timing
    except fxzero.FxzeroError:  # no costs are known
        timing = None
    return {
        "predicted": {
            f"{rate:g}": timing.at_rate(PAYLOAD * rate * GBIT).predicted_step_s for rate in RATES if timing is not None
        },
        "link": None if timing is None else str(timing.costs.link),
        "planned_bytes": totals.gathered_bytes + totals.reduced_bytes,
        "collectives": totals.num_all_gathers + totals.num_reduce_scatters,
    }

"""What schedules are made for where it is not measured.

What ranks measure differs between starts, and with it the schedule, its memory and its calls.
"""

from __future__ import annotations

import fxzero

CLUSTER = fxzero.Cluster(
    fxzero.Device(flops_per_s=9e10, bytes_per_s=1e10, op_s=5e-6),
    fxzero.Link(bytes_per_s=2.5e8, latency_s=2e-4, cpu_s_per_byte=1e-9),
)

"""Training steps of fxzero and its peers on a slow network, all on one machine.

    python -m benchmarks.network run                                  # measure (root, Linux, iproute2)
    python -m benchmarks.network report benchmarks/raw/network.jsonl  # tables and plot to benchmarks/results/

A rank is a process in a network namespace, pinned to a core; the namespaces are joined by links of a set rate. All
systems of a group stay alive and take a few consecutive steps in turn, so that noise of the machine hits all alike.
"""

from __future__ import annotations

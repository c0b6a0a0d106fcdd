"""What a worker can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Numbers = dict[str, float]
"""By quantity, the unit in its name."""


@dataclass(frozen=True)
class Work:
    """A scenario made ready and warm."""

    turn: Callable[[], Numbers]
    """Works for a while; what it measured."""
    exact: Callable[[], Numbers] = dict
    """What is the same whenever it is counted."""

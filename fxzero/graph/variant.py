"""The ways in which one backward can end: where its gradients go, and whether they add to what is there."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Stash(enum.Enum):
    """Where a backward writes gradients, with regard to those that no_sync() keeps unsharded."""

    NONE = "none"
    """Into the arena: nothing is kept unsharded."""
    FIRST = "first"
    """Under no_sync(): overwrite the unsharded gradients."""
    MORE = "more"
    """Under no_sync(): add to the unsharded gradients."""
    FLUSH = "flush"
    """Add to the unsharded gradients, then reduce them."""


class Variant(NamedTuple):
    """The ways in which one backward can be bound; the code is the same, its globals differ."""

    accumulate: bool
    """Add the reduced gradients to the shards' `.grad` instead of overwriting it."""
    stash: Stash

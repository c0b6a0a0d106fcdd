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
    """One way in which a step of a plan runs. Forward is the same in all variants of one graph."""

    accumulate: bool
    """Add the reduced gradients to the shards' `.grad` instead of overwriting it."""
    stash: Stash

    @property
    def synchronizes(self) -> bool:
        """False under no_sync(), whose graph reduces nothing."""
        return self.stash in (Stash.NONE, Stash.FLUSH)

    @property
    def label(self) -> str:
        """What it does with gradients, for people."""
        if not self.synchronizes:
            return "under no_sync()"
        return "adding to gradients" if self.accumulate else "overwriting gradients"


ONLY_FORWARD = Variant(False, Stash.NONE)
"""The one variant of a step without a backward."""
SYNCHRONIZING = tuple(Variant(accumulate, stash) for accumulate in (False, True) for stash in (Stash.NONE, Stash.FLUSH))
HOLDING = (Variant(False, Stash.FIRST), Variant(False, Stash.MORE))
"""Those under no_sync()."""

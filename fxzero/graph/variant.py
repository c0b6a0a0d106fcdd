"""The ways in which a backward can end: where its gradients go, and whether they are added or overwrite."""

import enum
from typing import NamedTuple


class Stash(enum.Enum):
    """What a backward does with the unsharded gradients that no_sync() keeps."""

    NONE = "none"
    """There are none; gradients are written to the arena."""
    FIRST = "first"
    """Under no_sync(): overwrite the unsharded gradients."""
    MORE = "more"
    """Under no_sync(): add to the unsharded gradients."""
    FLUSH = "flush"
    """After no_sync(): add to the unsharded gradients, then reduce them."""


class Variant(NamedTuple):
    """One way in which a step of a plan runs. All variants of one graph have one forward."""

    accumulate: bool
    """True to add the reduced gradients to the shards' `.grad`, False to overwrite it."""
    stash: Stash

    @property
    def synchronizes(self) -> bool:
        """False under no_sync(), whose graph reduces nothing."""
        return self.stash in (Stash.NONE, Stash.FLUSH)

    @property
    def label(self) -> str:
        """The effect on gradients, in words."""
        if not self.synchronizes:
            return "under no_sync()"
        return "adding to gradients" if self.accumulate else "overwriting gradients"


ONLY_FORWARD = Variant(False, Stash.NONE)
"""Variant of a step without a backward."""
SYNCHRONIZING = tuple(Variant(accumulate, stash) for accumulate in (False, True) for stash in (Stash.NONE, Stash.FLUSH))
HOLDING = (Variant(False, Stash.FIRST), Variant(False, Stash.MORE))
"""Variants under no_sync()."""

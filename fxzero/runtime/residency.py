"""Which buckets are still gathered from an earlier step: under gradient accumulation, until the shards change.

So are secondary shards, where nodes share the primary ones. A bucket counts as there only while an accumulation is
under way and nobody touched a parameter or a gradient since it was gathered: no optimizer stepped, no version of a
parameter or of a `.grad` changed. Whatever else is the case, it is gathered again. Only a write through `param.data`
between two micro-steps goes unnoticed, as it does by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Stamp = tuple[int, ...]


class Residency:
    """The buckets that are there, by their members.

    Args:
        is_accumulating: true while there are gradients that the next backward adds to.
        stamp: changes whenever shards or gradients are changed by anything but a backward.
    """

    def __init__(self, is_accumulating: Callable[[], bool], stamp: Callable[[], Stamp]) -> None:
        self._is_accumulating, self._stamp = is_accumulating, stamp
        self._there: set[tuple[str, ...]] = set()
        self._at: Stamp | None = None
        """The stamp when they were gathered."""

    def has(self, buckets: Iterable[tuple[str, ...]]) -> bool:
        """True if all these are there, with the values that the shards have now."""
        if not self._is_accumulating():
            self.expire()
        self.look()
        return self._there.issuperset(buckets)

    def look(self) -> None:
        """Forget all if something changed: before a forward, and before a backward makes changes of its own."""
        now = self._stamp()
        if now != self._at:
            self.expire()
            self._at = now

    def end_backward(self) -> None:
        """The changes since the last look are those of a backward."""
        self._at = self._stamp()

    def add(self, buckets: Iterable[tuple[str, ...]]) -> None:
        """Note that these were gathered."""
        self._there.update(buckets)

    def expire(self) -> None:
        """Forget all: they are to be gathered again."""
        self._there.clear()

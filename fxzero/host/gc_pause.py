"""Python's garbage collector, paused while tracing and planning.

A plan of many layers is millions of small objects that all stay. The collector walks them again and again as more are
made, and finds nothing: half of the time of choosing sizes.
"""

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def gc_paused(*, leaves_old: bool = False) -> Generator[None]:
    """No collections inside; may be nested, and leaves the collector as it was.

    Args:
        leaves_old: count all that was made inside as old at the end, without a look at it, so that no collection of
            young objects walks it. A full one does.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if leaves_old and not gc.get_freeze_count():  # else what the user has frozen would thaw
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def collect_young() -> None:
    """Free what is garbage among objects that no full collection has seen; the others are old from now on."""
    gc.collect(1)

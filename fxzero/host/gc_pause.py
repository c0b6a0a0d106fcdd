"""Python's garbage collector, paused while tracing and planning.

A plan of many layers is millions of small objects that all stay. The collector walks them again and again as more are
made, and finds nothing: half of the time of choosing sizes.
"""

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def gc_paused() -> Generator[None]:
    """No collections inside; may be nested, and leaves the collector as it was."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

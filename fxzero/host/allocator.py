"""Keep freed memory in the process, so that a step's fresh activations cost no page faults.

By default glibc gives a large block back to the kernel when it is freed, or trims the heap behind it, and the next
step's block of that size comes as pages that have to be zeroed and mapped again, one fault each.
"""

import ctypes
import logging

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_INT_MAX = 2**31 - 1
_SETTINGS = (
    (_M_MMAP_THRESHOLD, 2**30),  # blocks of up to 1 GiB come from the heap, where they can be used again
    (_M_TRIM_THRESHOLD, _INT_MAX),  # the heap's free end is given back only where it is longer than 2 GiB
)


def keep_freed_memory() -> bool:
    """Let this process keep the host memory that it frees, for its next allocations. Call it once, before training.

    With eager PyTorch too, it spares a step on the CPU its page faults. It holds for the whole process, so that no
    library should call it unasked: what is freed stays resident, and the process holds on to its peak. Calling it
    again changes nothing.

    Returns:
        True where it applied. False where the C library is not glibc (musl, macOS, Windows), or refused: nothing has
        changed then. An allocator that is preloaded in front of glibc's (jemalloc, tcmalloc) is not affected.
    """
    return _apply(_libc())


def give_back_freed_memory() -> None:
    """Give pages that were freed back to the system, where glibc holds on to them.

    Tracing and planning leave such pages, and the first step of an optimizer, whose state is moved into one buffer.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> object:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no handle of the process itself
        return None


def _apply(libc: object) -> bool:
    """Set what `_SETTINGS` says through a C library's mallopt."""
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None or not hasattr(libc, "gnu_get_libc_version"):
        logger.info("freed memory is not kept: the C library is not glibc")
        return False
    refused = [parameter for parameter, value in _SETTINGS if not mallopt(parameter, value)]
    if refused:
        logger.warning("freed memory is not kept: glibc refused %d of %d settings", len(refused), len(_SETTINGS))
    return not refused


__all__ = ["keep_freed_memory"]

"""Let the thread that carries gloo's messages run as soon as a message is there.

On a core that also computes, it waits for its turn: the kernel lets the training thread run to the end of its slice, a
millisecond or more, in which the link may run dry. A thread that asks for shorter slices comes first when it wakes; its
share of the core stays the same. It needs no privilege, and changes nothing where the kernel does not know it.

Source: Linux's EEVDF scheduler; sched_setattr(2), whose `sched_runtime` is the slice of an ordinary thread since 6.12.
"""

import ctypes
import functools
import logging
import os
import platform
import struct
from pathlib import Path

logger = logging.getLogger(__name__)

SLICE_NS = 100_000
"""The shortest that the kernel takes."""
LOOP = "gloo_tcp_loop"
"""The name of the threads that move bytes; seen in torch 2.13."""
_SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""sched_setattr and sched_getattr, by machine."""
_ATTR = struct.Struct("IIQiIQQQ")
"""struct sched_attr: its size, policy, flags, nice, priority, runtime, deadline, period."""
_is_logged = False
"""True once this process has logged how many threads were changed."""


def hurry_message_threads() -> int:
    """Give the threads of gloo that move bytes the shortest slices.

    The first call of a process logs how many threads it changed.

    Returns:
        How many threads this call changed: 0 also where the system cannot do it.
    """
    num_changed = sum(_shorten(thread) for thread in message_threads()) if _is_known() else 0
    _log_once(num_changed)
    return num_changed


def message_threads() -> list[int]:
    """The ids of the threads of this process that move gloo's bytes."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except OSError:  # it has ended
            continue
        if name == LOOP:
            found.append(int(task.name))
    return sorted(found)


def slice_ns(thread: int) -> int:
    """The slice that a thread asks for; 0 where the kernel does not say."""
    if not _is_known():
        return 0
    attributes = ctypes.create_string_buffer(_ATTR.size)
    read = _SYSCALLS[platform.machine()][1]
    if _libc().syscall(read, thread, attributes, _ATTR.size, 0):
        return 0
    return int(_ATTR.unpack(attributes.raw)[5])


def _is_known() -> bool:
    return platform.system() == "Linux" and platform.machine() in _SYSCALLS


def _log_once(num_changed: int) -> None:
    global _is_logged
    if not _is_logged:
        _is_logged = True
        logger.info(
            "%d threads of gloo have shorter scheduler slices now, of %d us; short_gloo_slices=False leaves them alone",
            num_changed,
            SLICE_NS // 1000,
        )


def _shorten(thread: int) -> bool:
    """Shorten the slices of one thread, if it is an ordinary one, has longer ones, and the kernel knows slices."""
    if slice_ns(thread) in (0, SLICE_NS):
        return False
    try:
        if os.sched_getscheduler(thread) != os.SCHED_OTHER:
            return False
        nice = os.getpriority(os.PRIO_PROCESS, thread)
    except OSError:
        return False
    attributes = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
    refused = _libc().syscall(_SYSCALLS[platform.machine()][0], thread, attributes, 0)
    if refused:
        logger.info("a thread of gloo keeps its slice: %s", os.strerror(ctypes.get_errno()))
    return not refused


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

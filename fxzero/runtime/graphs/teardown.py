"""Graphs go before the process groups whose communicators they hold: else the end of a group waits for ever."""

import atexit
import functools
import weakref
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import distributed_c10d


class Droppable(Protocol):
    """Holds graphs."""

    def drop(self) -> None:
        """Free the graphs, once all that was launched is done."""
        ...


_live: weakref.WeakSet[Droppable] = weakref.WeakSet()


def drop_before_groups(graphs: Droppable) -> None:
    """Let graphs be dropped before a process group is destroyed, and before the process ends."""
    _live.add(graphs)
    _install()


def drop_all() -> None:
    """Drop all graphs of this process."""
    for graphs in list(_live):
        graphs.drop()


@functools.cache
def _install() -> None:
    """One function serves all models, and is never removed."""
    atexit.register(drop_all)
    destroy = dist.destroy_process_group

    @functools.wraps(destroy)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        drop_all()
        destroy(*args, **kwargs)

    dist.destroy_process_group = destroy_process_group
    distributed_c10d.destroy_process_group = destroy_process_group

"""A thread of each rank that says in the store, every second, where the rank stands, and looks after waits that last.

    main thread      waits for messages, for over a second
    this thread      reads the entries of the other ranks; if one of them shows that they will not come, says so itself
                     and closes the connections: the waits of the main thread and of the other ranks end in an error
    main thread      raises that reason

Where the main thread waits in an agreement (`agree.py`), it reads the entries itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from fxzero import torch_internals
from fxzero.comm.peers import Peers, describe_error, entry_of, is_gone, name_of_group
from fxzero.comm.phases import PhaseLog, Stop
from fxzero.errors import CommunicationError

TICK_S = 0.5
"""Seconds between two looks at this rank's own wait."""
_CONNECT_S = 5
"""For how long a rank tries to connect to the store, before it sees whether the store is there at all."""
_LOOK_AGAIN_S = 4.0
"""Seconds between two looks at the connection to a rank that has no entry: each leaves a few bytes in gloo."""
_NOBODYS_TAG = 0x7FFFFFFF
"""The tag of messages that nobody sends, above those that users choose by hand."""
LINGER_S = 2.0
"""For how long a rank that fails or stops waits until the others have noticed."""


class Heartbeat:
    """The entry of this rank in the store of the job, and those of others."""

    def __init__(self, store: Store, rank: int) -> None:
        self._origin = weakref.ref(store)
        self._store = _clone(store)  # a thread that waits in the user's store would hold it
        self.rank = rank
        self.logs: dict[tuple[int, ...], PhaseLog] = {}
        self._beat = 0
        self._ended: str | None = None
        self._is_over = threading.Event()
        self._lock = threading.RLock()
        self._known: set[int] = set()
        """Ranks that have an entry."""
        self._looked_s: dict[int, float] = {}
        """When the connection to a rank that has no entry was last looked at."""
        self._thread = threading.Thread(target=self._run, name="fxzero heartbeat", daemon=True)
        self.publish()
        self._thread.start()
        atexit.register(self.end)

    # -- this rank -----------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Renew the entry of this rank."""
        with self._lock:
            self._beat += 1
            entry = entry_of(list(self.logs.values()), self._beat, self._ended)
            self._store.set(_key(self.rank), json.dumps(entry))

    def end(self, how: str | None = None) -> None:
        """Say that this rank leaves the job, and end the thread."""
        atexit.unregister(self.end)
        if self._is_over.is_set():
            return
        error = getattr(sys, "last_value", None)
        self._ended = how or ("has ended" if error is None else f"has ended ({describe_error(error)})")
        self._is_over.set()
        with contextlib.suppress(RuntimeError):
            self.publish()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * TICK_S)

    def is_of(self, store: Store) -> bool:
        """True if this is the heartbeat of the job that a store belongs to."""
        return self._origin() is store and not self._is_over.is_set()

    # -- other ranks ---------------------------------------------------------------------------------------------

    def entries(self, ranks: Iterable[int]) -> dict[int, dict[str, Any] | None]:
        """The entries of ranks; None for a rank that has not written one yet."""
        with self._lock:
            return {rank: self._read(rank) for rank in ranks}

    def _read(self, rank: int) -> dict[str, Any] | None:
        if rank not in self._known:
            if not self._store.check([_key(rank)]):
                return None
            self._known.add(rank)
        return json.loads(self._store.get(_key(rank)))

    def look(self, peers: Peers, ranks: Iterable[int] | None = None) -> Stop | None:
        """The reason why waiting for ranks is in vain, if there is one.

        Args:
            ranks: default: all others of the group.
        """
        others = peers.log.members if ranks is None else ranks
        entries = self.entries(rank for rank in others if rank != self.rank)
        lost = next((rank for rank, entry in entries.items() if entry is None and self._has_lost(rank)), None)
        return peers.reason_to_stop(entries) if lost is None else peers.never_came(lost)

    def _has_lost(self, rank: int) -> bool:
        """True if a rank that has not compiled anything is gone, as the connection of the default group to it shows."""
        now_s = time.monotonic()
        if now_s - self._looked_s.get(rank, -_LOOK_AGAIN_S) < _LOOK_AGAIN_S:
            return False
        self._looked_s[rank] = now_s
        group = dist.group.WORLD
        if group is None or torch_internals.backend_name(group, torch.device("cpu")) != "gloo":
            return False
        return not torch_internals.is_connected(group, rank, _NOBODYS_TAG)

    def explain(self, log: PhaseLog, within_s: float = LINGER_S) -> Stop | None:
        """The reason why connections were closed: a rank says it before it closes them, or has died."""
        peers, deadline = Peers(log), time.monotonic() + within_s
        try:
            while log.stop is None and time.monotonic() < deadline:
                if (stop := self.look(peers)) is not None:
                    return stop
                time.sleep(0.05)
        except RuntimeError as error:
            return log.stop or Stop("end", f"rank {self.rank} waits in {log.what}, and {_lost_store(error)}.")
        return log.stop

    def stop(self, log: PhaseLog, stop: Stop) -> None:
        """Say that this rank cannot go on, and close its connections, so that all who wait for it are told."""
        if log.stop is None:
            log.stop = stop
            with contextlib.suppress(RuntimeError):
                self.publish()
            for channel in log.channels:
                channel.close()

    def linger(self, log: PhaseLog) -> None:
        """Wait until the other ranks of a group have noticed that this one failed or stopped, for a moment."""
        deadline = time.monotonic() + LINGER_S
        others = [rank for rank in log.members if rank != self.rank]
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not all(
                _has_noticed(log, entry) for entry in self.entries(others).values()
            ):
                time.sleep(0.02)

    def _run(self) -> None:
        published_s = time.monotonic()
        judges: dict[tuple[int, ...], tuple[tuple[int, int], Peers]] = {}
        while not self._is_over.wait(TICK_S):
            if not _is_job(self._origin()):
                self.end("has left its process group")
                return
            now_s = time.monotonic()
            try:
                if now_s - published_s >= 1.0:
                    published_s = now_s
                    self.publish()
                for members, log in list(self.logs.items()):
                    before, peers = judges.setdefault(members, ((0, 0), Peers(log)))
                    if before != log.progress:
                        judges[members] = log.progress, Peers(log)
                    elif log.may_wait and (stop := self.look(peers)) is not None:
                        self.stop(log, stop)
            except RuntimeError:  # the store is gone, and with it the job
                return


def _clone(store: Store) -> Store:
    """Another connection to a store.

    Raises:
        RuntimeError: the store is lost.
    """
    timeout = cast(Any, store).timeout
    store.set_timeout(timedelta(seconds=_CONNECT_S))
    try:
        while True:
            store.check([_key(0)])
            with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError):  # a store that is lost, or busy
                return cast(Any, store).clone()
    finally:
        store.set_timeout(timeout)


def _has_noticed(log: PhaseLog, entry: dict[str, Any] | None) -> bool:
    """True if the rank of an entry knows that this one failed or stopped, has stopped itself, or is not there."""
    if entry is None or entry["ended"] or is_gone(entry, 0.0):
        return True
    theirs = entry["groups"].get(name_of_group(log.members))
    if theirs is None or theirs["stop"] is not None:
        return True
    return theirs["failed"] is not None and log.failed is not None and theirs["failed"][0] >= log.failed[0]


def _is_job(store: Store | None) -> bool:
    """True while a store is that of the process group of this process."""
    return store is not None and dist.is_initialized() and torch_internals.default_store() is store


def _key(rank: int) -> str:
    return f"fxzero/alive/{rank}"


_current: Heartbeat | None = None


def heartbeat() -> Heartbeat:
    """The heartbeat of this rank in the job at hand; it starts with the first call."""
    global _current
    store = torch_internals.default_store()
    if _current is None or not _current.is_of(store):
        try:
            _current = Heartbeat(store, dist.get_rank())
        except RuntimeError as error:
            raise CommunicationError(f"Rank {dist.get_rank()} cannot begin: {_lost_store(error)}.") from error
    return _current


def _lost_store(error: RuntimeError) -> str:
    return (
        f"it has lost the store of the process group ({str(error).strip().splitlines()[0]}), so the process that hosts "
        "it (rank 0, where torchrun does not) has died or ended: its own error says why"
    )


def log_of(members: tuple[int, ...]) -> PhaseLog:
    """The phases of the ranks of a group, as this rank counts them."""
    beats = heartbeat()
    if members not in beats.logs:
        beats.logs[members] = PhaseLog(members, beats.rank)
        beats.publish()
    return beats.logs[members]


def report(log: PhaseLog, error: BaseException) -> None:
    """Say that the phase which this rank is in has failed here."""
    if not log.members or log.stop is not None or (log.failed is not None and log.failed[0] == log.number):
        return
    log.failed = log.number, describe_error(error)
    if log.is_together:
        when = "in" if log.is_inside else "after"
        heartbeat().stop(log, Stop("failure", f"rank {log.rank} failed {when} {log.what}: {log.failed[1]}"))
    else:
        with contextlib.suppress(RuntimeError, CommunicationError):
            heartbeat().publish()

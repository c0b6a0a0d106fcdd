"""Ranks compare what they compiled before any parameter is exchanged; the first difference is named on every rank.

    with reporting_failure(group, "layout"):             # a rank that fails on its way stops the others
        lines = compile_something()
        agree(group, "layout", lines, timeout=...)

Everything goes through the store of the default process group, never through a group that carries parameters: there a
disagreement would exchange wrong bytes or abort the process.

Keys of one agreement, all under topic, members of the group and the number of the call; removed when all have agreed:
    <rank>    what that rank has: its lines, or how it failed          first    the digest of whoever came first
    arrived   how many have posted      left   how many have read      alarm    exists once something is wrong
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NoReturn, TypeAlias, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from fxzero import torch_internals
from fxzero.comm.groups import Group, Hierarchy, resolve_group
from fxzero.comm.heartbeat import heartbeat, log_of
from fxzero.comm.peers import Peers
from fxzero.comm.phases import Stop
from fxzero.errors import CommunicationError, FxzeroError, PlanError, RankMismatchError

Posted: TypeAlias = "list[str] | str"
"""What a rank posts: its lines, or the text of the error that stopped it."""
Look: TypeAlias = "Callable[[Sequence[int]], Stop | None]"
"""Returns the reason why ranks will not come, if there is one."""

_LINGER_S = 1.0
"""For how long a rank that knows of a difference waits for others, to name all that differ and to let all read it."""
ALONE_S = 6.0
"""For how long a rank waits for others that may not be on their way."""
_MAX_CHECKED_FOR_OTHER_GROUPS = 64
_ERRORS: dict[str, type[FxzeroError]] = {"end": CommunicationError, "alone": PlanError}
"""What an agreement raises for a reason to stop; RankMismatchError for all others."""


def agree(group: Group | None, topic: str, lines: Sequence[str], *, timeout: timedelta) -> None:
    """Return once all ranks of the group (None: the default group) have called this with the same lines.

    Raises:
        RankMismatchError: ranks differ (the first line that does, and who has what), a rank reported a failure, is in
            a group with other members, or did not come in time. Raised on every rank of the group.
        CommunicationError: the store is gone.
    """
    _compare(group, topic, lines, timeout, may_differ=False)


def exchange(
    group: Group | None,
    topic: str,
    lines: Sequence[str],
    *,
    timeout: timedelta,
    alone: str | None = None,
    is_anew: bool = False,
) -> list[list[str]]:
    """The lines of all ranks of the group, in its order, once all have called this; they may differ.

    Args:
        alone: the text of an error to raise soon if a rank does not come and is not `busy`: it may never come.
        is_anew: ranks come here after one has failed, to begin anew.

    Raises: as `agree`, but for a difference.
        PlanError: with the text `alone`.
    """
    posts = _compare(group, topic, lines, timeout, may_differ=True, alone=alone, is_anew=is_anew)
    return posts or [list(lines)]


def exchange_made(
    group: Group | None, topic: str, make: Callable[[], list[str]], *, timeout: timedelta
) -> list[list[str]]:
    """The lines that each rank of the group makes, in its order; all raise where making them fails on one."""
    with reporting_failure(group, topic):
        lines = make()
    return exchange(group, topic, lines, timeout=timeout) or [lines]


@contextlib.contextmanager
def busy(group: Group | None) -> Generator[None]:
    """Let ranks that wait in an agreement know that this rank may be on its way to it for a long time."""
    if not _members(group):
        yield
        return
    store, key = torch_internals.default_store(), _busy_key(dist.get_rank())
    with contextlib.suppress(RuntimeError):
        store.set(key, "1")
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            store.set(key, "")


def _busy_key(rank: int) -> str:
    return f"fxzero/busy/{rank}"


def _compare(
    group: Group | None,
    topic: str,
    lines: Sequence[str],
    timeout: timedelta,
    *,
    may_differ: bool,
    alone: str | None = None,
    is_anew: bool = False,
) -> list[list[str]]:
    """See `Agreement.run`; empty where there is nobody to agree with."""
    try:
        agreement = _enter(group, topic)
        if agreement is None:
            return []
        peers = Peers(log_of(agreement.members), compares=not is_anew, alone=alone)
        look = partial(heartbeat().look, peers)
        return agreement.run(list(lines), timeout.total_seconds(), may_differ=may_differ, alone=alone, look=look)
    except RuntimeError as error:
        raise CommunicationError(
            f"Rank {dist.get_rank()} lost the store of the process group while ranks compared their {topic}: {error}\n"
            "The process that hosts it (rank 0, where torchrun does not) has ended: its own error says why."
        ) from error


def remember(group: Group | None, name: str, line: str) -> None:
    """Keep a line for the ranks of the group as long as the job lives; all of them call this with the same line."""
    if members := _members(group):
        torch_internals.default_store().set(f"{_prefix('memory', members)}/{name}", line)


def recall(group: Group | None, name: str) -> str | None:
    """The line that the ranks of the group remember by this name; None if there is none.

    Call it behind an agreement: then the ranks that could have remembered something have done so.
    """
    members = _members(group)
    key = f"{_prefix('memory', members)}/{name}"
    if not members or not torch_internals.default_store().check([key]):
        return None
    return torch_internals.default_store().get(key).decode()


def report_failure(group: Group | None, topic: str, error: BaseException) -> None:
    """Tell the ranks that wait, or will wait, in the next agreement on this topic that this rank does not come."""
    with contextlib.suppress(RuntimeError):  # what matters is the error that is being reported
        if agreement := _enter(group, topic):
            agreement.post(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def reporting_failure(group: Group | None, topic: str) -> Generator[None]:
    """Report an error that leaves the block before the block has entered its agreement on the topic."""
    members = _members(group)
    before = _num_calls(topic, members)
    try:
        yield
    except BaseException as error:
        if _num_calls(topic, members) == before:
            report_failure(group, topic, error)
        raise


def _members(group: Group | None) -> tuple[int, ...]:
    """The global ranks of the group, in its order; empty where there is nobody to agree with."""
    if isinstance(group, Hierarchy):
        return () if dist.get_backend(group.across) == "fake" else group.ranks
    group = resolve_group(group)
    if group is None or group.size() == 1 or dist.get_backend(group) == "fake":
        return ()
    return tuple(dist.get_process_group_ranks(group))


def _num_calls(topic: str, members: tuple[int, ...]) -> int:
    if not members:
        return 0
    with contextlib.suppress(RuntimeError):
        return torch_internals.default_store().add(_calls_key(topic, members, dist.get_rank()), 0)
    return -1


def _enter(group: Group | None, topic: str) -> Agreement | None:
    members = _members(group)
    return Agreement.enter(torch_internals.default_store(), topic, members, dist.get_rank()) if members else None


def _prefix(topic: str, members: tuple[int, ...]) -> str:
    return f"fxzero/{topic}/{hashlib.sha256(repr(members).encode()).hexdigest()[:16]}"


def _calls_key(topic: str, members: tuple[int, ...], rank: int) -> str:
    """Each rank counts its own calls, in the store, so that the count lives exactly as long as the job."""
    return f"{_prefix(topic, members)}/calls/{rank}"


@dataclass(frozen=True)
class Agreement:
    """One call of `agree` as one rank sees it."""

    job: Store
    """The store of the whole job."""
    store: Store
    """The keys of this agreement."""
    topic: str
    members: tuple[int, ...]
    rank: int
    number: int

    @classmethod
    def enter(cls, job: Store, topic: str, members: tuple[int, ...], rank: int) -> Agreement:
        number = job.add(_calls_key(topic, members, rank), 1)
        store = PrefixStore(f"{_prefix(topic, members)}/{number}", job)
        return cls(job, store, topic, members, rank, number)

    def run(
        self,
        lines: list[str],
        timeout_s: float,
        *,
        may_differ: bool = False,
        alone: str | None = None,
        look: Look = lambda ranks: None,
    ) -> list[list[str]]:
        """Post the lines and wait for the others; raises what `exchange` raises.

        Args:
            look: returns the reason why some ranks will not come, if there is one.

        Returns:
            The lines of all members if they may differ, else nothing.
        """
        waiting_key = f"fxzero/{self.topic}/waiting/{self.rank}"
        self.job.set(waiting_key, json.dumps([self.members, self.number]))
        self.post(lines, may_differ=may_differ)
        self._wait_for_all(timeout_s, alone, look)
        self.job.set(waiting_key, "")
        posts = [self._read(rank) for rank in self.members] if may_differ else []
        if self.store.add("left", 1) == len(self.members):  # the last one to read removes all keys
            for key in (*map(str, self.members), "first", "arrived", "left"):
                self.store.delete_key(key)
        return [post for post in posts if isinstance(post, list)]

    def post(self, posted: Posted, *, may_differ: bool = False) -> None:
        """Say what this rank has, and raise the alarm if that is an error, or not what the first one had."""
        self._write(posted)
        digest = hashlib.sha256(json.dumps(posted).encode()).hexdigest()
        first: bytes = self.store.compare_set("first", "", digest)
        if isinstance(posted, str) or not (may_differ or first.decode() == digest):
            self.store.set("alarm", "1")
        self.store.add("arrived", 1)

    def _wait_for_all(self, timeout_s: float, alone: str | None, look: Look) -> None:
        started = time.monotonic()
        next_look = next_look_at_peers = started + 1.0
        for pause_s in itertools.chain((0.001 * 1.5**n for n in range(13)), itertools.repeat(0.2)):
            arrived = self.store.add("arrived", 0)
            if self.store.check(["alarm"]):
                self._report_difference()
            if arrived == len(self.members):
                return
            now = time.monotonic()
            if now >= next_look:
                self._look_for_other_groups()
                next_look = now + (now - started)
            if alone is not None and now - started >= ALONE_S and (idle := self._absent_and_idle()):
                self._fail(f"{alone} ({_ranks(idle)} did not come.)", PlanError)
            absent = self._absent() if now >= min(next_look_at_peers, started + timeout_s) else []
            if now >= next_look_at_peers:
                next_look_at_peers = now + 0.5
                awaited = absent or [rank for rank in self.members if rank != self.rank]  # one died as it posted
                stop = look(awaited)
                if stop is not None and self.store.add("arrived", 0) < len(self.members):
                    self._fail(stop.text, _ERRORS.get(stop.kind, RankMismatchError))
            if now - started >= timeout_s:
                self._fail(
                    f"{_ranks(absent).capitalize()} did not come to compare the {self.topic} within {timeout_s:g} s. "
                    "Every rank must compile the same models in the same order; look for an error on those ranks."
                )
            time.sleep(min(pause_s, max(0.0, started + timeout_s - now)))

    def _absent(self) -> list[int]:
        """The ranks that have not posted yet."""
        return [rank for rank in self.members if not self.store.check([str(rank)])]

    def _report_difference(self) -> NoReturn:
        """Raise what the posts of the ranks say, after a moment in which others may come and read."""
        _poll(lambda: self.store.add("arrived", 0) >= len(self.members))
        posts = {rank: self._read(rank) for rank in self.members if self.store.check([str(rank)])}
        self.store.add("left", 1)
        _poll(lambda: self.store.add("left", 0) >= len(posts))
        raise RankMismatchError(describe(self.topic, self.members, posts))

    def _write(self, posted: Posted) -> None:
        self.store.set(str(self.rank), base64.b64encode(zlib.compress(json.dumps(posted).encode())).decode())

    def _read(self, rank: int) -> Posted:
        data: bytes = self.store.get(str(rank))
        return json.loads(zlib.decompress(base64.b64decode(data)))

    def _look_for_other_groups(self) -> None:
        """Fail if a rank that is waited for waits itself, for this rank, but in a group with other members."""
        for rank in itertools.islice(self._absent(), _MAX_CHECKED_FOR_OTHER_GROUPS):
            key = f"fxzero/{self.topic}/waiting/{rank}"
            waits_in = self.job.get(key) if self.job.check([key]) else b""
            if not waits_in:
                continue
            theirs, number = cast("tuple[list[int], int]", json.loads(waits_in))
            members = tuple(theirs)
            if members == self.members or self.rank not in members:
                continue
            if self.job.add(_calls_key(self.topic, members, self.rank), 0) < number:
                self._fail(
                    f"Ranks compile for different process groups ({self.topic}): rank {self.rank} for a group of "
                    f"{len(self.members)} ({_ranks(self.members)}), rank {rank} for a group of {len(members)} "
                    f"({_ranks(members)}). Pass the same process group on every rank."
                )

    def _absent_and_idle(self) -> list[int]:
        """The ranks that have not come and are not busy."""
        keys = {rank: _busy_key(rank) for rank in self._absent()}
        return [rank for rank, key in keys.items() if not (self.job.check([key]) and self.job.get(key))]

    def _fail(self, text: str, kind: type[FxzeroError] = RankMismatchError) -> NoReturn:
        """Raise, and let the others of the group know why."""
        self._write(text)
        self.store.set("alarm", "1")
        raise kind(text)


def describe(topic: str, members: Sequence[int], posts: dict[int, Posted]) -> str:
    """What differs between the posts of ranks, as the text of an error."""
    failed = {rank: post for rank, post in posts.items() if isinstance(post, str)}
    if failed:
        each = "\n".join(f"{_ranks(ranks)} failed: {text}" for text, ranks in _by_value(failed))
        return f"{each}\nThe other ranks stop here, before they exchange anything ({topic})."
    lines = {rank: post for rank, post in posts.items() if not isinstance(post, str)}
    rows = itertools.zip_longest(*lines.values(), fillvalue="(nothing: the end)")
    number, row = next((n, row) for n, row in enumerate(rows, 1) if len(set(row)) > 1)
    text = f"Ranks compiled different things: line {number} of the {topic} differs."
    for value, ranks in _by_value(dict(zip(lines, row, strict=True))):
        text += f"\n  {_ranks(ranks)}: {value}"
    if absent := [rank for rank in members if rank not in posts]:
        text += f"\n  {_ranks(absent)}: not there yet"
    return f"{text}\nRun the same script with the same settings on every rank."


def _by_value(values: dict[int, str]) -> list[tuple[str, list[int]]]:
    """Ranks grouped by what they have, in the order of each group's first rank."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        ranks_of.setdefault(value, []).append(rank)
    return list(ranks_of.items())


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 1` or `ranks 0, 2-3`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' * (len(ranks) != 1)} {text}"


def _poll(done: Callable[[], bool]) -> None:
    """Wait for a condition for at most the linger time. Rank 0 may host the store: gone means done."""
    deadline = time.monotonic() + _LINGER_S
    with contextlib.suppress(RuntimeError):
        while not done() and time.monotonic() < deadline:
            time.sleep(0.02)

"""What ranks say of themselves in the store, and what a rank that waits for others concludes from it.

Each rank renews one entry, once a second: who it is, and where it stands in the phases of each of its groups. It may be
a second old, so a conclusion is drawn only from what stays true: two ranks gave one phase different names, a rank
failed in a phase, a process is gone.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from fxzero.comm.phases import PhaseLog, Stop

_LIBRARIES = (f"{os.sep}torch{os.sep}", f"{os.sep}fxzero{os.sep}", f"{os.sep}site-packages{os.sep}", "contextlib.py")
STALE_S = 5.0
"""An entry that was not renewed for so long is that of a dead rank, where its process cannot be looked at."""


# -- what a rank says of itself ----------------------------------------------------------------------------------------


def name_of_group(members: Iterable[int]) -> str:
    """The name of a group in an entry."""
    return ",".join(map(str, members))


def entry_of(logs: Iterable[PhaseLog], beat: int, ended: str | None) -> dict[str, Any]:
    """The entry of this rank.

    Args:
        beat: counts the entries that it has written.
        ended: how the rank left the job; None while it is there.
    """
    machine, started = _this_process()
    return {
        "beat": beat,
        "machine": machine,
        "process": [os.getpid(), started],
        "ended": ended,
        "calls": call_of_torch_distributed(),
        "groups": {
            name_of_group(log.members): {
                "number": log.number,
                "is_inside": log.is_inside,
                "waits": log.waits,
                "recent": list(log.recent),
                "failed": log.failed,
                "stop": log.stop,
                "generation": log.generation,
                "options": log.options,
            }
            for log in logs
        },
    }


@cache
def _this_process() -> tuple[str, str]:
    return _machine(), _start_of(os.getpid()) or ""


def _machine() -> str:
    """A name of the machine, and of the namespace in which its process ids count; empty where /proc is not there."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(process: int) -> str | None:
    """When a process of this machine started; None if it has ended."""
    try:
        state, *values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]


def call_of_torch_distributed() -> tuple[str, list[int]] | None:
    """The collective of torch.distributed that the main thread is in, with its place, and the ranks of its group."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # pyright: ignore[reportPrivateUsage]
    found: FrameType | None = None
    while frame is not None and _is_of_torch(frame):
        if frame.f_code.co_filename.endswith("distributed_c10d.py") and "group" in frame.f_code.co_varnames:
            found = frame
        frame = frame.f_back
    if found is None or frame is None or not dist.is_initialized():
        return None
    group = found.f_locals.get("group")
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    return f"torch.distributed.{found.f_code.co_name} at {_place(frame)}", ranks


def _is_of_torch(frame: FrameType) -> bool:
    return f"torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def describe_error(error: BaseException) -> str:
    """An error in one line, with the innermost line of the user's code that it came through."""
    text = f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:500]}"
    place = ""
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage] (where it is reported, if it came through libraries alone)
    while frame is not None and not place:
        place = "" if _is_of_library(frame) else f" ({_place(frame)})"
        frame = frame.f_back
    traceback = error.__traceback__
    while traceback is not None:
        if not _is_of_library(traceback.tb_frame):
            place = f" ({Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return text + place


def _is_of_library(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return path.startswith("<") or any(part in path for part in _LIBRARIES)


_RAN_OUT = "If it has run out of batches: give every rank the same number of them."


# -- what others conclude ----------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What one rank has seen of another while it waits."""

    beat: int = -1
    renewed_s: float = 0.0
    """When the entry was seen renewed for the last time, by this rank's clock."""
    wait: tuple[int, int] | None = None
    """The phase, and the wait for messages in it, in which the other rank was seen."""
    call: tuple[Any, ...] | None = None
    """The collective of torch.distributed in which the other rank was seen, and how far it was then."""


@dataclass
class Peers:
    """Judges the entries of the other ranks of a group."""

    log: PhaseLog
    compares: bool = True
    """False where ranks come to begin anew: only those that have ended or died are waited for in vain."""
    alone: str | None = None
    """Why this rank cannot go on alone, where it waits in a phase for others that may go on without it."""
    watches: dict[int, Watch] = field(default_factory=dict[int, Watch])

    def reason_to_stop(self, entries: Mapping[int, dict[str, Any] | None], now_s: float | None = None) -> Stop | None:
        """The reason why waiting on is in vain, if there is one.

        Args:
            entries: the entries of the ranks that are waited for; None for a rank that has none.
        """
        now_s = time.monotonic() if now_s is None else now_s
        for rank, entry in entries.items():
            if entry is not None and (stop := self._judge(rank, entry, now_s)) is not None:
                return stop
        return None

    def never_came(self, rank: int) -> Stop:
        """The reason to stop where a rank has gone before it wrote an entry."""
        return Stop(
            "end",
            f"rank {rank} has died or ended before it compiled a model; rank {self.log.rank} waits for it in "
            f"{self.log.what}.",
        )

    def _judge(self, rank: int, entry: dict[str, Any], now_s: float) -> Stop | None:
        watch = self.watches.setdefault(rank, Watch())
        is_renewed = entry["beat"] != watch.beat
        if is_renewed:
            watch.beat, watch.renewed_s = entry["beat"], now_s
        theirs = entry["groups"].get(name_of_group(self.log.members))
        if self.compares and theirs is not None and (stop := self._compare(rank, theirs)) is not None:
            return stop
        if self.alone is not None and theirs is not None and self._has_gone_on(theirs, watch, is_renewed=is_renewed):
            return Stop("alone", f"{self.alone} (Rank {rank} has gone on without it.)")
        if self.compares and theirs is not None and (theirs["number"] > self.log.number or self._is_over(theirs)):
            return None  # it has done its part
        seen = theirs["recent"][-1][1] if theirs and theirs["recent"] else "nothing yet"
        own = f"rank {self.log.rank} waits for it in {self.log.what}"
        if entry["ended"]:
            return Stop("end", f"rank {rank} {entry['ended']} after {seen}; {own}. {_RAN_OUT}")
        if is_gone(entry, now_s - watch.renewed_s):
            return Stop("end", f"rank {rank} has died or ended, last seen in {seen}; {own}. {_RAN_OUT}")
        return self._judge_call(rank, entry, theirs, watch, is_renewed=is_renewed)

    def _is_over(self, theirs: dict[str, Any]) -> bool:
        return theirs["number"] == self.log.number and not theirs["is_inside"] and self.log.number > 0

    def _has_gone_on(self, theirs: dict[str, Any], watch: Watch, *, is_renewed: bool) -> bool:
        """True if another rank stays in one wait for messages of the phase in which this one waits for it."""
        is_waiting = theirs["number"] == self.log.number and theirs["is_inside"] and theirs["waits"] % 2 == 1
        wait = (theirs["number"], theirs["waits"]) if is_waiting else None
        stays = is_renewed and wait is not None and wait == watch.wait
        watch.wait = wait
        return stays

    def _compare(self, rank: int, theirs: dict[str, Any]) -> Stop | None:
        """Where the phases of two ranks part."""
        log = self.log
        if theirs["generation"] != log.generation:
            return None  # it has not come yet to where ranks begin anew
        own = {phase.number: phase for phase in log.recent}
        for number, what, options in theirs["recent"]:
            if number in own and what != own[number].what:
                return Stop(
                    "difference",
                    f"Ranks do different things: rank {log.rank} is in {own[number].what}, rank {rank} in {what}.\n"
                    "Every rank must call the same models in the same order, with as many micro-batches, backwards and "
                    "optimizer steps.",
                )
            if number in own and options != own[number].options:
                return Stop("difference", self._differing_options(rank, theirs["options"]))
        if theirs["stop"] is not None:
            return Stop(*theirs["stop"])
        if theirs["failed"] is not None:
            number, error = theirs["failed"]
            what = next((what for place, what, _ in theirs["recent"] if place == number), "a phase")
            if number <= log.number and (log.failed is None or log.failed[0] != number):
                return Stop("failure", f"rank {rank} failed in {what}: {error}")
            if number == log.number and log.is_inside:
                return Stop("failure", f"rank {rank} failed in another place of {what}: {error}")
        return None

    def _differing_options(self, rank: int, theirs: list[str]) -> str:
        pairs = [
            (mine, other) for mine, other in zip_longest(self.log.options, theirs, fillvalue="nothing") if mine != other
        ]
        mine, other = pairs[0] if pairs else ("others before", "others before")
        return (
            f"The optimizers of ranks have different options: rank {self.log.rank} has {_apart(mine, other)}, "
            f"rank {rank} has {_apart(other, mine)}.\n"
            "Set learning rates and all other options of optimizers alike on every rank."
        )

    def _judge_call(
        self, rank: int, entry: dict[str, Any], theirs: dict[str, Any] | None, watch: Watch, *, is_renewed: bool
    ) -> Stop | None:
        """Whether a rank waits in a collective of torch.distributed that this one cannot come to."""
        calls = entry["calls"]
        if calls is None or (theirs is not None and theirs["is_inside"]) or self.log.rank not in calls[1]:
            watch.call = None
            return None
        call = (calls[0], None if theirs is None else theirs["number"])
        if watch.call != call:
            watch.call = call
            return None
        if not is_renewed:
            return None
        return Stop(
            "difference",
            f"Ranks do different things: rank {self.log.rank} is in {self.log.what}, rank {rank} waits in {calls[0]}.\n"
            f"{_RAN_OUT}",
        )


def _apart(line: str, other: str) -> str:
    """A line of options without those that another one has too."""
    head, _, options = line.partition(": ")
    others = other.partition(": ")[2].split(", ")
    return f"{head}: {', '.join(option for option in options.split(', ') if option not in others)}" if options else line


def is_gone(entry: dict[str, Any], age_s: float) -> bool:
    """True if the process of an entry has ended, as far as can be seen from here."""
    machine, _ = _this_process()
    process, started = entry["process"]
    if machine and entry["machine"] == machine:
        return _start_of(process) != started
    return age_s > STALE_S

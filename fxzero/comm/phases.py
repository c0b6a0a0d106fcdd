"""The phases that ranks go through together, counted on each rank: which one it is in, and what came of it.

Ranks of one group run one sequence of phases: forwards and backwards of all models that they compiled for that group,
and operations outside of a step that all take part in. A phase has a number and a name of word, model and step:

    number   rank 0                                          rank 1
    7        forward of Net, micro-batch 1 of step 4         forward of Net, micro-batch 1 of step 4
    8        backward of Net, micro-batch 1 of step 4        evaluation of Net after step 3            a mismatch

The tags of gloo's messages contain the number and the name, so that messages of different phases never meet. `peers.py`
compares the names with those of other ranks, once a wait has lasted for over a second.
"""

from __future__ import annotations

import weakref
import zlib
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch.distributed as dist

from fxzero.errors import CommunicationError

_TAG_BITS = 0x3FFFFFFF
_SPREAD = 0x9E3779B1
"""Odd, so that the tags of one message in different phases differ."""
NUM_RECENT = 16
"""Phases whose names are kept: ranks that wait for each other are no further apart."""


class Phase(NamedTuple):
    """One phase as one rank sees it."""

    number: int
    what: str
    """Word, model and step."""
    options: int
    """Digest of the options of the model's optimizers in their last steps."""


class Stop(NamedTuple):
    """The reason why a rank cannot go on with its group."""

    kind: Literal["difference", "failure", "end", "alone"]
    """Ranks do different things, a rank has failed in a phase or has ended or died, or this one alone needs others."""
    text: str


class Channel(Protocol):
    """Connections to other ranks."""

    def close(self) -> None:
        """End all waits on the connections in an error, on both sides."""
        ...

    def renew(self, made: dict[str, dist.ProcessGroup], generation: int) -> None:
        """Make new connections in place of closed ones; a collective.

        Args:
            made: the connections that were made for this generation, by the name of the group.
        """
        ...

    @property
    def group_name(self) -> str:
        """The name of its process group, equal on all ranks."""
        ...


class LeavesOut(Protocol):
    """A model that can leave a step out."""

    def leave_out(self) -> None:
        """Undo what a step has done that all ranks leave out."""
        ...


class PhaseLog:
    """The phases of the ranks of one group on this rank.

    Args:
        members: the global ranks of the group; empty where there is nobody to talk to.
        rank: the global number of this rank.
    """

    def __init__(self, members: tuple[int, ...] = (), rank: int = 0) -> None:
        self.members, self.rank = members, rank
        self.number = 0
        """Number of the phase that began last."""
        self.salt = 0
        """The part of message tags that stands for the phase."""
        self.waits = 0
        """Odd while this rank waits for messages; counts beginnings and ends of waits."""
        self.is_asynchronous = False
        """True where a device waits for messages, not the host: then waits cannot be seen, and phases count alone."""
        self.is_inside = False
        """True from the beginning to the end of a phase."""
        self.recent: deque[Phase] = deque(maxlen=NUM_RECENT)
        self.failed: tuple[int, str] | None = None
        """The phase that last ended in an error on this rank, and the error."""
        self.stop: Stop | None = None
        """Set once this rank cannot go on."""
        self.generation = 0
        """Counts the times that ranks began anew together after one had failed."""
        self.options: list[str] = []
        """The options of optimizers, one group a line, of the model whose phase began last."""
        self.channels: weakref.WeakSet[Channel] = weakref.WeakSet()
        """The communicators whose waits end when this rank stops."""
        self.made: dict[str, dist.ProcessGroup] = {}
        """The connections of their own that channels have, by the name of the group."""
        self.is_together = False
        """True inside of a step that all ranks take or none: then a failure stops all at once, and they begin anew."""
        self.restart: Callable[[], object] | None = None
        """Begins anew together with the other ranks, where these have agreed to do so after a failure."""
        self.num_steps = 0
        """Steps that optimizers took with parameters of these ranks' models."""
        self.stepping_depth = 0
        """0 outside of such a step; a step of a subclass may contain that of its base class."""
        self.models: weakref.WeakSet[LeavesOut] = weakref.WeakSet()
        """The models of these ranks."""
        self.num_models = 0
        """Models that were compiled for these ranks."""

    def begin(self, what: str, options: int = 0) -> None:
        """A phase begins.

        Raises:
            CommunicationError: this rank has stopped.
        """
        if self.stop is not None and self.stop.kind == "failure" and self.restart is not None:
            self.restart()
        if self.stop is not None:
            raise CommunicationError(
                f"Rank {self.rank} cannot begin {what}: it has stopped.\n{self.stop.text}\nRestart from a checkpoint. "
                "To leave a batch out when a rank fails, run each step under `with zero.step_together():`."
            )
        self.number += 1
        self.recent.append(Phase(self.number, what, options))
        self.salt = (self.number * _SPREAD ^ zlib.crc32(what.encode()) ^ options) & _TAG_BITS
        self.is_inside = True

    @property
    def progress(self) -> tuple[int, int]:
        """Changes while this rank gets on."""
        return self.number, self.waits

    @property
    def may_wait(self) -> bool:
        """True if this rank waits for messages, or a device may do so on its behalf."""
        return self.stop is None and (self.waits % 2 == 1 or (self.is_asynchronous and self.number > 0))

    def end(self) -> None:
        """The phase is over on this rank."""
        self.is_inside = False

    def begin_anew(self, number: int) -> None:
        """All ranks begin anew together with an equal number and new connections, after one had failed."""
        self.generation += 1
        self.number, self.is_inside = number, False
        self.failed = self.stop = None
        self.recent.clear()
        self.made.clear()
        for channel in sorted(self.channels, key=lambda channel: channel.group_name):
            channel.renew(self.made, self.generation)

    @property
    def what(self) -> str:
        """The phase that began last, in words."""
        return self.recent[-1].what if self.recent else "a step that was left out" if self.generation > 1 else "compile"

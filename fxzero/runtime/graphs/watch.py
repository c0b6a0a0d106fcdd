"""Waits for replays, which no watchdog of the backend sees: a rank whose peer is gone must not wait for ever.

An event is recorded behind each replay. Before a further one the host looks at that of two steps before, for which it
rarely waits; while it does, the thread of the heartbeat judges the peers, as while any wait lasts.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fxzero.comm.phases import PhaseLog

AHEAD = 4
"""Replays that may be under way: those of two steps, each a forward and a backward."""
_POLL_S = 0.0005


class ReplayWatch:
    """See the module docstring.

    Args:
        cuda: `torch.cuda`, or what looks like it.
        phases: of the ranks that replay together.
        lost: makes the error to raise of the name of what was waited for, and of the reason.
        timeout_s: the longest wait.
    """

    def __init__(self, cuda: Any, phases: PhaseLog, lost: Callable[[str, Exception], Exception], timeout_s: float):
        self._cuda, self._phases, self._lost, self._timeout_s = cuda, phases, lost, timeout_s
        self._events: deque[Any] = deque()

    def before_replay(self) -> None:
        """Wait until few replays are under way.

        Raises:
            CommunicationError: a peer is gone, or does not come.
        """
        while len(self._events) >= AHEAD:
            self._wait(self._events.popleft())

    def after_replay(self) -> None:
        """A replay was launched on the current stream."""
        event = self._cuda.Event()
        event.record()
        self._events.append(event)

    def _wait(self, event: Any) -> None:
        phases, deadline = self._phases, time.monotonic() + self._timeout_s
        if phases.stop is None and event.query():
            return
        phases.waits += 1
        try:
            while phases.stop is None and not event.query():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"it has not ended within {self._timeout_s:g} s")
                time.sleep(_POLL_S)
            if phases.stop is not None:
                raise RuntimeError(phases.stop.text)
        except RuntimeError as error:
            raise self._lost("a replayed step", error) from error
        finally:
            phases.waits += 1

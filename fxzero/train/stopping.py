"""Stopping all ranks after the same step, whichever of them a signal reached."""

import signal
import time

from fxzero.commands.signals import LEAST_GRACE_SECONDS, StopRequest
from fxzero.commands.world import World

_SECONDS_BETWEEN = 1.0
_MOST_CALLS_BETWEEN = 1000


class AgreedStop:
    """What ranks know of each other's signals, after about a second of steps each.

    Args:
        request: the signal of this rank.
    """

    def __init__(self, world: World, request: StopRequest) -> None:
        self.signum = 0
        """The signal that stops all ranks; 0 for none. It is set after the same call of `__call__` on every rank."""
        self._world, self._request = world, request
        self._calls = self._left = 1
        self._since = time.monotonic()

    def __call__(self) -> bool:
        """True if ranks are to stop now. Every rank calls this after each step, as often as the others."""
        self._left -= 1
        if self._left == 0 and not self.signum:
            self._agree()
        return self.signum != 0

    def _agree(self) -> None:
        now = time.monotonic()
        asked = [float(self._request.signum == signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        seconds, num_int, num_term = self._world.sum(now - self._since, *asked)
        self.signum = signal.SIGINT if num_int else signal.SIGTERM if num_term else 0
        if self.signum:
            self._request.is_met.set()
        a_call = seconds / self._world.size / self._calls
        self._request.grace_seconds = max(LEAST_GRACE_SECONDS, 3 * a_call)
        self._calls = self._left = max(1, min(_MOST_CALLS_BETWEEN, int(_SECONDS_BETWEEN / max(a_call, 1e-9))))
        self._since = now

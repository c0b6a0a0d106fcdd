"""Signals that end a command: at once while it prepares, and after the step that runs while it trains.

                 Ctrl-C or SIGTERM                                            a second Ctrl-C
at once          ends the process, also where it waits inside of a library    -
StopRequest      asks to stop; ends the process if it does not get to that    ends the process
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LEAST_GRACE_SECONDS = 8.0
"""Time to get from a signal to the end of a step, at least."""


@contextmanager
def ending_at_once() -> Generator[None]:
    """Let signals end the process inside the block as if Python were not there: no traceback, no handler that waits."""
    with _handled_by(signal.SIG_DFL):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, Any], object] | signal.Handlers) -> Generator[None]:
    before = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


class StopRequest:
    """The signal that asks this process to stop, noticed by a thread, also while the main thread waits in a library."""

    def __init__(self) -> None:
        self.signum = 0
        """The first signal that came; 0 for none."""
        self.grace_seconds = LEAST_GRACE_SECONDS
        """Seconds after the signal in which `is_met` must be set."""
        self.is_met = threading.Event()
        """Set once the process has stopped to do what it was asked to stop."""

    @contextmanager
    def listening(self) -> Generator[None]:
        """Take signals inside the block; outside of the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with ExitStack() as stack:
            reader, writer = (stack.enter_context(end) for end in socket.socketpair())
            writer.setblocking(False)
            thread = threading.Thread(target=self._watch, args=(reader,), name="fxzero signals", daemon=True)
            stack.enter_context(_handled_by(lambda signum, frame: None))
            before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            thread.start()
            try:
                yield
            finally:
                signal.set_wakeup_fd(before)
                writer.shutdown(socket.SHUT_WR)
                thread.join()

    def _watch(self, reader: socket.socket) -> None:
        while signals := reader.recv(16):
            for signum in signals:
                if signum not in SIGNALS:
                    continue
                if self.signum and signum == signal.SIGINT:
                    os._exit(128 + signum)
                if not self.signum:
                    self.signum = signum
                    threading.Thread(target=self._end_if_stuck, daemon=True).start()

    def _end_if_stuck(self) -> None:
        if not self.is_met.wait(self.grace_seconds):
            os._exit(128 + self.signum)

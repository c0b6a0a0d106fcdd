"""Lines on the screen while a command prepares, so that nobody takes a long wait for a hang."""

import os
import threading
import time

EVERY_SECONDS = 5.0
"""Time between two lines while nothing else happens."""


class Progress:
    """Says at which stage a command is, on the first rank and in the process that starts ranks.

    Args:
        command: its name, for the start of each line.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._speaks = os.environ.get("RANK", "0") == "0"
        self._over = threading.Event()
        self._stage, self._since = "", time.monotonic()
        self._thread: threading.Thread | None = None

    def at(self, stage: str) -> None:
        """Say what begins now, and that it goes on, every few seconds, until the next stage or `stop`."""
        if not self._speaks:
            return
        self._stage, self._since = stage, time.monotonic()
        self._say(stage)
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat, name="fxzero progress", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Say nothing more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _repeat(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self._say(f"still {self._stage}, {time.monotonic() - self._since:.0f} s")

    def _say(self, text: str) -> None:
        print(f"fxzero {self._command}: {text}", flush=True)

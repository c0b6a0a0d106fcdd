"""Termination that cleans up."""

from __future__ import annotations

import signal
from typing import NoReturn


def clean_up_when_terminated() -> None:
    """Let SIGTERM unwind this process as Ctrl-C does, so that what it has set up is taken down."""
    signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> NoReturn:
    raise SystemExit(143)

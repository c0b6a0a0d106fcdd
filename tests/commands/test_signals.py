"""Signals end a process at once, or ask it to stop, also while its main thread waits inside of a library."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

_START = """
import os, signal, sys, threading, time
from fxzero.commands import signals
from fxzero.commands.signals import StopRequest, ending_at_once
"""
AT_ONCE = """
with ending_at_once():
    print("ready", flush=True)
    time.sleep(60)
"""
ASKED = """
request = StopRequest()
with request.listening():
    print("ready", flush=True)
    while not request.signum:
        time.sleep(0.01)
    request.is_met.set()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
sys.exit(request.signum)
"""
NEVER_STOPS = """
request = StopRequest()
request.grace_seconds = 0.1
with request.listening():
    print("ready", flush=True)
    while True:
        time.sleep(60)
"""
TWICE = """
request = StopRequest()
with request.listening():
    print("ready", flush=True)
    while not request.signum:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def _signalled(code: str, *signals: signal.Signals) -> int:
    run = subprocess.Popen(
        [sys.executable, "-c", _START + code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    for signum in signals:
        run.stdout.readline()
        run.send_signal(signum)
    run.communicate(timeout=30)
    return run.returncode


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_at_once(signum: signal.Signals) -> None:
    assert _signalled(AT_ONCE, signum) == -signum


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop(signum: signal.Signals) -> None:
    assert _signalled(ASKED, signum) == signum


def test_a_process_that_does_not_stop_in_time_is_ended() -> None:
    assert _signalled(NEVER_STOPS, signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_second_interrupt_ends_the_process() -> None:
    assert _signalled(TWICE, signal.SIGTERM, signal.SIGINT) == 128 + signal.SIGINT

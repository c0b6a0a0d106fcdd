"""All ranks stop after the same step, whichever of them a signal reached, and the rank says so in time."""

import signal

import pytest

from fxzero.testing import run_ranks
from tests.train.stopping_workers import calls_until_stop


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ranks_stop_after_the_same_call(signum: signal.Signals) -> None:
    first, second = run_ranks(2, calls_until_stop, int(signum))
    assert first == second
    assert first[0] == signum
    assert 3 <= first[1] <= 1003

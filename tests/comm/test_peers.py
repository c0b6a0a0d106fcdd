"""What a rank concludes from the entries of others while it waits."""

import os
import subprocess
import sys
from typing import Any

import pytest

from fxzero.comm.peers import STALE_S, Peers, describe_error, entry_of
from fxzero.comm.phases import PhaseLog, Stop


def log_at(rank: int, *phases: str, options: int = 0) -> PhaseLog:
    """A rank of two that is inside the last of these phases."""
    log = PhaseLog((0, 1), rank)
    for phase in phases:
        log.begin(phase, options)
    return log


def seen(log: PhaseLog, beat: int = 1, **changes: Any) -> dict[int, dict[str, Any] | None]:
    """The entry of a rank, as the other one reads it."""
    return {log.rank: entry_of([log], beat, None) | changes}


def judge(own: PhaseLog, other: PhaseLog, **changes: Any) -> Stop | None:
    """What a rank concludes at once."""
    return Peers(own).reason_to_stop(seen(other, **changes))


def text_of(stop: Stop | None) -> str:
    """The text of a conclusion that must be there."""
    assert stop is not None
    return stop.text


@pytest.mark.parametrize("phases", [(), ("forward",), ("forward", "backward"), ("forward", "backward", "forward")])
def test_a_rank_that_is_late_or_ahead_is_waited_for(phases: tuple[str, ...]) -> None:
    assert judge(log_at(0, "forward", "backward"), log_at(1, *phases)) is None


def test_phases_of_other_names_are_a_difference() -> None:
    stop = judge(log_at(0, "forward", "backward"), log_at(1, "forward", "evaluation"))
    assert stop is not None and stop.kind == "difference"
    assert "rank 0 is in backward, rank 1 in evaluation" in stop.text


def test_a_difference_in_an_earlier_phase_is_found() -> None:
    stop = judge(log_at(0, "forward", "backward", "forward"), log_at(1, "forward", "forward"))
    assert "rank 0 is in backward, rank 1 in forward" in text_of(stop)


def test_options_that_differ_are_named() -> None:
    own, other = log_at(0, "forward", options=1), log_at(1, "forward", options=2)
    own.options, other.options = ["SGD group 0: lr=0.1, momentum=0"], ["SGD group 0: lr=0.3, momentum=0"]
    text = text_of(judge(own, other))
    assert "rank 0 has SGD group 0: lr=0.1, rank 1 has SGD group 0: lr=0.3.\n" in text


def test_a_failure_is_passed_on_unless_this_rank_failed_there_too() -> None:
    own, other = log_at(0, "forward"), log_at(1, "forward")
    other.failed = (1, "ValueError: no (train.py:3)")
    stop = judge(own, other)
    assert stop == Stop("failure", "rank 1 failed in forward: ValueError: no (train.py:3)")
    own.failed = (1, "ValueError: no (train.py:3)")
    own.end()
    assert judge(own, other) is None
    own.begin("forward")
    assert judge(own, other) is None


def test_ranks_that_failed_in_different_places_of_a_phase_do_not_wait_for_each_other() -> None:
    own, other = log_at(0, "forward"), log_at(1, "forward")
    own.failed, other.failed = (1, "KeyError: 1"), (1, "ValueError: no")
    assert "another place" in text_of(judge(own, other))


def test_what_another_rank_stopped_for_counts_until_ranks_begin_anew() -> None:
    own, other = log_at(0, "forward"), log_at(1, "forward")
    other.stop = Stop("difference", "rank 2 does something else")
    assert judge(own, other) == other.stop
    own.begin_anew(5)
    own.begin("forward")
    assert judge(own, other) is None


def test_a_rank_that_has_ended_is_named_unless_it_has_done_its_part() -> None:
    own, other = log_at(0, "forward", "backward"), log_at(1, "forward")
    stop = judge(own, other, ended="has ended")
    assert stop is not None and stop.kind == "end"
    assert "rank 1 has ended after forward; rank 0 waits for it in backward" in stop.text
    other.begin("backward")
    other.end()
    assert judge(own, other, ended="has ended") is None


def test_a_process_that_is_gone_is_dead_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    own, other = log_at(0, "forward", "backward"), log_at(1, "forward")
    text = text_of(judge(own, other, process=[gone.pid, "1"]))
    assert "rank 1 has died or ended, last seen in forward" in text
    text_of(judge(own, other, process=[os.getpid(), "another start"]))


def test_a_rank_of_another_machine_is_dead_once_its_entry_is_old() -> None:
    own, other = log_at(0, "forward", "backward"), log_at(1, "forward")
    peers = Peers(own)
    for now_s, beat, is_dead in ((0.0, 1, False), (4.0, 2, False), (4.0 + STALE_S, 2, False), (4.1 + STALE_S, 2, True)):
        stop = peers.reason_to_stop(seen(other, beat, machine="another"), now_s)
        assert (stop is not None) == is_dead, now_s


def test_a_rank_in_a_collective_of_torch_is_named_once_that_lasts() -> None:
    own, other = log_at(0, "forward", "backward"), log_at(1, "forward")
    other.end()
    peers, call = Peers(own), ("torch.distributed.barrier at train.py:9", [0, 1])
    assert peers.reason_to_stop(seen(other, 1, calls=call)) is None
    assert peers.reason_to_stop(seen(other, 1, calls=call)) is None
    assert "rank 1 waits in torch.distributed.barrier at train.py:9" in text_of(
        peers.reason_to_stop(seen(other, 2, calls=call))
    )
    without = ("torch.distributed.barrier at train.py:9", [1, 2])
    assert all(peers.reason_to_stop(seen(other, beat, calls=without)) is None for beat in (3, 4, 5))


def test_an_error_is_described_with_the_line_that_raised_it() -> None:
    try:
        int("x")
    except ValueError as error:
        assert describe_error(error).startswith(
            "ValueError: invalid literal for int() with base 10: 'x' (test_peers.py:"
        )
